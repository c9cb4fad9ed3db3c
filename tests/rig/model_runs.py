"""Draws random models, and trains them in both ways. See `rig.random_models` for what they are made of."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rig import Worlds
from rig.engine import inputs, mine, prepare, trained, weights_of
from rig.packing import PACKED, opened
from rig.random_models import CORES, Token, Where, built
from shardwise.ranks.agreeing import attempt

STEPS = 5


# Losses. Each takes (model, x, the forward) and gives the loss and the forward's output.


def _output(model: Any, x: Tensor, where: Where) -> Tensor:
    out = model(x, where)
    root = model.root if hasattr(model, "root") else None
    return out if root is None else opened(root, out)


def plain_loss(model: Any, x: Tensor, where: Where) -> Tensor:
    loss = _output(model, x, where).square().mean()
    return loss + sum(where.aside) if where.aside else loss


def penalised_loss(model: Any, x: Tensor, where: Where) -> Tensor:
    x = x.clone().requires_grad_(True)
    loss = plain_loss(model, x, where)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().mean()


def only_aside(model: Any, x: Tensor, where: Where) -> Tensor:
    """What pieces left aside, if any did; the output is dropped."""
    loss = plain_loss(model, x, where)
    return sum(where.aside) + loss.detach() if where.aside else loss


def two_forwards(model: Any, x: Tensor, where: Where) -> Tensor:
    return plain_loss(model, x, where) + 0.5 * plain_loss(model, x * 0.5, Where(where.step, where.rank))


LOSSES = {"plain": plain_loss, "penalised": penalised_loss, "aside": only_aside, "two": two_forwards}


# Drawing.


def drawn_tokens(seed: int) -> list[Token]:
    source = random.Random(f"model {seed}")
    pick = source.choice
    tokens: list[Token] = []
    for number in range(source.randrange(2, 6)):
        core = pick(["dense"] * 5 + list(CORES))
        tokens.append((core, pick([1, 2, 3, 7]), pick([True, False])) if core == "dense" else (core,))
        if number and source.random() < 0.15:
            tokens.append(("tied", source.randrange(9)))
        if source.random() < 0.2:
            tokens.append(("frozen",))
        for _ in range(pick([0, 0, 1, 1, 2, 3])):
            tokens.append(_around(source))
        if source.random() < 0.15:
            tokens.append(("again", source.randrange(9)))
    if source.random() < 0.4:
        tokens.append(("root", pick(list(PACKED))))
    return tokens


def _around(source: random.Random) -> Token:
    pick = source.choice
    return pick(
        [
            ("packed", pick(list(PACKED))),
            ("packed", pick(list(PACKED))),
            ("skip", source.randrange(3)),
            ("loop", pick([True, False])),
            ("branch",),
            ("no_grad", pick([2, 9])),
            ("detach", pick([2, 9])),
            ("detach_out", pick([2, 9])),
            ("checkpoint", pick([True, False])),
            ("checkpoint", pick([True, False])),
            ("in_place", pick(["mul", "rows", "item"])),
            ("hook", pick(["forward", "pre", "backward", "backward_pre", "tensor", "parameter"])),
            ("forces", pick([True, False])),
            ("transformed", pick(["vmap", "grad", "jvp", "call"])),
            ("outside",),
            ("aside",),
            ("twice",),
        ]
    )


@dataclass(frozen=True)
class Training:
    """How a model is trained. plan: of rig.engine. loss: of LOSSES. units: as for ShardedModel."""

    plan: str = "3"
    ranks: int = 2
    loss: str = "plain"
    units: tuple[str, ...] | None = ("Piece",)
    accumulate: int = 1

    @classmethod
    def drawn(cls, seed: int) -> Training:
        source = random.Random(f"training {seed}")
        return cls(
            ("3", "3", "3-all", "3", "3-disk", "0", "3", "2")[seed % 8],
            (2, 2, 1, 3, 2)[seed % 5],
            source.choice(["plain"] * 5 + list(LOSSES)),
            source.choice([("Piece",), ("Piece",), ("Dense",), None]),
            source.choice([1, 1, 1, 2]),
        )


def drawn(seed: int) -> tuple[Training, list[Token]]:
    """How the model of a seed is trained, and what it is made of."""
    return Training.drawn(seed), drawn_tokens(seed)


def problem_of(world: Worlds, training: Training, tokens: Sequence[Token]) -> str | None:
    """How a model goes wrong, in words; None if it does not. A rank that dies or hangs is wrong too."""
    try:
        found = world(training.ranks).run(play, training, list(tokens), timeout_s=60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return next((text for text in found if text), None)


def play(ranks: Any, training: Training, tokens: Sequence[Token]) -> str | None:
    """How the model's numbers are not plain torch's, in a sentence; None if they are, and where torch raises."""
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
    warnings.filterwarnings("ignore", message=".*non-full backward hook.*")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings(
        "ignore", message="There is a performance drop because we have not yet implemented the batching"
    )
    return _Both(ranks, training, tokens).run()


# What a module may not do at zero_stage 3 although torch lets it: (the error's words, when it holds).
_HIDING = ("namespace", "set", "closure", "generator", "userdict", "dataclass", "output")
REFUSED: tuple[tuple[str, Callable[[Training, Sequence[Token]], bool]], ...] = (
    # Weights are read where the module runs that is named in `units`.
    (
        r"was read \(.*while it is sharded",
        lambda training, tokens: ("outside",) in tokens and training.units != ("Piece",),
    ),
    # A transform that takes gradients keeps weights where nobody follows them; a backward comes to them through outputs.
    (
        r"is at version \d+; expected version",
        lambda _, tokens: ("transformed", "grad") in tokens and any(("packed", how) in tokens for how in _HIDING),
    ),
)


def _is_refused(error: Exception, training: Training, tokens: Sequence[Token]) -> bool:
    return training.plan.startswith("3") and any(
        re.search(words, str(error)) is not None and holds(training, tokens) for words, holds in REFUSED
    )


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


class _Both:
    """A model in plain torch, which plays all ranks, and the same prepared on this rank."""

    def __init__(self, ranks: Any, training: Training, tokens: Sequence[Token]) -> None:
        self.ranks = ranks
        self.training = training
        self.tokens = tokens
        self.reference, self.model = built(tokens), built(tokens)
        self.loss: Callable[..., Tensor] = LOSSES[training.loss]
        # Thirds are summed up in another order; where 16 bits follow, a last bit of 32 may become one of those.
        rounds = ("half",) in tokens and self.ranks.world_size == 3
        self._limit = 2e-3 if rounds else 2e-6

    def run(self) -> str | None:
        weights, losses = self._in_torch()
        if not losses:
            return None
        units = self.training.units
        found = [n for n in units if any(type(m).__name__ == n for m in self.model.modules())] if units else []
        sharded, _, stepping = prepare(self.ranks, self.model, self.training.plan, optimizer=_sgd, units=found or None)
        for number, wanted in enumerate(losses):
            loss, error = attempt(lambda: self._backward(number))  # noqa: B023 - called at once
            problem = _said(error) if error is not None else self._differs(loss, wanted)
            told = self.ranks.gather_objects(problem)
            if error is not None and all(told) and _is_refused(error, self.training, self.tokens):
                return None
            if any(told):
                return f"step {number}: {next(text for text in told if text)}"
            if (number + 1) % self.training.accumulate == 0:
                stepping.step()
                stepping.zero_grad()
        found_weights = weights_of(sharded)
        for name, value in weights.items():
            problem = self._differs(found_weights[name], value)
            if problem:
                return f"{name} at the end: {problem}"
        return None

    def _in_torch(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Weights in the end, and this rank's losses; nothing where torch raises."""
        optimizer = _sgd(trained(self.reference))
        losses: list[Tensor] = []
        for number, batch in enumerate(inputs(STEPS * self.training.accumulate)):
            own = torch.zeros(())
            for rank in range(self.ranks.world_size):
                loss, error = attempt(lambda: self._one(self.reference, batch, rank, number))  # noqa: B023
                if error is not None:
                    return {}, []
                assert loss is not None
                own = loss if rank == self.ranks.rank else own
            losses.append(own)
            if (number + 1) % self.training.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        return {name: p.detach().clone() for name, p in self.reference.named_parameters()}, losses

    def _one(self, model: Any, batch: Tensor, rank: int, number: int, *, alone: bool = False) -> Tensor:
        n, times = self.ranks.world_size, self.training.accumulate
        loss = self.loss(model, mine(batch, rank, n), Where(number // times, rank))
        if loss.requires_grad:
            (loss / (times if alone else n * times)).backward()
        return loss.detach()

    def _backward(self, number: int) -> Tensor:
        batch = inputs(STEPS * self.training.accumulate)[number]
        return self._one(self.model, batch, self.ranks.rank, number, alone=True)

    def _differs(self, found: Tensor | None, wanted: Tensor) -> str | None:
        if found is None or found.shape != wanted.shape:
            return f"{found} instead of {wanted}"
        if not wanted.numel():
            return None
        off = ((found.to(wanted.dtype) - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
        return None if off <= self._limit else f"off by {off:.3g}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
