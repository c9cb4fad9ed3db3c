"""Has a change made a step slower? Two checkouts train the same case in turns, on the same devices, a few steps at a time.

    python benchmarks/duel.py --old ../before --new . --nproc 2 --cases bart,lora8b,full1b
    python benchmarks/duel.py --old ../before --new . --nproc 2 --cases lora8b --tiny --use-cpu

Both are built and stay in memory, each in processes of its own, so a case needs twice its memory. While one takes its steps the
other sleeps; who begins changes from turn to turn, so that the drift of the machine falls on both alike. One run of
`compare.py` beside another differs by 2% on its own; the median of such pairs repeats to some thousandths.

Prints one JSON line per case and a table. `new/old` is the median over the turns of the ratio of their steps, between its
quartiles. Exits with 1 if a ratio is above --bound, or if the two differ in a loss by more than bf16 rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOSS_BOUND = 5e-3
PATIENCE_S = 240.0


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.worker:
        return work(options)
    rows = [f"{'case':<12}{'engine':<18}{'old ms':>9}{'new ms':>9}{'new/old':>9}{'from':>8}{'to':>8}{'turns':>7}"]
    failed = False
    for case in options.cases.split(","):
        found = duel(case, options)
        print(json.dumps(found), flush=True)
        failed = failed or found["ratio"]["median"] > options.bound or found["loss_difference"] > LOSS_BOUND
        ratio = found["ratio"]
        rows.append(
            f"{case:<12}{options.engine:<18}{found['old_ms']:>9.2f}{found['new_ms']:>9.2f}{ratio['median']:>9.4f}"
            f"{ratio['quartiles'][0]:>8.4f}{ratio['quartiles'][1]:>8.4f}{options.turns:>7}"
        )
    print("\n".join(rows), flush=True)
    return int(failed)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--old", type=Path, help="a checkout that has this file; its src/ is what is measured, by its own benchmarks"
    )
    parser.add_argument("--new", type=Path, help="another one")
    parser.add_argument("--cases", default="lora8b", help="of cases.py, separated by commas")
    parser.add_argument("--engine", default="shardwise:3", help="a word of engines.py")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of each side")
    parser.add_argument("--turns", type=int, default=12, help="of each side")
    parser.add_argument("--steps", type=int, default=4, help="of a turn; the first is not counted")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--bound", type=float, default=1.02, help="the largest ratio that counts as equal")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.worker and not (options.old and options.new):
        parser.error("--old and --new are needed: the two checkouts to compare")
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first of a turn finds a cold device and is not counted")
    return options


def duel(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one case. Raises RuntimeError with a side's last words if one of them ends or does not answer."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, getattr(options, name), Path(folder), case, options) for name in ("old", "new")]
        try:
            for side in sides:
                side.begin()
            for turn in range(options.turns):
                for side in sides[:: -1 if turn % 2 else 1]:
                    side.take(turn)
        finally:
            for side in sides:
                side.stop()
        old, new = (side.milliseconds for side in sides)
        losses = [side.losses for side in sides]
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "benchmark": "duel",
        "case": case,
        "engine": options.engine,
        "old_ms": statistics.median(old),
        "new_ms": statistics.median(new),
        "ratio": {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]], "of": ratios},
        # Beside the first loss: a batch that is learned by heart has a loss of nothing in the end, and bf16 rounds.
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)) / abs(losses[0][0]),
    }


class Side:
    """The processes of one checkout. milliseconds: the median step of each of its turns, of the slowest rank."""

    def __init__(self, name: str, tree: Path, folder: Path, case: str, options: argparse.Namespace) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.name = name
        self.source = (tree / "src").resolve()
        self.ranks = options.nproc
        self.milliseconds: list[float] = []
        self.losses: list[float] = []
        own = tree.resolve() / "benchmarks" / "duel.py"  # which knows where its engine's files are
        command = [sys.executable, str(own), "--worker", str(self.folder), "--cases", case, "--engine", options.engine]
        for key in ("turns", "steps", "warmup", "layers"):
            command += [f"--{key}", str(getattr(options, key))] if getattr(options, key) is not None else []
        command += [flag for flag, on in (("--tiny", options.tiny), ("--use-cpu", options.use_cpu)) if on]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = {
            "WORLD_SIZE": self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        paths = os.pathsep.join([str(self.source), os.environ.get("PYTHONPATH", "")])
        self.processes = []
        for rank in range(self.ranks):
            variables = {**where, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": paths}
            with (self.folder / f"log-{rank}").open("w") as log:
                environment = os.environ | {key: str(value) for key, value in variables.items()}
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def begin(self) -> None:
        """Wait until every rank has built and warmed up. Raises RuntimeError if it imported another shardwise."""
        for told in self.wait("ready"):
            if not Path(told["source"]).is_relative_to(self.source):
                raise RuntimeError(f"{self.name} trained with {told['source']}, and not with what is in {self.source}.")

    def take(self, turn: int) -> None:
        """Let it take its steps, and keep what they took."""
        (self.folder / f"go-{turn}").touch()
        told = self.wait(f"done-{turn}")
        by_step = [max(column) for column in zip(*(each["ms"] for each in told), strict=True)]
        self.milliseconds.append(statistics.median(by_step[1:]))
        self.losses += told[0]["losses"]

    def wait(self, word: str) -> list[dict[str, Any]]:
        """What each rank has said under `word`."""
        paths = [self.folder / f"{word}-{rank}" for rank in range(self.ranks)]
        until = time.monotonic() + PATIENCE_S
        while not all(path.exists() for path in paths):
            if time.monotonic() > until or any(process.poll() is not None for process in self.processes):
                words = "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("log-*")))
                raise RuntimeError(f"{self.name} has not said {word!r}:\n{words}")
            time.sleep(0.002)
        return [json.loads(path.read_text()) for path in paths]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def work(options: argparse.Namespace) -> int:
    """One rank of one side: it builds, warms up, and takes its steps whenever it is told to."""
    import shardwise
    from cases import pick_case
    from engines import Engine
    from measure import take_step, timed_step
    from place import Place

    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    case = pick_case(options.cases, tiny=options.tiny, layers=options.layers)
    trainee = Engine.parse(options.engine).build(case, place, "fp32")
    index = 0
    for _ in range(options.warmup):
        take_step(trainee, case, place, index)
        index += 1
    place.synchronize()
    _say(options.worker / f"ready-{place.rank}", {"source": shardwise.__file__})
    for turn in range(options.turns):
        while not (options.worker / f"go-{turn}").exists():
            time.sleep(0.001)
        taken = [timed_step(trainee, case, place, index + step) for step in range(options.steps)]
        index += options.steps
        found = {"ms": [1000 * seconds for seconds, _ in taken], "losses": [float(loss) for _, loss in taken]}
        _say(options.worker / f"done-{turn}-{place.rank}", found)
    place.leave()
    return 0


def _say(path: Path, what: dict[str, Any]) -> None:
    """Write a file that appears whole."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(what))
    beside.rename(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
