"""What the units of one model share: the ranks, the lanes, a store for each tier, and what is in flight."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..config.offloads import Directories, directories_of, no_directory, states_stay
from ..config.sections import EngineConfig
from ..errors import StoreError, WriteError
from ..offload.host import HostStore
from ..offload.peers import PeerMemory
from ..offload.store import Arrival, Done, MemoryStore, Slab, Store
from ..offload.tiers import ON_DISK
from ..plan.plan import Placement, Plan, Tier
from ..plan.state_dtypes import StateDtype
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks
from .compressed import compresses
from .norms import Norms

log = logging.getLogger("shardwise")

Kind = Literal["param", "optimizer"]


def directories(plan: Plan, given: Mapping[Kind, Directories]) -> dict[tuple[Tier, Kind], tuple[str, ...]]:
    """The directories that the plan needs, of those given. Raises StoreError if one is missing."""
    found: dict[tuple[Tier, Kind], tuple[str, ...]] = {}
    rests: tuple[tuple[Kind, Placement], ...] = (
        ("param", plan.frozen),
        ("param", plan.parameter),
        ("optimizer", plan.optimizer),
    )
    for kind, placement in rests:
        if placement.tier.on_disk:
            found[placement.tier, kind] = directories_of(given.get(kind))
            if not found[placement.tier, kind]:
                raise StoreError(f"offload_{kind}_nvme_path {no_directory(placement.tier)}.")
    return found


@dataclass(frozen=True)
class Stores:
    """Where shards rest. on_disk: by what lies there too, because weights and states may have a directory each."""

    gpu: MemoryStore
    cpu: HostStore
    on_disk: Mapping[tuple[Tier, Kind], Store]

    @classmethod
    def make(cls, lanes: Lanes, rank: int, paths: Mapping[tuple[Tier, Kind], tuple[str, ...]]) -> Stores:
        """paths: see `directories`; what has the same ones shares a store. Raises StoreError if one cannot be used."""
        places = dict.fromkeys((tier, several) for (tier, _), several in paths.items())
        made = {(tier, several): ON_DISK[tier].open(several, lanes, rank) for tier, several in places}
        return cls(MemoryStore(lanes), HostStore(lanes), {at: made[at[0], several] for at, several in paths.items()})

    def of(self, tier: Tier, kind: Kind) -> Store:
        if tier.on_disk:
            return self.on_disk[tier, kind]
        return self.gpu if tier is Tier.GPU else self.cpu

    @property
    def drives(self) -> tuple[Store, ...]:
        return tuple(dict.fromkeys(self.on_disk.values()))

    @property
    def uses_disk(self) -> bool:
        return bool(self.on_disk)

    @property
    def staging_nbytes(self) -> int:
        """Bytes of host memory that transfers go through, besides what rests."""
        return self.cpu.staging_nbytes + sum(s.staging_nbytes for s in self.drives)

    def drain(self) -> None:
        """Everything that was put is where it rests. Raises StoreError for the first write that failed."""
        self.cpu.drain()
        for store in self.drives:
            store.drain()

    def close(self) -> None:
        self.cpu.close()
        for store in self.drives:
            store.close()


def say_where_states_stay(state_dtype: StateDtype, plan: Plan, ranks: Ranks) -> None:
    """Rank 0 says why `optimizer_state_dtype` has no effect, where it has none."""
    tier = plan.optimizer.tier
    if state_dtype == "fp32" or ranks.rank != 0 or tier.visits(cuda=ranks.device.type == "cuda"):
        return
    log.warning("%s", states_stay("none" if tier is Tier.GPU else str(tier)))


@dataclass
class Share:
    """What the gradients of the coming backwards are multiplied by, in the reduce dtype, when they leave the parameters.

    alone: each rank keeps its own gradients, and trains a model of its own; see `alone.py`. apart: it has done so, so that
           optimizer states and averages are each rank's own, of weights that perhaps no other one has stepped.
    """

    value: float = 1.0
    alone: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Engine:
    """What every unit of a model shares.

    reduce_dtype: gradients are summed in it. norms: of single gradients, for scripts. doubts: about what scripts have written.
    peers: where shards rest that copy engines gather, or None. share: of micro-batches, and of ranks.
    compresses: gathers in passes send 8-bit codes of 16-bit weights. state_dtype: in which moments rest off the device.
    borrows: frozen weights on a drive are read in the files that they were loaded from. told: states of which it was said
    that they rest as they are.
    """

    ranks: Ranks
    lanes: Lanes
    stores: Stores
    reduce_dtype: torch.dtype
    reductions: ReductionsInFlight
    faults: Faults
    norms: Norms
    doubts: Doubts
    peers: PeerMemory | None = None
    share: Share = field(default_factory=Share)
    compresses: bool = False
    state_dtype: StateDtype = "fp32"
    borrows: bool = False
    told: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        plan: Plan,
        ranks: Ranks,
        reduce_dtype: torch.dtype,
        *,
        nvme_paths: Mapping[Kind, Directories],
        options: EngineConfig,
        serial: bool,
    ) -> Engine:
        """What the plan needs, the same on every rank. serial: everything on one lane. Collective; raises StoreError."""
        compressed = compresses(options.gather_dtype, plan, ranks)
        say_where_states_stay(options.optimizer_state_dtype, plan, ranks)
        lanes = Lanes(ranks.device, serial=serial)
        stores = ranks.together(lambda: Stores.make(lanes, ranks.rank, directories(plan, nvme_paths)))
        sharded = plan.frozen.sharded or plan.parameter.sharded
        peers = PeerMemory.open(ranks, lanes, options.gather_with) if sharded else None
        reductions, faults = ReductionsInFlight(lanes), Faults(ranks, stores.drives)
        shared = (reduce_dtype, reductions, faults, Norms(ranks), Doubts(), peers)
        return cls(
            ranks,
            lanes,
            stores,
            *shared,
            compresses=compressed,
            state_dtype=options.optimizer_state_dtype,
            borrows=options.offload_param_source == "model_files",
        )

    def put_to_rest(self, values: Tensor, slab: Slab, step: Tensor | None = None) -> None:
        """Put a device tensor to rest; its memory may go afterwards. A drive's error waits for the ranks to agree.

        step: as `Slab.packed` takes it.
        """
        lanes = self.lanes
        parts = slab.packed(values, 0, step)
        lanes.down.wait(lanes.mark_compute())
        try:
            lanes.compute_waits(slab.put_parts(parts))
        except StoreError as error:
            self.faults.note(error)

    def look_at(self, slab: Slab) -> Tensor:
        """What rests in `slab`, on the device; the computation waits for it. A drive's error waits for the ranks to agree."""
        if slab.tier is Tier.GPU:
            self.lanes.join()
            return slab.tensor
        lanes = self.lanes
        parts = slab.room(slab.numel, self.ranks.device)
        lanes.up.wait(lanes.mark_compute())
        self.land(slab.fetch_parts(parts), lanes.compute_waits)
        return slab.unpacked(parts, slab.numel)

    def land(self, arrivals: Iterable[Arrival], waits: Callable[[torch.Event | None], None]) -> bool:
        """Have a lane wait for what is on its way up: `waits` is its. A drive's error waits for the ranks to agree.

        False if a drive has failed. Then too nothing lands any more: where it would have landed may become other memory.
        """
        errors = []
        for arrival in arrivals:
            try:
                waits(arrival.enqueued())
            except StoreError as error:
                errors.append(error)
        if errors:
            waits(self.lanes.up.mark())  # of a part that failed some blocks may have come
            self.faults.note(errors[0])
        return not errors

    def fetched(self, slab: Slab) -> Tensor:
        """What rests in `slab`, on the device; the computation waits for it. Collective where a drive is used."""
        out = self.look_at(slab)
        if slab.tier is not Tier.GPU:
            self.faults.agree()
        return out

    def drain(self) -> None:
        """What was put is where it rests. Collective where a drive is used; raises StoreError."""
        try:
            self.stores.drain()
        except StoreError as error:
            self.faults.note(error)
        self.faults.agree()

    def synchronize(self) -> None:
        """The host waits for everything that was enqueued on the device, and for what goes on in host memory."""
        self.lanes.synchronize()
        self.stores.cpu.drain()

    def rest(self) -> None:
        """`meet` and `drain`. Collective; raises StoreError."""
        self.meet()
        self.drain()

    def meet(self) -> None:
        """`synchronize`, and where ranks read each other's shards, wait until all have. Collective."""
        self.synchronize()
        if self.peers is not None:
            self.peers.meet()


class Doubts:
    """Weights that a script may have written past the engine: the device finds out, the host reads of it at the next step."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._flags: list[Tensor] = []

    def add(self, name: str, written: Tensor) -> None:
        """written: a flag on the device."""
        self._names.append(name)
        self._flags.append(written)

    def settle(self) -> None:
        """Raises WriteError for a weight that was written. Waits for the device if there are any."""
        names, flags = self._names, self._flags
        if names:
            self._names, self._flags = [], []
            for name, written in zip(names, torch.stack(flags).tolist(), strict=True):
                if written:
                    raise WriteError(
                        f"{name} was written through `data` inside of a forward or a backward, and is gathered anew for each: "
                        "the write was lost. Write it in place under torch.no_grad(), or in `with shardwise.gathered(model):`."
                    )


@dataclass
class Faults:
    """Errors of this rank's `drives`, kept until the ranks can agree on them.

    A rank that raised in the middle of a pass would leave the others waiting in a collective. So a rank that could not
    read takes part in the gathers, with wrong bytes, and `agree` raises on every rank before a result of the pass is used.
    What is raised is what failed first: a read that was noted may follow from a write that nobody has waited for.
    """

    ranks: Ranks
    drives: Sequence[Store] = ()
    errors: list[StoreError] = field(default_factory=list)

    def note(self, error: StoreError) -> None:
        self.errors.append(error)

    def agree(self) -> None:
        """Collective where a drive is used. Raises StoreError, or RankError for another rank's."""
        found = [fault for drive in self.drives if (fault := drive.take_fault()) is not None] + self.errors
        self.errors.clear()
        if self.drives:
            self.ranks.agree(found[0] if found else None)
        elif found:  # host memory fails with its device, and takes no message of each step
            raise found[0]


class ReductionsInFlight:
    """The scratch memory of reductions that the device has not finished, oldest first, over all units of a model.

    The host enqueues a whole backward before the device has run it, so it cannot wait for a reduction to end. Instead the
    computation waits, on the device, for the oldest ones when all together would take more than BUDGET bytes: from then on
    their memory may be written again. Adapters stay far below that, and nothing ever waits. Where what is reduced is added in
    host memory, the host waits too, until the device has been told of the copies: never in a backward that is not `bounded`.
    """

    BUDGET = 256 << 20

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._held: list[tuple[Arrival, Tensor]] = []
        # False keeps all of them to the end of the backward: see Learned.agree_on_window.
        self.bounded = True

    @property
    def nbytes(self) -> int:
        return sum(scratch.nbytes for _, scratch in self._held)

    def make_room(self, nbytes: int) -> None:
        """Before another reduction takes `nbytes` of scratch memory."""
        while self.bounded and self._held and self.nbytes + nbytes > self.BUDGET:
            self._drop_oldest()

    def add(self, arrival: Arrival, scratch: Tensor) -> None:
        """arrival: of what is read from `scratch` last."""
        over = isinstance(arrival, Done) and arrival.event is None  # on a CPU: the memory may go at once
        if not over:
            self._held.append((arrival, scratch))

    def clear(self) -> None:
        while self._held:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        arrival, _ = self._held.pop(0)
        try:
            event = arrival.enqueued()
        except StoreError:  # the step tells of it, see `HostStore.drain`: the other ranks are in this backward
            event = self._lanes.down.mark()  # of what failed some blocks may be on their way
        self._lanes.compute_waits(event)
