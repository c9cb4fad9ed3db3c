"""Does a model train that is larger than any one GPU, all of it on GPUs, and in the bytes that the estimate gave before?

    torchrun --nproc_per_node 2 benchmarks/seventy.py           a Llama of 70B shape, 141 GB in bf16: LoRA, 3 steps
    torchrun --nproc_per_node 2 benchmarks/seventy.py --tiny --use-cpu

Random weights, built inside `accelerator.init()` with their numbers drawn on the GPU, so that no rank ever holds the model;
ZeRO-3, adapters on all linears, every block recomputed. First prints what `shardwise estimate` computes for one rank, and
stops there with --only-estimate or if a GPU has not that much; then builds, trains, and prints a JSON line and a table of
predicted and measured bytes. Exits with 1 if the bytes at rest differ (the counts of the optimizer's steps aside), if the
peak is above the estimate by more than 5%, if building takes more than two minutes, or if a loss is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

from cases import CASES, Case
from place import Place
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import AT_REST, CONTEXT_NBYTES, Choice, Estimate, Run, estimate, size
from shardwise.plan.plan import Tier
from shardwise.plan.precision import Precision
from shardwise.step.optimizer import find_sharded_optimizer
from shardwise.zero.sharded import find_sharded

PEAK_BOUND = 1.05
BUILD_BOUND_S = 120.0
_WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def main(argv: list[str]) -> int:
    """Predict, build, train, compare; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--rows", type=int, default=1, help="sequences of a rank")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only-estimate", action="store_true")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    case = CASES["lora8b"]
    case = replace(case, name="lora70b", shape={**case.shape, **_WIDE}, rows=options.rows, length=options.length)
    case = case.tiny() if options.tiny else case
    case = case if options.layers is None else case.with_layers(options.layers)
    place = Place.join(use_cpu=options.use_cpu)
    try:
        expected = expect(case, place)
        for line in predicted(expected, case):
            place.say(line)
        if options.only_estimate:
            return 0
        if place.cuda:
            there = torch.cuda.get_device_properties(place.device).total_memory
            if expected.peak(Tier.GPU) + CONTEXT_NBYTES > there:
                place.say(f"a GPU here has {size(there)}: take fewer --layers, or more ranks")
                return 2
        return judge(case, place, expected, options.steps)
    finally:
        place.leave()


def expect(case: Case, place: Place) -> Estimate:
    """What `shardwise estimate` says of one rank."""
    run = Run(
        world_size=place.world_size,
        precision=Precision.named("bf16"),
        cuda=place.cuda,
        batch=Batch(case.rows, case.length, case.checkpointing),
    )
    return estimate(case.build(torch.device("meta"), torch.bfloat16), Choice(3), run)


def predicted(expected: Estimate, case: Case) -> list[str]:
    lines = [f"predicted for one rank, {case.rows} x {case.length} tokens, before anything is built"]
    lines += [f"  {row:<18}{size(nbytes):>10}" for (row, tier), nbytes in expected.nbytes.items() if tier is Tier.GPU]
    at_rest, peak = expected.rest(Tier.GPU), expected.peak(Tier.GPU)
    return [*lines, f"  {'at rest':<18}{size(at_rest):>10}", f"  {'at the peak':<18}{size(peak):>10}"]


def judge(case: Case, place: Place, expected: Estimate, steps: int) -> int:
    """Build and train; print record and table; 1 if a promise was not kept."""
    plugin = DeepSpeedPlugin(zero_stage=3)
    accelerator = Accelerator(cpu=not place.cuda, mixed_precision="bf16", deepspeed_plugin=plugin)
    clock = Clock(place)
    with accelerator.init():
        # Case.build makes everything under `with torch.device(device)`: so a GPU draws the numbers.
        model = case.build(accelerator.device, torch.bfloat16)
    # No part of it has memory yet, but what is small.
    held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    clock.lap("build")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    clock.lap("prepare")
    batch = case.batch(0, place.rank, place.device)
    losses = []
    for step in range(steps):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach().float(), "mean")))
        clock.lap(f"step {step}")
    sharded, stepper = find_sharded(model), find_sharded_optimizer(optimizer)
    assert sharded is not None
    assert stepper is not None
    measured: dict[str, int] = {}
    for (role, tier), nbytes in [*sharded.ledger().items(), *stepper.ledger().items()]:
        if tier is Tier.GPU:
            measured[role] = measured.get(role, 0) + nbytes
    allocated = torch.cuda.memory_allocated(place.device) if place.cuda else None
    peak = max(clock.peaks[name] for name in clock.peaks if name.startswith("step")) if place.cuda else None
    rows = {row: expected.nbytes.get((row, Tier.GPU), 0) for row in AT_REST}
    record = {
        "case": case.name,
        "engine": "shardwise:3",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "seconds": clock.seconds,
        "peak_bytes_by_lap": clock.peaks,
        "held_before_prepare_bytes": held,
        "at_rest_bytes": {"estimated": rows, "measured": measured, "allocated": allocated},
        "peak_bytes": {"estimated": expected.peak(Tier.GPU), "measured": peak},
        "losses": losses,
    }
    place.say(json.dumps({**record, **place.facts()}))
    place.say(table(rows, measured, allocated, expected, peak))
    place.say(
        f"built in {clock.seconds['build']:.1f} s, prepared in {clock.seconds['prepare']:.1f} s; steps "
        + ", ".join(f"{clock.seconds[f'step {step}']:.2f} s" for step in range(steps))
        + "; losses "
        + ", ".join(f"{loss:.4f}" for loss in losses)
    )
    failures = list(broken(rows, measured, expected, peak, clock, losses, 4 * len(trained)))
    for failure in failures:
        place.say(f"FAILED: {failure}")
    accelerator.end_training()
    return int(bool(failures))


class Clock:
    """Seconds and device peak of each stretch, of the slowest and the largest rank."""

    def __init__(self, place: Place) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._place = place
        self._begin()

    def _begin(self) -> None:
        self._place.synchronize()
        if self._place.cuda:
            torch.cuda.reset_peak_memory_stats(self._place.device)
        torch.distributed.barrier()
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        place = self._place
        place.synchronize()
        peak = torch.cuda.max_memory_allocated(place.device) if place.cuda else 0
        both = torch.tensor([time.perf_counter() - self._started, peak], dtype=torch.float64, device=place.device)
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        self.seconds[name], self.peaks[name] = round(float(both[0]), 3), int(both[1])
        self._place.say(f"# {name}: {self.seconds[name]:.2f} s, peak {size(self.peaks[name])}")
        self._begin()


def table(rows: dict[str, int], measured: dict[str, int], allocated: int | None, expected: Estimate, peak: Any) -> str:
    """Bytes of one rank, predicted and measured. Gradients are gone between steps."""
    lines = [f"{'role':<22}{'predicted':>18}{'measured':>18}{'ratio':>9}"]

    def line(name: str, predicted: int, found: int | None) -> None:
        shown = "-" if found is None else f"{found:,}"
        ratio = f"{found / predicted:.4f}" if found and predicted else "-"
        lines.append(f"{name:<22}{predicted:>18,}{shown:>18}{ratio:>9}")

    for row, nbytes in rows.items():
        line(row, nbytes, measured.get(row, 0) if row != "gradient" else None)
    between = sum(nbytes for row, nbytes in rows.items() if row != "gradient")
    line("between steps", between, allocated)
    line("peak of a step", expected.peak(Tier.GPU), peak)
    return "\n".join(lines)


def broken(
    rows: dict[str, int],
    measured: dict[str, int],
    expected: Estimate,
    peak: int | None,
    clock: Clock,
    losses: list[float],
    step_counts: int,
) -> Any:
    """The promises that were not kept, a sentence each. step_counts: bytes that only the estimate has."""
    for row in AT_REST:
        apart = rows[row] - measured.get(row, 0)
        if row != "gradient" and not 0 <= apart <= (step_counts if row == "optimizer" else 0):
            yield f"{row} at rest is {apart:,} bytes less than predicted"
    if peak is not None and peak > PEAK_BOUND * expected.peak(Tier.GPU):
        yield f"the peak is {peak / expected.peak(Tier.GPU):.3f} of the estimate, more than {PEAK_BOUND}"
    seconds = clock.seconds["build"] + clock.seconds["prepare"]
    if seconds > BUILD_BOUND_S:
        yield f"building took {seconds:.0f} s, more than {BUILD_BOUND_S:.0f}"
    if not all(map(math.isfinite, losses)):
        yield f"a loss is not finite: {losses}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
