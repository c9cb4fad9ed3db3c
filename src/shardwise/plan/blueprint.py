"""How a model is divided under a plan, and how many bytes each rank then holds: arithmetic on names and shapes.

A Blueprint is what will be one unit: some frozen weights, some trained ones of one dtype, and the plan that holds for it.
The parameters may be on the meta device, for nothing of them is read. Its bytes at rest, per rank:

    frozen      B = layout in bytes                          B / world if sharded, else B
    parameter   N numbers of c bytes                         c N / world if sharded, else c N
    gradient    m bytes each (4, or 8 in double precision)   m N / world if the optimizer is sharded, else m N
    optimizer   master: as gradient, or nothing where it is the weight itself (c = m, on one tier). Its states are the
                optimizer's own: see `estimate/states.py`

Where states lie over all ranks and weights in groups (`Plan.parts`), gradient and optimizer are divided by as many more.

The layouts are those of `layout.py`, the units those of `units.py`, the placements those of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import Parameter

from .compressed import Packing
from .layout import ALIGNMENT, Layout, Region
from .plan import WHOLE_ADAPTER_SHARE, Plan, Tier
from .precision import Precision
from .units import ROOT, UnitSpec

Role = Literal["frozen", "parameter", "gradient", "optimizer"]
Ledger = dict[tuple[Role, Tier], int]


@dataclass(frozen=True)
class Member:
    """A parameter of a buffer: its name in the model, the user's own object, the dtype it computes in here."""

    name: str
    parameter: Parameter
    dtype: torch.dtype


@dataclass(frozen=True)
class Blueprint:
    """name, entries, in_turn: those of the unit; a bucket of whole weights has no entries.

    trainable: members of one dtype.
    """

    name: str
    entries: tuple[nn.Module, ...]
    plan: Plan
    frozen: tuple[Member, ...] = ()
    trainable: tuple[Member, ...] = ()
    in_turn: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """In which the trained weights compute; `trainable` must not be empty."""
        return self.trainable[0].dtype

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def master_is_weight(self) -> bool:
        plan = self.plan
        a_part = plan.parts > 1 and plan.parameter.sharded  # of what rests of the weight
        return self.master_dtype == self.dtype and plan.parameter.tier is plan.optimizer.tier and not a_part

    def frozen_layout(self, world_size: int) -> Layout:
        """In bytes."""
        tensors = ((m.name, tuple(m.parameter.shape), m.parameter.numel() * m.dtype.itemsize) for m in self.frozen)
        return Layout.pack(tensors, world_size if self.plan.frozen.sharded else 1, ALIGNMENT)

    def trainable_layout(self, world_size: int) -> Layout:
        """In numbers of `dtype`."""
        tensors = ((m.name, tuple(m.parameter.shape), m.parameter.numel()) for m in self.trainable)
        alignment, sharded = ALIGNMENT // self.dtype.itemsize, self.plan.optimizer.sharded
        return Layout.pack(tensors, world_size if sharded else 1, alignment, self.plan.parts if sharded else 1)

    def gathered_nbytes(self, world_size: int) -> int:
        """What its weights take on the device while they are whole, besides their shards; 0 if they never leave."""
        nbytes = 0
        if self.frozen and self.plan.frozen.leaves(world_size):
            nbytes += self.frozen_layout(world_size).numel
        if self.trainable and self.plan.parameter.leaves(world_size):
            nbytes += self.trainable_layout(world_size).numel * self.dtype.itemsize
        return nbytes

    def packings(self, world_size: int) -> list[Packing]:
        """How its weights travel where they are gathered as 8-bit codes; nothing of what travels exactly, or never leaves."""
        found = []
        if self.frozen and self.plan.frozen.leaves(world_size):
            found.append(packing_of(self.frozen, self.frozen_layout(world_size), 1))
        if self.trainable and self.plan.parameter.leaves(world_size):
            layout = self.trainable_layout(world_size)
            found.append(packing_of(self.trainable, layout, self.dtype.itemsize))
        return [packing for packing in found if packing is not None]

    def region(self, world_size: int, rank: int) -> Region:
        """The part of its trained weights that the optimizer of `rank` works on. rank: among those that divide the masters."""
        if not self.plan.optimizer.sharded:
            return Region(self.trainable_layout(world_size), None)
        return Region(self.trainable_layout(world_size), rank, self.plan.parts)


def packing_of(members: Sequence[Member], layout: Layout, itemsize: int) -> Packing | None:
    """How a buffer of these members travels as 8-bit codes: None unless all compute in bf16, or all in fp16.

    itemsize: bytes of an element of `layout`.
    """
    dtypes = {member.dtype for member in members}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16}:
        return None
    return Packing(layout.shard_numel * itemsize // 2, layout.world_size)


@dataclass(frozen=True)
class Part:
    """One module group before it is divided: the weights that are frozen, and those that are trained, of any dtypes."""

    name: str
    entries: tuple[nn.Module, ...]
    in_turn: bool
    frozen: tuple[Member, ...]
    trained: tuple[Member, ...]


def divide(
    specs: Sequence[UnitSpec],
    plan: Plan,
    precision: Precision,
    *,
    whole_adapters: bool | Literal["auto"] = "auto",
    bucket_nbytes: int,
) -> list[Blueprint]:
    """The blueprints of all specs in their order; trained weights that stay whole share buckets of `bucket_nbytes`.

    whole_adapters: as ShardedModel takes it.
    """
    return apportion(parts_of(specs, precision), plan, whole_adapters, bucket_nbytes)


def parts_of(specs: Sequence[UnitSpec], precision: Precision, *, trains: bool = True) -> list[Part]:
    """The specs with their parameters told apart, each with the dtype that it computes in. trains: False: all are frozen."""
    parts = []
    for spec in specs:
        members = [Member(name, p, precision.compute_dtype(p)) for name, p in spec.parameters.items()]
        trained = tuple(m for m in members if trains and m.parameter.requires_grad)
        frozen = tuple(m for m in members if m not in trained)
        parts.append(Part(spec.name, tuple(spec.entries), spec.in_turn, frozen, trained))
    return parts


def apportion(
    parts: Sequence[Part], plan: Plan, whole_adapters: bool | Literal["auto"], bucket_nbytes: int
) -> list[Blueprint]:
    """`divide` of parts."""
    blueprints: list[Blueprint] = []
    bucket: list[Member] = []

    def close_bucket() -> None:
        if bucket:
            whole = plan.with_whole_parameters()
            blueprints.append(Blueprint(f"bucket:{bucket[0].name}", (), whole, trainable=tuple(bucket)))
            bucket.clear()

    for part in parts:
        trainable: dict[torch.dtype, list[Member]] = {}
        for member in part.trained:
            trainable.setdefault(member.dtype, []).append(member)
        mine = _plan_of(part.frozen, part.trained, plan, whole_adapters)
        own = list(trainable.values()) if mine.parameter.sharded else []
        if part.frozen or own:
            first = tuple(own[0]) if own else ()
            blueprints.append(Blueprint(part.name, part.entries, mine, part.frozen, first, part.in_turn))
        blueprints += [
            Blueprint(part.name, part.entries, mine, trainable=tuple(more), in_turn=part.in_turn) for more in own[1:]
        ]
        for dtype, members in trainable.items() if not mine.parameter.sharded else ():
            if bucket and (bucket[0].dtype != dtype or _nbytes(bucket) + _nbytes(members) > bucket_nbytes):
                close_bucket()
            bucket += members
    close_bucket()
    return blueprints


def at_rest(blueprints: Sequence[Blueprint], world_size: int, *, gradients: bool = False) -> Ledger:
    """Bytes on each rank by role and tier, as `ShardedModel.ledger` counts them: all ranks hold equally much.

    gradients: count them as they rest between a backward and its step; else as if there were none.
    """
    found: Ledger = {}
    for blueprint in blueprints:
        plan = blueprint.plan
        if blueprint.frozen:
            layout = blueprint.frozen_layout(world_size)
            _add(found, "frozen", plan.frozen.tier, layout.shard_numel if plan.frozen.sharded else layout.numel)
        if blueprint.trainable:
            layout = blueprint.trainable_layout(world_size)
            kept = layout.shard_numel if plan.parameter.sharded else layout.numel
            _add(found, "parameter", plan.parameter.tier, kept * blueprint.dtype.itemsize)
            master = blueprint.region(world_size, 0).numel * blueprint.master_dtype.itemsize
            # Offloaded, it waits for the step in host memory, also where the optimizer rests on a drive.
            _add(
                found, "gradient", min(plan.optimizer.tier, Tier.CPU, key=list(Tier).index), master if gradients else 0
            )
            _add(found, "optimizer", plan.optimizer.tier, 0 if blueprint.master_is_weight else master)
    return found


def padding(blueprints: Sequence[Blueprint], world_size: int) -> float:
    """Of the bytes of all buffers, the part by which they are more than their tensors'."""
    held = tensors = 0
    for blueprint in blueprints:
        if blueprint.frozen:
            held += blueprint.frozen_layout(world_size).numel
        if blueprint.trainable:
            held += blueprint.trainable_layout(world_size).numel * blueprint.dtype.itemsize
        tensors += _nbytes(blueprint.frozen) + _nbytes(blueprint.trainable)
    return held / tensors - 1 if tensors else 0.0


def gathered_at_once(
    blueprints: Sequence[Blueprint], model: nn.Module, world_size: int, prefetch: int, *, compressed: bool = False
) -> int:
    """The most bytes of whole weights on the device at one time in a training step, besides all shards.

    The root unit stays whole during a pass. Of the others there are the one in use and `prefetch` more, in the order of
    the modules, and one more on its way where shards rest off the device; a unit that has been used is released before the
    next one is gathered. compressed: gathers send 8-bit codes. Those of one gather are there at one time.
    """
    ahead = prefetch + any(t is not Tier.GPU for p in blueprints for t in (p.plan.frozen.tier, p.plan.parameter.tier))
    order = {id(module): index for index, module in enumerate(model.modules())}
    sizes = [blueprint.gathered_nbytes(world_size) for blueprint in blueprints]
    root = sum(size for blueprint, size in zip(blueprints, sizes, strict=True) if blueprint.name == ROOT)
    users: dict[int, set[int]] = {}
    for index, blueprint in enumerate(blueprints):
        if sizes[index] and blueprint.name != ROOT:
            for entry in blueprint.entries:
                users.setdefault(order[id(entry)], set()).add(index)
    sequence = list(_distinct([users[place] for place in sorted(users)]))
    windows = (set().union(*sequence[at : at + 1 + ahead]) for at in range(len(sequence)))
    most = root + max((sum(sizes[i] for i in window) for window in windows), default=0)
    return most + max(
        (codes_nbytes(blueprint.packings(world_size)) for blueprint in blueprints if compressed), default=0
    )


def codes_nbytes(packings: Sequence[Packing]) -> int:
    """What one gather of a unit takes on the device beside the weights: every rank's codes, and what makes this rank's."""
    return sum(p.nbytes for p in packings) + max((p.staging_nbytes for p in packings), default=0)


def _distinct(sets: Sequence[set[int]]) -> Iterator[set[int]]:
    """Without repeats of the one before: blocks that share a unit need it once."""
    for index, found in enumerate(sets):
        if index == 0 or found != sets[index - 1]:
            yield found


def _plan_of(
    frozen: Sequence[Member], trainable: Sequence[Member], plan: Plan, whole_adapters: bool | Literal["auto"]
) -> Plan:
    if not plan.parameter.sharded or whole_adapters is False:
        return plan
    if whole_adapters is True or _nbytes(trainable) <= _nbytes(frozen) * WHOLE_ADAPTER_SHARE:
        return plan.with_whole_parameters()
    return plan


def _nbytes(members: Sequence[Member]) -> int:
    return sum(m.parameter.numel() * m.dtype.itemsize for m in members)


def _add(found: Ledger, role: Role, tier: Tier, nbytes: int) -> None:
    if nbytes:
        found[role, tier] = found.get((role, tier), 0) + nbytes
