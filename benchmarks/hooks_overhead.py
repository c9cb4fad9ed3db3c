"""How much host time does an engine add to a block, per forward and backward? Microseconds per unit, beside FSDP2's.

    python benchmarks/hooks_overhead.py --use-cpu
    torchrun --nproc_per_node 2 benchmarks/hooks_overhead.py

A stack of tiny Llama blocks with LoRA on every linear (23 parameters each, as at any size): arithmetic and bytes are
next to nothing, so what a step takes beyond the plain model's is hooks, views, events and the calls of the collectives.
Engines alternate step by step in one process, so that the machine's drift falls on all alike; optimizers are not timed.
On a CPU the microseconds are processor time of the thread that trains, which neither a busy machine nor the wait for another
rank changes; with --clock wall, and on CUDA, where autograd has a thread of its own, they are time on the host's clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from cases import CASES, Case
from engines import Engine, Trainee
from place import Place

SILENT = ", silent"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--engines", default="fsdp2,shardwise:0,shardwise:2,shardwise:3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="recompute every block in backward")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="what is told per unit; CUDA: wall")
    parser.add_argument("--silent", action="store_true", help="also without publishing for named waits, row by row")
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    try:
        case = replace(
            CASES["lora8b"].tiny().with_layers(options.layers), checkpointing=options.checkpointing, rows=1, length=4
        )
        words = ["plain", *options.engines.split(",")]
        trainees = {word: Engine.parse(word).build(case, place, "fp32") for word in words}
        if options.silent:  # the same model, turn by turn
            trainees |= {f"{word}{SILENT}": trainees[word] for word in words if word.startswith("shardwise")}
        words = list(trainees)
        clock = time.perf_counter if place.cuda or options.clock == "wall" else time.thread_time
        spent: dict[str, list[tuple[float, float]]] = {word: [] for word in words}
        steps_ms: dict[str, list[float]] = {word: [] for word in words}
        for index in range(options.warmup + options.steps):
            for word, trainee in trainees.items():
                began = time.perf_counter()
                with _silence() if word.endswith(SILENT) else nullcontext():
                    forward_s, backward_s = _timed_step(trainee, case, place, index, clock)
                if index >= options.warmup:
                    spent[word].append((forward_s, backward_s))
                    steps_ms[word].append(1000 * (time.perf_counter() - began))
        _report(spent, steps_ms, case, options, place)
    finally:
        place.leave()
    return 0


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, this rank does not publish what it does."""
    from shardwise.ranks.activity import activity

    before, activity.shared = activity.shared, False
    try:
        yield
    finally:
        activity.shared = before


def _timed_step(
    trainee: Trainee, case: Case, place: Place, index: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds on `clock` of one forward and one backward; on CUDA without waiting for the device in between."""
    batch = case.batch(index, place.rank, place.device)
    torch.distributed.barrier()
    place.synchronize()
    started = clock()
    loss = trainee.forward(**batch).loss
    between = clock()
    loss.backward()
    ended = clock()
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    place.synchronize()
    return between - started, ended - between


def _report(
    spent: dict[str, list[tuple[float, float]]],
    steps_ms: dict[str, list[float]],
    case: Case,
    options: argparse.Namespace,
    place: Place,
) -> None:
    layers = options.layers
    base_forward, base_backward = (statistics.median(column) for column in zip(*spent["plain"], strict=True))
    rows = [f"{'engine':<24}{'step ms':>9}{'forward us':>12}{'backward us':>13}{'us per unit':>13}"]
    for word, values in spent.items():
        forward_s, backward_s = (statistics.median(column) for column in zip(*values, strict=True))
        totals = sorted(steps_ms[word])
        added_forward = 1e6 * (forward_s - base_forward) / layers
        added_backward = 1e6 * (backward_s - base_backward) / layers
        place.say(
            json.dumps(
                {
                    "benchmark": "hooks_overhead",
                    "engine": word,
                    "layers": layers,
                    "clock": "wall" if place.cuda else options.clock,
                    "checkpointing": case.checkpointing,
                    "step_ms": {
                        "median": round(statistics.median(totals), 3),
                        "min": round(totals[0], 3),
                        "max": round(totals[-1], 3),
                    },
                    "added_us_per_unit": {"forward": round(added_forward, 1), "backward": round(added_backward, 1)},
                    **place.facts(),
                }
            )
        )
        rows.append(
            f"{word:<24}{statistics.median(totals):>9.2f}{added_forward:>12.1f}{added_backward:>13.1f}"
            f"{added_forward + added_backward:>13.1f}"
        )
    place.say("\n".join(rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
