"""What do moments in 16 or 8 bits change: an update, the loss of a small Llama, and the time of a step that visits the device?

    python benchmarks/state_dtypes.py --use-cpu
    python benchmarks/state_dtypes.py --use-cpu --tiny

First plain torch trains in fp32; beside its moments each candidate keeps its own of the same gradients, and says how far its
update is from the true one. Then the engine trains the model with each `optimizer_state_dtype`, from the same weights on the
same batches. Last, one large weight is stepped with each in turns. On a CPU what rests in host memory visits as beside a GPU.
Prints a JSON line for each and tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressed import Training, build, text
from place import Place
from shardwise.config.sections import EngineConfig
from shardwise.offload.codes import Chance, Coding
from shardwise.plan.compressed import BLOCK
from shardwise.plan.plan import Plan, Tier
from shardwise.plan.precision import LossScaler, Precision
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero.sharded import ShardedModel
from shardwise.zero.trained import Trained

DTYPES = ("fp32", "bf16", "int8")
LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
Coder = Callable[[Tensor, int], Tensor]


def main(argv: Sequence[str]) -> int:
    """Print errors, losses and times; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a smaller model, and few steps")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--numel", type=int, default=16 << 20, help="elements of the weight that is timed")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    place = Place.join(use_cpu=options.use_cpu)
    width, layers, steps, numel = (32, 1, 6, 1 << 16) if options.tiny else (128, 4, options.steps, options.numel)
    source = text("docs", ".md")
    errors = updates(Training(place, build(width // 2, max(1, layers // 2))), source, steps)
    place.say(json.dumps({"benchmark": "state_dtypes", "update_error": errors, **place.facts()}))
    found = {}
    with visiting(place):
        for dtype in DTYPES:
            losses, held_out = losses_of(Training(place, build(width, layers)), source, steps, dtype)
            found[dtype] = losses, held_out
            said = {"benchmark": "state_dtypes", "optimizer_state_dtype": dtype, "losses": losses, "held_out": held_out}
            place.say(json.dumps({**said, **place.facts()}))
        times = step_times(place, numel, 3 if options.tiny else 15)
    place.say(json.dumps({"benchmark": "state_dtypes", "numel": numel, "step_ms": times, **place.facts()}))
    for name, (error, bias) in errors.items():
        place.say(f"{name:<44}{100 * error:>8.2f}%{100 * bias:>+9.3f}%")
    shown = sorted({1, *range(50, steps + 1, 50), steps})
    place.say(f"{'loss at step':<16}" + "".join(f"{step:>9}" for step in shown) + f"{'held out':>11}")
    for dtype, (losses, held_out) in found.items():
        row = "".join(f"{losses[step - 1]:>9.4f}" for step in shown)
        place.say(f"{dtype:<16}{row}{held_out:>11.4f}")
    for dtype, taken in times.items():
        place.say(f"{dtype:<16}{taken['median']:>9.1f} ms  ({taken['least']:.1f} to {taken['most']:.1f})")
    return 0


# Candidates.


def candidates() -> dict[str, tuple[Coder, Coder]]:
    """What is kept of first and second moments."""

    def as_is(values: Tensor, _: int) -> Tensor:
        return values

    def coded(dtype: Any, second: bool, at_random: bool = True) -> Coder:
        coding = Coding(dtype, second)

        def code(values: Tensor, step: int) -> Tensor:
            chance = Chance(0, torch.tensor(step, dtype=torch.int32, device=values.device)) if at_random else None
            return coding.decode(coding.encode(values, chance), torch.empty_like(values))

        return code

    firsts: dict[str, Coder] = {
        "bf16": coded("bf16", False),
        "int8, x": _power(1, 127),
        "int8, x^(1/2)": coded("int8", False),
    }
    firsts["int8, x^(1/4)"] = _power(4, 127)
    seconds = {
        "bf16, to the nearest": coded("bf16", True, False),
        "bf16, at random": coded("bf16", True),
        "int8, x, to the nearest": _power(1, 255),
        "int8, x^(1/2), to the nearest": _power(2, 255),
        "int8, x^(1/4), to the nearest": coded("int8", True, False),
        "int8, x^(1/4), at random": coded("int8", True),
        "int8, log(x), to the nearest": _logarithm,
    }
    found = {f"first moments {name}": (coder, as_is) for name, coder in firsts.items()}
    found |= {f"second moments {name}": (as_is, coder) for name, coder in seconds.items()}
    for dtype in ("bf16", "int8"):
        found[f"both as {dtype}"] = coded(dtype, False), coded(dtype, True)
    return found


def _power(power: int, most: int) -> Coder:
    """In steps of the root of that power, to the nearest; of a second moment what is above 0 stays there."""

    def code(values: Tensor, _: int) -> Tensor:
        blocks = functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True)
        roots = (blocks.abs() / torch.where(scales == 0, 1, scales)) ** (1 / power) * most
        codes = roots.round() if most == 127 else torch.maximum(roots.round(), (blocks > 0).float())
        return (((codes / most) ** power) * scales * blocks.sign()).view(-1)[: values.numel()]

    return code


def _logarithm(values: Tensor, _: int) -> Tensor:
    """Eight codes to a factor of two."""
    blocks = functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(1, keepdim=True)
    codes = (255 + 8 * (blocks / torch.where(scales == 0, 1, scales)).clamp(min=1e-38).log2()).round().clamp(1, 255)
    return torch.where(blocks > 0, torch.exp2((codes - 255) / 8) * scales, 0).view(-1)[: values.numel()]


def updates(training: Training, source: Tensor, steps: int) -> dict[str, tuple[float, float]]:
    """Of AdamW's update at the last step, for each candidate: the error's root mean square over the update's, and the bias."""
    parameters = list(training.model.parameters())
    numel = sum(p.numel() for p in parameters)
    first, second = (torch.zeros(numel, device=training.place.device) for _ in range(2))
    every = candidates()
    kept = {name: (torch.zeros_like(first), torch.zeros_like(first)) for name in every}
    found = {}
    for step in range(1, steps + 1):
        training.model.zero_grad()
        training.loss(training.batch(source, step, 0)).backward()
        gradient = torch.cat([p.grad.view(-1) for p in parameters if p.grad is not None])
        first, second, update = _adam(first, second, gradient, step)
        for name, (of_first, of_second) in every.items():
            own_first, own_second, own = _adam(*kept[name], gradient, step)
            error = float((own - update).norm() / update.norm())
            found[name] = error, float((own * update).sum() / update.square().sum() - 1)
            kept[name] = of_first(own_first, step), of_second(own_second, step)
        begin = 0
        for parameter in parameters:
            end = begin + parameter.numel()
            parameter.data.sub_(update[begin:end].view_as(parameter), alpha=LR)
            begin = end
    return found


def _adam(first: Tensor, second: Tensor, gradient: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    first = first * BETAS[0] + gradient * (1 - BETAS[0])
    second = second * BETAS[1] + gradient.square() * (1 - BETAS[1])
    return first, second, first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)


# The engine.


@contextmanager
def visiting(place: Place) -> Iterator[None]:
    """On a CPU too, what rests in host memory is stepped on the device and not where it is."""
    in_place = Trained.in_place
    if not place.cuda:
        Trained.in_place = property(lambda self: self.master.tier is Tier.GPU)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Trained.in_place = in_place  # type: ignore[method-assign]


def prepared(place: Place, model: nn.Module, dtype: str) -> tuple[ShardedModel, torch.optim.Optimizer]:
    """Under stage 2 with the optimizer in host memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    plan, precision = Plan.from_stage(2, offload_optimizer="cpu"), Precision.named("no")
    options = EngineConfig.model_validate({"optimizer_state_dtype": dtype})
    sharded = ShardedModel(model, plan=plan, ranks=place.ranks, precision=precision, options=options)
    ShardedOptimizer(optimizer, [sharded], scaler=LossScaler.for_precision(precision))
    return sharded, optimizer


def losses_of(training: Training, source: Tensor, steps: int, dtype: str) -> tuple[list[float], float]:
    """The loss at each step, and of 16 batches that are held out."""
    sharded, optimizer = prepared(training.place, training.model, dtype)
    losses = []
    for step in range(steps):
        loss = training.loss(training.batch(source, step, training.place.rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        held = [float(training.loss(training.batch(source, i, 0, held_out=True))) for i in range(16)]
    sharded.release()
    return losses, sum(held) / len(held)


def step_times(place: Place, numel: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of `step()` until the states rest again, one weight of `numel` elements, each setting in turns."""
    runs: dict[str, tuple[ShardedModel, torch.optim.Optimizer, nn.Module]] = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = nn.Linear(1024, numel // 1024, bias=False).to(place.device)
        runs[dtype] = (*prepared(place, model, dtype), model)
    found: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    rows = torch.randn(8, 1024, device=place.device)
    for number in range(rounds + 2):
        for dtype, (sharded, optimizer, model) in runs.items():
            model(rows).square().mean().backward()
            sharded.engine.synchronize()
            begin = time.perf_counter()
            optimizer.step()
            sharded.engine.synchronize()
            if number > 1:
                found[dtype].append(1000 * (time.perf_counter() - begin))
            optimizer.zero_grad()
    return {
        dtype: {"median": statistics.median(times), "least": min(times), "most": max(times)}
        for dtype, times in found.items()
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
