"""A model's units in the order of a step, with what each computes and what its weights weigh: what the schedule walks over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..plan.units import ROOT, UnitSpec, find_units
from ..zero.sharded import UNIT_NBYTES
from .activations import Batch, decoder_shape
from .schedule import Work
from .tracing import Operations, Traced, trace


@dataclass(frozen=True)
class Placed:
    """A unit where it is used: a "lookup", a "block" or a "head"; a tied embedding is two of these.

    key: its name, and which of the two. entries: paths of its modules of this place.
    frozen, trained: elements. gathered: bytes of the weights that a gather makes whole, reduced: elements of its gradients.
    decoded: bytes that are read and written where codes become 16-bit weights, once a pass; 0 where there are none.
    """

    unit: UnitSpec
    place: str
    key: str
    entries: tuple[str, ...]
    frozen: int
    trained: int
    gathered: int
    reduced: int
    decoded: int = 0

    @property
    def adapters_stay_whole(self) -> bool:
        return 0 < self.trained * 16 <= self.frozen


def placed_units(model: nn.Module, units: Sequence[str] | None = None) -> list[Placed]:
    """In the order of a forward: lookups, blocks, heads. units: as the setting names them."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = [unit for unit in find_units(model, units, unit_nbytes=UNIT_NBYTES) if unit.parameters]
    lookups = [unit for unit in found if any(isinstance(entry, nn.Embedding) for entry in unit.entries)]
    heads = [unit for unit in found if any(type(entry) is nn.Linear for entry in unit.entries)]
    blocks = [unit for unit in found if unit not in lookups and unit not in heads]
    placed = []
    for place, group in (("lookup", lookups), ("block", blocks), ("head", heads)):
        for unit in group:
            entries = [entry for entry in unit.entries if place != "lookup" or isinstance(entry, nn.Embedding)]
            entries = [entry for entry in entries if place != "head" or type(entry) is nn.Linear]
            sizes = [(p.requires_grad, p.numel()) for p in unit.parameters.values()]
            frozen, trained = (sum(n for grad, n in sizes if grad is wanted) for wanted in (False, True))
            of_codes = sum(p.nbytes for p in unit.parameters.values() if not p.is_floating_point())
            numel = sum(p.numel() for p in unit.parameters.values() if p.is_floating_point())
            adapters = 0 < trained * 16 <= frozen  # they stay whole
            placed.append(
                Placed(
                    unit,
                    place,
                    f"{place} {unit.name}",
                    () if unit.name == ROOT else tuple(paths[id(entry)] for entry in entries),
                    frozen,
                    trained,
                    2 * (numel - trained if adapters else numel) + of_codes,
                    # A tied weight is reduced once, when the lookup's backward ends.
                    trained if place != "head" or unit not in lookups else 0,
                )
            )
    return placed


def with_shapes(placed: Sequence[Placed], shapes: nn.Module) -> tuple[list[Placed], list[Placed]]:
    """(`placed` of a model whose weights are codes, with what decoding moves; the same units with the weights that it decodes).

    shapes: the model before. Its own units may be others: blocks of codes are smaller, so that more of them share a unit.
    """
    weights = dict(shapes.named_parameters())
    coded, whole = [], []
    for one in placed:
        parameters = one.unit.parameters
        codes = {name: p for name, p in parameters.items() if not p.is_floating_point()}
        numel = sum(weights[name].numel() for name in codes if name in weights)
        coded.append(replace(one, decoded=sum(p.nbytes for p in codes.values()) + 2 * numel))
        before = {name: weights[name] for name in parameters if name in weights}  # without scales
        frozen = sum(p.numel() for p in before.values() if not p.requires_grad)
        whole.append(replace(one, unit=replace(one.unit, parameters=before), frozen=frozen))
    return coded, whole


def works_of(
    placed: Sequence[Placed], seconds: Callable[[Placed], tuple[float, float]], itemsize: int = 4
) -> tuple[list[Work], int]:
    """(forward and backward in order, where the backward begins) of stage 3. seconds: of a unit's forward and backward.

    itemsize: bytes in which an element of a gradient is reduced.
    """
    forward: list[Work] = []
    backward: list[Work] = []
    for one in placed:
        ahead, behind = seconds(one)
        forward.append(Work(ahead, one.gathered))
        backward.append(Work(behind, one.gathered if ahead or one.trained else 0, itemsize * one.reduced))
    return [*forward, *backward[::-1]], len(forward)


def counted(
    model: nn.Module, placed: Sequence[Placed], batch: Batch, dtype: torch.dtype | None
) -> tuple[Traced, str | None]:
    """(what each unit computes, why that is arithmetic alone). The model runs without memory where it can.

    Operations of no unit are those of the last one: norms and losses stand there.
    """
    why = None
    try:
        found = trace(model, {one.key: one.entries for one in placed if one.entries}, batch, dtype)
    except Exception as error:  # whatever a model raises that wants other input, or numbers
        why = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        found = _arithmetic(model, placed, batch)
    return found, why


def _arithmetic(model: nn.Module, placed: Sequence[Placed], batch: Batch) -> Traced:
    """Two operations for each weight of a matrix and token, causal attention, and no other kernels: a lower bound."""
    shape = decoder_shape(model)
    hidden = shape.hidden if shape is not None else 0
    found = Traced()
    for one in placed:
        flops = 0 if one.place == "lookup" else forward_flops(one, batch.tokens, batch.length, hidden)
        weights = 2 * (one.frozen + one.trained)
        found.forward[one.key] = Operations()
        found.backward[one.key] = Operations()
        found.forward[one.key].products[flops, weights] += 1
        found.backward[one.key].products[flops, weights] += 1 + (one.trained > one.frozen)
    return found


def forward_flops(one: Placed, tokens: int, length: int, hidden: int) -> int:
    """Of a unit's forward: two for each weight and token, and causal attention in a block."""
    matrices = sum(p.numel() for p in one.unit.parameters.values() if p.ndim == 2)
    attention = 2 * length * hidden * len(one.unit.entries) if one.place == "block" else 0
    return tokens * (2 * matrices + attention)


def at_stage(works: Sequence[Work], stage: int, ranks: int) -> list[Work]:
    """The same passes where weights are whole (stages 0 to 2), and gradients too (0: reduced and given to all)."""
    if stage == 3:
        return list(works)
    times = 2 if stage == 0 and ranks > 1 else 1
    return [replace(work, gathered=0, reduced=times * work.reduced) for work in works]
