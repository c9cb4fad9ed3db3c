"""What one optimizer keeps off the device of the shards that it steps of a unit: nothing for the other parameters there.

    master       | q q q q q q q q | norm | o o o o o o o o | norm |     AdamW steps the norms, another optimizer q and o
    exp_avg      | norm | norm |                                         the same places in each of AdamW's states

Masters and gradients are everybody's, and lie in `Trained`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..offload.coded import CodedSlab
from ..offload.footprint import Footprint, grain_of
from ..offload.store import Slab
from ..zero.engine import Engine
from ..zero.trained import Trained
from .moments import resting_slab


class _Offloaded:
    """Stands in the optimizer's state for a tensor that rests off the device, in a slab that cannot be read in place."""

    def __repr__(self) -> str:
        return "(offloaded)"


OFFLOADED = _Offloaded()


class UnitStates:
    """The states of one optimizer's shards in one unit.

    slabs:    by key ("exp_avg"), each (footprint.numel,), where a master is not in place.
    outgrown: whether more is stepped than they have places for, until `grow`.
    """

    def __init__(self, trained: Trained, engine: Engine) -> None:
        self.trained = trained
        self.slabs: dict[str, Slab] = {}
        self.outgrown = False
        self._engine = engine
        self._spans: list[tuple[int, int]] = []
        self._footprint: Footprint | None = None

    def join(self, begin: int, end: int) -> None:
        """These elements of the unit's master are stepped, too."""
        self._spans.append((begin, end))
        self.outgrown = bool(self.slabs)
        if not self.slabs:
            self._footprint = None

    @property
    def footprint(self) -> Footprint:
        """Which elements of the master have states, and where in the slabs."""
        if self._footprint is None:
            grain = grain_of(self.trained.plan.optimizer.tier, self._engine.state_dtype)
            self._footprint = Footprint(self._spans, self.trained.master.numel, grain)
        return self._footprint

    def slab(self, key: str, dtype: torch.dtype) -> Slab:
        """Where a state rests; made with the first call."""
        if key not in self.slabs:
            tier, name = self.trained.plan.optimizer.tier, f"{self.trained.name}.{key}"
            engine, numel = self._engine, self.footprint.numel
            self.slabs[key] = resting_slab(engine, tier, key, numel, dtype, name, tells=engine.ranks.rank == 0)
        return self.slabs[key]

    def stand_in(self, key: str, begin: int, end: int) -> Any:
        """What the optimizer's own dictionary holds for a state of elements [begin, end) of the master."""
        slab, first = self.slabs[key], self.footprint.place(begin)
        return slab.tensor[first : first + end - begin] if slab.in_memory else OFFLOADED

    def keep(self, wanted: Collection[tuple[str, torch.dtype]]) -> None:
        """Let go of slabs for other states than these, and of codes: what is written anew would share scales with what was."""
        self.slabs = {
            key: slab
            for key, slab in self.slabs.items()
            if (key, slab.dtype) in wanted and not isinstance(slab, CodedSlab)
        }

    def grow(self) -> None:
        """Have places for all that is stepped; states move there. The device must be idle. Raises StoreError."""
        before, slabs = self.footprint, self.slabs
        self._footprint, self.slabs, self.outgrown = None, {}, False
        for key in list(slabs):
            slab = slabs.pop(key)
            grown = self.slab(key, slab.dtype)
            for begin, end in before.runs:
                grown.write_part(self.footprint.place(begin), slab.read_part(before.place(begin), end - begin))
