"""From modules to units: the flat buffers of a model, filled with rank 0's values, and what of them is trained later after all.

    specs      block 3: q, k (frozen), lora_A, lora_B (trained)
    blueprints   block 3: frozen q k | trained lora_A lora_B        how it is divided: `blueprint.py`
    unit       one buffer of bytes, one of numbers with gradients and masters

A weight that is thawed leaves its frozen buffer, which is made anew without it, and gets a unit of its own with masters that
start from the value it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import PrepareError
from ..offload.borrowed import BorrowedSlab
from ..offload.nvme import NvmeStore
from ..offload.store import Slab
from ..plan.blueprint import Blueprint, Member, Part, apportion, packing_of, parts_of
from ..plan.layout import Layout
from ..plan.plan import Plan, Tier
from ..plan.precision import Precision
from ..plan.units import UnitSpec
from ..ranks.ranks import Ranks
from .compressed import refuse_wide, say_what_travels
from .engine import Engine
from .flat import FlatBuffer, give_memory
from .quantised import QuantisedWeights
from .sources import Makers, Source, fill_region, lying
from .trained import Trained
from .unit import Unit

logger = logging.getLogger("shardwise")

# Trained weights that stay whole are reduced in buckets of at most this; the size that DDP found to hide best.
BUCKET_NBYTES = 25 << 20


@torch.no_grad()
def place_empty(model: nn.Module, device: torch.device, dtype_of: Callable[[str, Tensor], torch.dtype]) -> None:
    """Give parameters without elements, which are in no unit, the device and the dtype of the others."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            give_memory(parameter, torch.empty_like(parameter, device=device, dtype=dtype_of(name, parameter)))


class Builder:
    """Makes the units of one model.

    engine:         what they share. plan, precision: the model's.
    whole_adapters: as ShardedModel takes it.
    quantised:      which weights are codes with scales.
    sources:        of the parameters on the meta device, by id; makers: who makes each of them whole.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        precision: Precision,
        whole_adapters: bool | Literal["auto"],
        quantised: QuantisedWeights,
        sources: dict[int, Source],
        makers: Makers,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._precision = precision
        self._whole_adapters = whole_adapters
        self._quantised = quantised
        self._sources = sources
        self._makers = makers
        self._lent = _Lent()

    def units(self, specs: Sequence[UnitSpec], *, trains: bool = True) -> list[Unit]:
        """The units of all specs, and behind them the buckets of what is trained and stays whole. Collective.

        trains: False builds all as frozen.
        Whole weights are never gathered, so they need not follow the modules: neighbours share a bucket, that is one
        reduction and one publication for many adapters.
        """
        units: list[Unit] = []
        parts = parts_of(specs, self._precision, trains=trains)
        blueprints = apportion(parts, self._plan, self._whole_adapters, BUCKET_NBYTES)
        if self._engine.compresses:
            refuse_wide(blueprints, self._engine.ranks.shards.size)
        for divided in blueprints:
            blueprint = self._quantised.with_scales(divided, self._sources, self._makers, self._engine.ranks)
            frozen = self._frozen(blueprint) if blueprint.frozen else None
            trained = self._trained(blueprint) if blueprint.trainable else None
            unit = Unit(blueprint.name, list(blueprint.entries), blueprint.plan, self._engine, frozen, trained)
            unit.in_turn = blueprint.in_turn
            if unit.leaves:  # before the next one is built: the device never holds more than one whole unit
                unit.release()
            units.append(unit)
        self._sources.clear()
        if self._engine.borrows and self._engine.ranks.rank == 0:
            self._lent.say()
        if self._engine.compresses and self._engine.ranks.rank == 0:
            say_what_travels([part for unit in units for part in unit.parts])
        return units

    @torch.no_grad()
    def thaw(self, units: Sequence[Unit], parameters: Sequence[Parameter]) -> list[Unit]:
        """New units for frozen `parameters` of `units`, which are trained from now on. Collective; between passes only.

        The units that held them hold the others. A parameter is thawed with the value that it computes with.
        """
        wanted = {id(parameter) for parameter in parameters}
        parts: list[Part] = []
        losing: list[tuple[Unit, list[Member]]] = []
        for unit in units:
            members = unit.frozen.members if unit.frozen is not None else ()
            thawed = [member for member in members if id(member.parameter) in wanted]
            if thawed:
                rest = [member for member in members if id(member.parameter) not in wanted]
                parts.append(Part(unit.name, tuple(unit.entries), unit.in_turn, tuple(rest), tuple(thawed)))
                losing.append((unit, rest))
        for unit, _ in losing:
            if unit.leaves:
                unit.gather()
                unit.arrive()
        if self._engine.peers is not None:
            self._engine.peers.meet()  # a shard that goes below may be the next one's memory, and others still copy from it
        made: list[Unit] = []
        for blueprint in apportion(parts, self._plan, self._whole_adapters, BUCKET_NBYTES):
            if blueprint.trainable:
                trained = self._trained(blueprint)
                unit = Unit(blueprint.name, list(blueprint.entries), blueprint.plan, self._engine, None, trained)
                unit.in_turn = blueprint.in_turn
                made.append(unit)
        for unit, rest in losing:
            left = Blueprint(unit.name, tuple(unit.entries), unit.plan, tuple(rest))
            unit.change_frozen(self._frozen(left) if rest else None)
        for unit in (*made, *(unit for unit, _ in losing)):
            if unit.leaves:
                unit.release()
        return made

    def _frozen(self, blueprint: Blueprint) -> FlatBuffer:
        members, plan, ranks = blueprint.frozen, blueprint.plan, self._engine.ranks
        layout = blueprint.frozen_layout(ranks.shards.size)
        store = self._engine.stores.of(plan.frozen.tier, "param")
        slab, without = None, None
        if self._engine.borrows and isinstance(store, NvmeStore):
            slab, without = self._borrowed(members, layout, store)
        buffer = FlatBuffer(
            members,
            layout,
            dtype=torch.uint8,
            placement=plan.frozen,
            store=store,
            rank=ranks.shards.rank,
            device=ranks.device,
            peers=self._engine.peers,
            packing=packing_of(members, layout, 1) if self._engine.compresses else None,
            slab=slab,
        )
        if self._have_sources(members):
            fill_region(buffer, self._sources, self._makers, ranks, buffer.own_slice, without)
        else:
            if ranks.rank == 0:
                buffer.fill()
            ranks.broadcast(buffer.whole)
        self._settle_in(buffer)
        self._quantised.settle(members)
        return buffer

    def _borrowed(
        self, members: Sequence[Member], layout: Layout, store: NvmeStore
    ) -> tuple[BorrowedSlab | None, frozenset[int] | None]:
        """A slab that reads this rank's shard in the model's own files, and which members no file has. Collective.

        Two None unless every rank can have one.
        """
        ranks = self._engine.ranks

        def made() -> tuple[BorrowedSlab, frozenset[int]] | str:
            rank = ranks.shards.rank if layout.world_size > 1 else 0
            found = lying(members, layout, rank, self._sources, self._makers)
            if isinstance(found, str):
                return found
            return BorrowedSlab(store, layout.shard_numel, found.loans, found.kept, members[0].name), found.without

        found = ranks.together(made)
        self._lent.units += 1
        if ranks.any_of([isinstance(found, str)])[0] or isinstance(found, str):
            self._lent.copied.append(found if isinstance(found, str) else members[0].name)
            return None, None
        return found

    def _trained(self, blueprint: Blueprint) -> Trained:
        members, dtype, plan = blueprint.trainable, blueprint.dtype, blueprint.plan
        ranks, stores = self._engine.ranks, self._engine.stores
        region = blueprint.region(ranks.shards.size, ranks.owners.rank)
        buffer = FlatBuffer(
            members,
            region.layout,
            dtype=dtype,
            placement=plan.parameter,
            store=stores.of(plan.parameter.tier, "param"),
            rank=ranks.shards.rank,
            device=ranks.device,
            # Offloaded states step chunk by chunk while other units are gathered: no fence fits in between.
            peers=self._engine.peers if plan.optimizer.tier is Tier.GPU else None,
            changes=True,
            packing=packing_of(members, region.layout, dtype.itemsize) if self._engine.compresses else None,
        )
        # The masters start from the user's own values, not from their 16-bit rounding.
        n, master_dtype, shares = region.numel, blueprint.master_dtype, blueprint.master_is_weight
        if self._have_sources(members):
            shard = torch.zeros(buffer.layout.shard_numel, dtype=master_dtype, device=ranks.device)
            fill_region(buffer, self._sources, self._makers, ranks, shard)
            buffer.own_slice.copy_(shard)
            own = shard[region.in_shard]
            if plan.optimizer.sharded and not plan.parameter.sharded:
                ranks.shards.all_gather(buffer.whole, buffer.own_slice)
        else:
            values = torch.zeros(buffer.layout.numel, dtype=master_dtype, device=ranks.device)
            if ranks.rank == 0:
                for index, member in enumerate(members):
                    buffer.view(index, values).copy_(member.parameter.detach())
            ranks.broadcast(values)
            buffer.whole.copy_(values)
            own = values[region.interval]
        self._settle_in(buffer)
        tier = plan.optimizer.tier
        if not shares:
            master = stores.of(tier, "optimizer").allocate(n, master_dtype, f"{members[0].name}.master")
            self._engine.put_to_rest(own, master)
        elif buffer.slab is not None:
            master = buffer.slab
        else:
            master = Slab(None, tier, n, master_dtype, buffer.whole[region.interval])
        return Trained(buffer, region, plan, self._engine, master, shares)

    def _have_sources(self, members: Sequence[Member]) -> bool:
        return any(id(member.parameter) in self._sources for member in members)

    def _settle_in(self, buffer: FlatBuffer) -> None:
        """Put this rank's shard to rest and make the parameters views; the whole is still there."""
        if isinstance(buffer.slab, BorrowedSlab):
            buffer.slab.keep(buffer.own_slice)
        elif buffer.slab is not None:
            self._engine.put_to_rest(buffer.own_slice, buffer.slab)
        buffer.adopt()


@dataclass
class _Lent:
    """Of how many units on a drive the weights were looked for in the model's own files; a weight of each that was copied."""

    units: int = 0
    copied: list[str] = field(default_factory=list)

    def say(self) -> None:
        if self.copied:
            logger.warning(
                "offload_param_source: model_files: of %d unit(s) of frozen weights %d were copied to the drive, the first for "
                "%s: only weights that a model built without memory (zero3_init_flag, accelerator.init()) has from safetensors "
                "files, unchanged and in the dtype that computes, are read there.",
                self.units,
                len(self.copied),
                self.copied[0],
            )
        elif not self.units:
            logger.warning("offload_param_source: model_files: has no effect: no frozen weight rests on a drive.")


def agree_on_shapes(specs: Sequence[UnitSpec], ranks: Ranks) -> None:
    """Raise PrepareError on every rank if the ranks have not built the same model. Collective."""
    mine = [
        (n, tuple(p.shape), str(p.dtype), p.requires_grad, p.is_meta) for s in specs for n, p in s.parameters.items()
    ]
    theirs = ranks.broadcast_object(mine)

    def check() -> None:
        if mine == theirs:
            return
        differing = next((m[0] for m, t in zip(mine, theirs, strict=False) if m != t), "the number of parameters")
        raise PrepareError(
            f"the model of rank {ranks.rank} differs from rank 0's at {differing}: name, shape, dtype, "
            "requires_grad, or having memory. Build the same model in the same way on every rank."
        )

    ranks.together(check)
