"""Every weight of a prepared model, whole, one unit at a time: whatever is saved or exported comes from this stream.

    unit 0   frozen part gathered ── q k v ──>    released
             masters gathered ────── A B ────>    in the dtype that the user gave
    unit 1   ...

Every rank goes through all of it; rank 0 alone is given the tensors. What goes wrong on it waits for the end and is then
every rank's, so that none is left waiting in a gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..offload.store import Slab
from ..ranks.agreeing import FirstError
from ..ranks.ranks import Ranks
from .flat import FlatBuffer
from .schedule import Schedule
from .stand_ins import standing_in
from .trained import Trained
from .unit import Unit


@dataclass(frozen=True)
class WholeMember:
    """A parameter of a prepared model, by the name that it had then.

    parameter: the user's own object, or what a library keeps of a quantised weight beside it.
    dtype:     in which it leaves: the user's if trained, else that it computes in.
    """

    name: str
    parameter: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


class WholeTensors:
    """The stream of one model.

    units:   in the order of the stream. dtypes: of the parameters as the user gave them, by name.
    settle:  finishes what is under way. fetched: brings what rests in a slab to the device. Both are collective.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        schedule: Schedule,
        ranks: Ranks,
        *,
        dtypes: Mapping[str, torch.dtype],
        settle: Callable[[], None],
        fetched: Callable[[Slab], Tensor],
    ) -> None:
        self._model = model
        self._modules = list(model.modules())  # a library may take some out of the model, and put them in again
        self._units = units
        self._schedule = schedule
        self._ranks = ranks
        self._dtypes = dtypes
        self._settle = settle
        self._fetched = fetched

    def members(self) -> list[WholeMember]:
        """Every parameter, each once, in the order of `stream`; the same on every rank, and nothing is gathered."""
        found = []
        for unit in self._units:
            for buffer in unit.buffers:
                for member, slot in zip(buffer.members, buffer.layout.slots, strict=True):
                    trained = buffer is not unit.frozen
                    dtype = self._dtypes[member.name] if trained else member.dtype
                    found.append(WholeMember(member.name, member.parameter, slot.shape, dtype, trained))
        return found

    def trained_dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes that the user gave to trained weights, by name."""
        held = [unit.trained.buffer for unit in self._units if unit.trained is not None]
        return {member.name: self._dtypes[member.name] for buffer in held for member in buffer.members}

    def stream(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Callable[[], Tensor] | None]]:
        """Every parameter of `wanted`: (name, a function that gives it whole).

        The function is None on every rank but 0, and works until the next item is asked for: one unit is whole at a time.
        Trained weights come from their masters. Collective: every rank goes through all items, and none may leave early.
        """
        self._settle()
        main = self._ranks.rank == 0
        for unit in self._units:
            if unit.frozen is not None and any(wanted(m.name) for m in unit.frozen.members):
                with self._schedule.hold([unit]):
                    for index, member in enumerate(unit.frozen.members):
                        if wanted(member.name):
                            yield member.name, _frozen_reader(unit.frozen, index) if main else None
            if unit.trained is not None and any(wanted(m.name) for m in unit.trained.buffer.members):
                whole, buffer = self.master(unit.trained), unit.trained.buffer
                for index, member in enumerate(buffer.members):
                    if wanted(member.name):
                        dtype = self._dtypes[member.name]
                        yield member.name, _trained_reader(buffer, index, whole, dtype) if main else None
                del whole

    def master(self, trained: Trained) -> Tensor:
        """The masters of a unit, (layout.numel,) on the device. Collective."""
        own = self._fetched(trained.master)
        if not trained.plan.optimizer.sharded:
            return own
        whole = torch.empty(trained.buffer.layout.numel, dtype=own.dtype, device=self._ranks.device)
        self._ranks.owners.all_gather(whole, own)
        return whole

    def on_first(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The parameters of `wanted`, on the CPU of rank 0, in memory of their own; an empty dict on the others.

        Collective. Raises on every rank what went wrong on rank 0.
        """
        found: dict[str, Tensor] = {}
        first = FirstError()
        for name, give in self.stream(wanted):
            if give is not None:
                tensor = first.attempt(lambda: give().to("cpu", copy=True))  # noqa: B023 - called at once
                if tensor is not None:
                    found[name] = tensor
        self._ranks.agree(first.error)
        return found

    def standing_in(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, parameters are these tensors, by the names of `members`: see `stand_ins.py`."""
        by_id = {id(m.parameter): tensors[m.name] for m in self.members() if m.name in tensors}
        return standing_in(self._model, by_id, self._modules)

    def state_dict(self) -> dict[str, Any]:
        """What the plain model's own `state_dict()` gives, on the CPU of rank 0; an empty dict on the others. Collective."""
        found = self.on_first(lambda name: True)

        def read() -> dict[str, Any]:
            with self.standing_in(found):
                state = self._model.state_dict()
            taken = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
            # Buffers, and what is no part of the engine, are the model's own and go on changing.
            return {
                name: value.to("cpu", copy=not _lies_in(value, taken)) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }

        return self._ranks.together(lambda: read() if self._ranks.rank == 0 else {})


def persistent_buffers(model: nn.Module, *, every_name: bool = False) -> dict[str, Tensor]:
    """The buffers that are saved, by name; those of a module with several names under the first, or under every name."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=not every_name):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _lies_in(tensor: Tensor, storages: set[int]) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in storages


def _frozen_reader(buffer: FlatBuffer, index: int) -> Callable[[], Tensor]:
    return lambda: buffer.view(index).detach()


def _trained_reader(buffer: FlatBuffer, index: int, whole: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: buffer.view(index, whole).to(dtype)
