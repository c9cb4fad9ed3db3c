"""Where does the host's time in a step of shardwise go? A timer around each call of the engine, beside the whole step.

    torchrun --nproc_per_node 2 benchmarks/host_time.py --case bart
    torchrun --nproc_per_node 2 benchmarks/host_time.py --case bart --tiny --use-cpu

For steps that the host bounds, where a profiler of Python would slow down what it measures, and sees nothing of autograd's
own thread. Calls are nested: a release is part of the need that caused it. Prints a JSON line, calls and milliseconds a step
for each function, the largest first, and the processor time of every thread of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from cases import CASES, pick_case
from engines import Engine
from measure import take_step, timed_step
from place import Place
from shardwise.ranks.group import Group
from shardwise.ranks.lanes import Lane, Lanes
from shardwise.ranks.ranks import Ranks
from shardwise.step import running
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero import hooks
from shardwise.zero.flat import FlatBuffer
from shardwise.zero.gradients import Gradients
from shardwise.zero.schedule import Schedule
from shardwise.zero.unit import Unit

TIMED: list[tuple[Any, str]] = [
    (hooks.Hooks, "before_forward after_forward before_backward after_backward gradient_arrived _end_backward"),
    (hooks, "watch_inputs"),
    (Schedule, "need done begin_forward end_forward begin_backward end_backward"),
    (Unit, "gather arrive release"),
    (FlatBuffer, "expand collapse copy_from_peers"),
    (Gradients, "reduce _take drop"),
    (Group, "reduce_scatter"),
    (Ranks, "any_of all_reduce"),
    (Lane, "__enter__ __exit__ mark wait"),
    (Lanes, "mark_compute compute_waits"),
    (ShardedOptimizer, "step _agree _apply zero_grad"),
    (running, "_call"),
]


@dataclass
class Calls:
    count: int = 0
    seconds: float = 0.0


def time_calls(owner: Any, name: str) -> Calls:
    """Replace a function of a class or module by itself with a timer."""
    calls, function, clock = Calls(), getattr(owner, name), time.perf_counter

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return function(*args, **kwargs)
        finally:
            calls.count += 1
            calls.seconds += clock() - started

    setattr(owner, name, timed)
    return calls


def processor_time() -> dict[str, tuple[str, int]]:
    """By thread number: its name and the hundredths of a second that it ran. Linux."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        numbers = (task / "stat").read_text().rsplit(")", 1)[1].split()
        found[task.name] = ((task / "comm").read_text().strip(), int(numbers[11]) + int(numbers[12]))
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=sorted(CASES), default="bart")
    parser.add_argument("--engine", default="shardwise:3", help="a word of engines.py")
    parser.add_argument("--tiny", action="store_true", help="the same structure, small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=6)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    try:
        # Before the engine is built: it keeps bound methods.
        timed = {
            f"{getattr(owner, '__name__', owner).rsplit('.')[-1]}.{name}": time_calls(owner, name)
            for owner, names in TIMED
            for name in names.split()
        }
        case = pick_case(options.case, tiny=options.tiny, layers=options.layers)
        trainee = Engine.parse(options.engine).build(case, place, "fp32")
        for index in range(options.warmup):
            take_step(trainee, case, place, index)
        for calls in timed.values():
            calls.count, calls.seconds = 0, 0.0
        before, steps_ms = processor_time(), []
        for index in range(options.warmup, options.warmup + options.steps):
            seconds, _ = timed_step(trainee, case, place, index)
            steps_ms.append(1000 * seconds)
        del trainee
        _report({name: calls for name, calls in timed.items() if calls.count}, steps_ms, before, options, place)
    finally:
        place.leave()
    return 0


def _report(
    timed: dict[str, Calls],
    steps_ms: list[float],
    before: dict[str, tuple[str, int]],
    options: argparse.Namespace,
    place: Place,
) -> None:
    steps = options.steps
    ran = {number: (name, ticks - before.get(number, ("", 0))[1]) for number, (name, ticks) in processor_time().items()}
    threads = sorted(((ticks, name) for name, ticks in ran.values() if ticks), reverse=True)
    shares = {name: {"calls": c.count / steps, "ms": 1000 * c.seconds / steps} for name, c in timed.items()}
    place.say(
        json.dumps(
            {
                "benchmark": "host_time",
                "case": options.case,
                "engine": options.engine,
                "step_ms": statistics.median(steps_ms),
                "per_step": shares,
                "threads": [{"name": name, "seconds": ticks / 100} for ticks, name in threads],
                **place.facts(),
            }
        )
    )
    place.say(f"{options.engine}: {statistics.median(steps_ms):.1f} ms a step")
    for name, calls in sorted(timed.items(), key=lambda item: -item[1].seconds):
        text = f"  {name:<34}{calls.count / steps:>7.1f} calls{1000 * calls.seconds / steps:>9.3f} ms a step"
        place.say(f"{text}{1e6 * calls.seconds / calls.count:>9.1f} us a call")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
