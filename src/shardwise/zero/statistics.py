"""Buffers that forwards change, such as running statistics: after each backward that ends a step every rank has rank 0's.

That is DDP's rule. It sends rank 0's buffers before the next forward; here it is the moment before, in which all ranks are
together anyway, so that whatever comes in between (an evaluation of one rank, a save, a copy) finds the same on each.

    step     rank 0 mean 0.1 -> 0.3     rank 1 mean 0.1 -> 0.7      each of its own batch
    then     rank 0 mean 0.3            rank 1 mean 0.3

Nothing is sent for modules whose buffers never change. Normalisations of torch that track statistics are known to change them.
Of other modules the ranks tell each other, in the first two steps, which have done so. A module's buffers count together:
kernels write statistics without raising a version, but a count beside them has one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..ranks.ranks import Ranks
from .buffers import bytes_of, is_strided, written

log = logging.getLogger("shardwise")

_LEARN_IN = 2  # steps
# Of bytes that are sent together, so that any dtype can be seen in them.
_ALIGNMENT = 16


@dataclass(frozen=True)
class _Place:
    """A buffer as it was when the model was prepared, the same on all ranks; nbytes: of what is sent of it."""

    module: int
    name: str
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int

    def fits(self, buffer: Tensor | None) -> bool:
        return buffer is not None and is_strided(buffer) and (buffer.shape, buffer.dtype) == (self.shape, self.dtype)


class RunningBuffers:
    """The buffers of one model that its forwards change. Made when they are equal on all ranks.

    Those that are sparse or nested, or that a script has given another shape, are left to each rank.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        self._modules = [(path, module) for path, module in model.named_modules() if module._buffers]
        self._places: list[_Place] = []
        known: set[int] = set()
        for index, (_, module) in enumerate(self._modules):
            for name, buffer in module._buffers.items():
                if buffer is not None and is_strided(buffer) and buffer.numel() and id(buffer) not in known:
                    known.add(id(buffer))
                    nbytes = buffer.numel() * buffer.element_size()
                    self._places.append(_Place(index, name, buffer.shape, buffer.dtype, nbytes))
        self._changing = {index for index, (_, module) in enumerate(self._modules) if _is_tracked(module)}
        self._late: set[int] = set()  # those that began to change when the ranks had agreed
        self._seen = self._look()
        self._steps = 0

    def change_in(self, module: nn.Module) -> bool:
        """Whether forwards of `module` change buffers, or may, as long as that is not known."""
        if self._steps < _LEARN_IN:
            return any(True for _ in module.buffers())
        changing = {id(self._modules[index][1]) for index in self._changing}
        return bool(changing) and any(id(inner) in changing for inner in module.modules())

    @torch.no_grad()
    def step_ends(self) -> None:
        """A backward before a step has ended. Collective where buffers change, and in the first two steps."""
        self._steps += 1
        if not self._modules or (self._ranks.world_size == 1 and self._steps > _LEARN_IN):
            return
        now = self._look()
        changed = [i for i, (old, new) in enumerate(zip(self._seen, now, strict=True)) if old != new]
        if self._steps <= _LEARN_IN:
            self._changing.update(*self._ranks.gather_objects(changed))
        elif late := [self._modules[i][0] for i in changed if i not in self._changing | self._late]:
            self._late.update(changed)
            log.warning(
                "buffers of %s are changed by now, and were not in the first %d steps: rank %d keeps its own, which may come "
                "to differ from those of other ranks. Change them from the first step on, or keep them outside of the model.",
                late[0] or "the model",
                _LEARN_IN,
                self._ranks.rank,
            )
        self._send([place for place in self._places if place.module in self._changing])
        self._seen = self._look()

    def _look(self) -> list[tuple[tuple[int, int], ...]]:
        """What tells a module's buffers from changed ones."""
        return [
            tuple(
                (id(buffer), 0 if buffer.is_inference() else buffer._version)
                for buffer in module._buffers.values()
                if buffer is not None
            )
            for _, module in self._modules
        ]

    def _send(self, places: Sequence[_Place]) -> None:
        """Rank 0's to everybody, in one message of a size that no rank's state changes: which of them are there, and bytes."""
        if not places or self._ranks.world_size == 1:
            return
        main, device = self._ranks.rank == 0, self._ranks.device
        sizes = [-(-nbytes // _ALIGNMENT) * _ALIGNMENT for nbytes in (len(places), *(p.nbytes for p in places))]
        held = [self._modules[place.module][1]._buffers.get(place.name) for place in places]
        there = [buffer if place.fits(buffer) else None for place, buffer in zip(places, held, strict=True)]
        own = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        flags, *parts = torch.split(own, sizes)
        flags[: len(places)].copy_(torch.tensor([buffer is not None for buffer in there], dtype=torch.uint8))
        packed = [
            (part[: buffer.nbytes], bytes_of(buffer))
            for part, buffer in zip(parts, there, strict=True)
            if buffer is not None
        ]
        torch._foreach_copy_([part for part, _ in packed], [flat for _, flat in packed])
        sent = own if main else own.clone()
        self._ranks.broadcast(sent)
        if main:
            return
        counts = torch.tensor(sizes[1:], device=device)
        kept = sent[: len(places)].repeat_interleave(counts, output_size=sum(sizes[1:])).bool()
        found = torch.split(torch.where(kept, sent[sizes[0] :], own[sizes[0] :]), sizes[1:])
        for place, part, buffer in zip(places, found, there, strict=True):
            if buffer is not None:
                # Through `data`: kernels write statistics without raising a version, so no graph minds.
                written(buffer.data, part[: place.nbytes].view(place.dtype).view(place.shape))


def _is_tracked(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Inside, a recomputation of `module`: what it does to buffers has been done by the forward, and is undone."""
    held = [
        (inner, name, buffer, buffer.detach().clone())
        for inner in module.modules()
        for name, buffer in inner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for inner, name, buffer, before in held:
            if is_strided(buffer):
                written(buffer.data, before)
                inner._buffers[name] = buffer
            else:
                inner._buffers[name] = before
