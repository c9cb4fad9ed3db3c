"""What does it cost that host processes tell each other a fact? The engine's hops and gloo's ring in turns; and a model.

    python benchmarks/host_messages.py --ranks 2,4,8          messages in turns, on processes of this machine
    python benchmarks/host_messages.py --ranks 64 --messages 20
    python benchmarks/host_messages.py --steps --ranks 2,4    which of them a training step sends, and its time either way
    python benchmarks/host_messages.py --model                hops x latency, up to 16,384 ranks; nothing is run

Three messages: two flags, of which none is set (the end of a pass), a number, and a small object (errors agreed upon). Time is
rank 0's wall time and a rank's processor time, both from one message to the next; where ranks outnumber cores, scheduling is
most of it. Hops are counted by arithmetic; `tests/ranks/test_control.py` holds what is sent against it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from place import Place, commit
from shardwise.ranks.control import Control, Ring
from shardwise.ranks.doubling import Doubling

MODELLED = (2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
LATENCY_US = 30.0  # assumed: one host's message to another of a cluster, over TCP, until its thread runs
SLOT_NBYTES = {"flags": 2, "number": 8, "object": 64}
BYTES_PER_S = 1e9  # assumed: what one stream of TCP carries


WAYS: dict[str, type[Control]] = {"ring": Ring, "hops": Doubling}
MESSAGES: dict[str, Callable[[Control], Any]] = {
    "flags": lambda control: control.any_of([False, False]),
    "number": lambda control: control.gather_numbers(7),
    "object": lambda control: control.gather_objects(None),
}


def hops_of(way: str, message: str, ranks: int) -> int:
    """How many times one message goes on before all have heard of all: also how many messages a rank sends."""
    if way == "hops":
        return math.ceil(math.log2(ranks))
    return {"flags": 2, "number": 1, "object": 2}[message] * (ranks - 1)


def model_us(way: str, message: str, ranks: int, latency_us: float = LATENCY_US) -> float:
    """Hops x latency, and what all slots take on one stream where they go round whole."""
    nbytes = 2 * hops_of(way, message, ranks) if message == "flags" else SLOT_NBYTES[message] * (ranks - 1)
    return hops_of(way, message, ranks) * latency_us + 1e6 * nbytes / BYTES_PER_S


# Messages, in turns.


def _exchange(rank: int, count: int, path: str, messages: int, turns: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, count), rank=rank, world_size=count)
    group = dist.new_group(backend="gloo")
    controls = {way: kind(group, rank, count) for way, kind in WAYS.items()}
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(turns + 1):
        for way, control in list(controls.items())[:: 1 if turn % 2 else -1]:
            for message, say in MESSAGES.items():
                controls["hops"].barrier()
                wall, busy = time.perf_counter(), time.process_time()
                for _ in range(messages):
                    say(control)
                spent = (time.perf_counter() - wall) / messages, (time.process_time() - busy) / messages
                if turn:  # the first one is a warm-up
                    taken.setdefault((message, way), []).append(spent)
    everyone = controls["hops"].gather_objects({key: [busy for _, busy in spent] for key, spent in taken.items()})
    if rank == 0:
        _tell(count, taken, everyone)
    controls["hops"].barrier()
    dist.destroy_process_group()


def _tell(
    count: int, taken: dict[tuple[str, str], list[tuple[float, float]]], everyone: Sequence[dict[Any, Any]]
) -> None:
    for message in MESSAGES:
        record: dict[str, Any] = {"benchmark": "host_messages", "kind": "measured", "ranks": count, "message": message}
        for way in WAYS:
            spent = taken[message, way]
            busy = [statistics.mean(ranks) for ranks in zip(*(found[message, way] for found in everyone), strict=True)]
            record[way] = {
                "hops": hops_of(way, message, count),
                "wall_us": round(1e6 * statistics.median(wall for wall, _ in spent), 1),
                "wall_us_least": round(1e6 * min(wall for wall, _ in spent), 1),
                "processor_us": round(1e6 * statistics.median(busy), 1),
            }
        pairs = zip(taken[message, "hops"], taken[message, "ring"], strict=True)
        record["ratio_of_turns"] = round(statistics.median(mine[0] / ring[0] for mine, ring in pairs), 3)
        record |= {"commit": commit(), "torch": torch.__version__, "cpu_cores": os.cpu_count()}
        print(json.dumps(record))
        cells = "".join(
            f"{way:>7}{found['hops']:>6}{found['wall_us']:>11}{found['processor_us']:>11}"
            for way in WAYS
            for found in [record[way]]
        )
        print(f"{count:>6} {message:<8}{cells}{record['ratio_of_turns']:>8}", flush=True)


# A training step.


class Switched(Control):
    """Says every message in one of the ways, and counts them. way: may be changed between two messages, on all ranks alike."""

    def __init__(self, group: dist.ProcessGroup, rank: int, world_size: int) -> None:
        super().__init__(group, rank, world_size)
        self.ways = {way: kind(group, rank, world_size) for way, kind in WAYS.items()}
        self.way = "hops"
        self.counts: Counter[str] = Counter()

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        self.counts["flags, without waiting" if all(flags) else "flags"] += 1
        return self.ways[self.way].any_of(flags)

    def gather_numbers(self, number: int) -> list[int]:
        self.counts["number"] += 1
        return self.ways[self.way].gather_numbers(number)

    def gather_objects(self, value: Any) -> list[Any]:
        self.counts["object"] += 1
        return self.ways[self.way].gather_objects(value)

    def broadcast_object(self, value: Any, source: int) -> Any:
        self.counts["object of one rank"] += 1
        return super().broadcast_object(value, source)

    def hear_told(self) -> None:
        for control in self.ways.values():
            control.hear_told()


def _train(rank: int, count: int, port: int, words: Sequence[str], case_name: str, steps: int) -> None:
    from cases import pick_case
    from engines import Engine
    from measure import take_step

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    place, case = Place.join(use_cpu=True), pick_case(case_name, tiny=True, layers=None)
    assert place.ranks._control is not None
    control = place.ranks._control = Switched(place.ranks._control.group, rank, count)
    for word in words:
        trainee = Engine.parse(word).build(case, place, "fp32")
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for index in range(6 + 2 * steps):
            control.way = list(WAYS)[(index + index // 2) % 2]  # each comes first as often as the other
            dist.barrier()
            control.counts.clear()
            wall, busy = time.perf_counter(), time.process_time()
            take_step(trainee, case, place, index)
            control.hear_told()
            if index >= 6:
                taken[control.way].append((time.perf_counter() - wall, time.process_time() - busy))
        seen, control.way = dict(control.counts), "hops"
        del trainee
        if rank == 0:
            _tell_steps(word, case_name, count, seen, taken)
    dist.barrier()
    place.leave()


def _tell_steps(
    word: str, case: str, count: int, seen: dict[str, int], taken: dict[str, list[tuple[float, float]]]
) -> None:
    record: dict[str, Any] = {
        "benchmark": "host_messages",
        "kind": "step",
        "case": case,
        "ranks": count,
        "engine": word,
    }
    for way, spent in taken.items():
        record[way] = {
            "step_ms": round(1e3 * statistics.median(wall for wall, _ in spent), 2),
            "processor_ms": round(1e3 * statistics.median(busy for _, busy in spent), 2),
        }
    pairs = zip(taken["hops"], taken["ring"], strict=True)
    record["ratio_of_turns"] = round(statistics.median(mine[0] / ring[0] for mine, ring in pairs), 3)
    print(json.dumps({**record, "messages": seen, "commit": commit(), "cpu_cores": os.cpu_count()}))
    told = ", ".join(f"{number} {name}" for name, number in sorted(seen.items())) or "none"
    print(
        f"{count} ranks, {case} {word}: {told}; {record['ring']} {record['hops']} {record['ratio_of_turns']}",
        flush=True,
    )


# The model.


def _show_model() -> None:
    print(f"model: {LATENCY_US:g} us a hop and {BYTES_PER_S / 1e9:g} GB/s a stream are assumed; ms for one message")
    print(f"{'ranks':>7}" + "".join(f"{message + ', ' + way:>15}" for message in MESSAGES for way in WAYS))
    for count in MODELLED:
        found = {(m, way): model_us(way, m, count) for m in MESSAGES for way in WAYS}
        print(f"{count:>7}" + "".join(f"{us / 1000:>15.2f}" for us in found.values()))
        hops = {f"{message}, {way}": hops_of(way, message, count) for message, way in found}
        said = {f"{message}, {way}": round(us, 1) for (message, way), us in found.items()}
        print(json.dumps({"benchmark": "host_messages", "kind": "model", "ranks": count, "us": said, "hops": hops}))


def _on_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Fork that many; raise if one fails."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=(rank, count, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{count} ranks ended with {[process.exitcode for process in processes]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--model", action="store_true", help="only the model")
    parser.add_argument("--steps", action="store_true", help="training steps")
    parser.add_argument("--ranks", default="2,4,8", help="numbers of processes, one after another")
    parser.add_argument("--messages", type=int, default=200, help="of each kind, in a turn")
    parser.add_argument("--turns", type=int, default=20, help="of messages; of steps: how many with each way")
    parser.add_argument("--engines", default="shardwise:2,shardwise:3", help="words of engines.py, for --steps")
    parser.add_argument("--case", default="full1b", help="for --steps, in its tiny form")
    options = parser.parse_args(argv)
    if options.model:
        _show_model()
        return 0
    if not options.steps:
        print(
            f"{'ranks':>6} {'':<8}" + f"{'way':>7}{'hops':>6}{'wall us':>11}{'cpu us':>11}" * 2 + f"{'ratio':>8}",
            flush=True,
        )
    for count in map(int, options.ranks.split(",")):
        if options.steps:
            _on_ranks(count, _train, _free_port(), options.engines.split(","), options.case, options.turns)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _on_ranks(count, _exchange, os.path.join(folder, "store"), options.messages, options.turns)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
