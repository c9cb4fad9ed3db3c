"""A prepared model: the user's own object, with its weights in units and its passes under a schedule.

`ShardedModel` takes a model apart into units, moves every weight into flat buffers with rank 0's values, and hooks the
model up. It hangs nothing on the model: `find_sharded` looks it up in a side table by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import PrepareError, StoreError
from ..offload.store import Slab
from .checks import check_model, paths_of
from .collectives import Ranks
from .engine import Engine, Faults, Kind, ReductionsInFlight, Stores
from .flat import FlatBuffer, Member
from .generation import room_for_weights, units_that_fit
from .gradients import Gradients
from .hooks import Hooks
from .peers import GatherWith, PeerMemory
from .plan import Plan, Tier
from .portions import Role, divide
from .precision import Precision
from .quantised import QuantisedWeights
from .schedule import Schedule
from .sources import Makers, Source, Sources, choose_makers, fill_region
from .streams import Lanes
from .unit import Unit
from .units import UnitSpec, find_units
from .writing import weights_before, write_back

# Small blocks share a unit of at most this on a GPU: to gather and release one costs the host some 0.3 ms, in which NVLink
# moves half of this. On a CPU there is no lane to hide a gather behind, and nothing is won.
UNIT_NBYTES = 160 << 20
# Trained weights that stay whole are reduced in buckets of at most this; the size that DDP found to hide best.
BUCKET_NBYTES = 25 << 20

# id(model) -> its ShardedModel, which the hooks on the model keep alive: when the model goes, both go.
_sharded: WeakValueDictionary[int, ShardedModel] = WeakValueDictionary()


def find_sharded(model: nn.Module) -> ShardedModel | None:
    """The ShardedModel that `model` was prepared as, or None."""
    found = _sharded.get(id(model))
    return found if found is not None and found.model is model else None


class ShardedModel:
    """A model under a plan.

    model:          stays the same object of the same class, and its parameters the same objects.
    plan:           placement of each role.
    precision:      the compute and reduce dtypes.
    prefetch:       units gathered ahead of the one in use.
    units:          block classes or module paths; None finds them.
    whole_adapters: True keeps trainable weights whole on the gpu at stage 3, False shards them, 'auto' keeps those that
                    are at most 1/16 of what is frozen in their unit.
    sources:        of the parameters on the meta device: each rank reads its own interval from them.
    gather_with:    "copy_engine" lets ranks of one machine copy shards from each other, "nccl" gathers with its kernels, "auto"
                    takes the first where it is possible.
    after_step:     called after every step of an optimizer on this model, on every rank.
    generation_memory_budget: bytes of gathered weights while generating; "auto" for what is free, None for the fewest.
    sync_gradients: set False before a backward whose gradients are accumulated only. accumulating: the last one was so.
    Collective: every rank calls it with an equally built model; rank 0's weights are everybody's afterwards.
    Raises PrepareError for a model that is prepared already, has weights on the meta device, or fits no unit name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: Plan,
        ranks: Ranks,
        precision: Precision,
        prefetch: int = 1,
        units: Sequence[str] | None = None,
        whole_adapters: bool | Literal["auto"] = "auto",
        sources: Sources | None = None,
        nvme_paths: Mapping[Kind, str] | None = None,
        gpu_memory_budget: int | str | None = None,
        generation_memory_budget: int | str | None = "auto",
        serial: bool = False,
        gather_with: GatherWith = "auto",
    ) -> None:
        self.model = model
        self.plan = plan
        self.ranks = ranks
        self.precision = precision
        self.sync_gradients = True
        self.accumulating = False
        self.gpu_memory_budget = gpu_memory_budget
        self.after_step: list[Callable[[], None]] = []
        self.generation_memory_budget = generation_memory_budget
        self._whole_adapters = whole_adapters
        self._sources: dict[int, Source] = dict(sources or {})
        self._makers: Makers = {}
        self._quantised = QuantisedWeights(model)

        def divided() -> list[UnitSpec]:
            check_model(model, [sharded.model for sharded in _sharded.values()], self._sources)
            return find_units(model, units, unit_nbytes=UNIT_NBYTES if ranks.device.type == "cuda" else 0)

        specs = ranks.together(divided)
        self._agree_on_shapes(specs)
        if self._sources:
            parameters = list({id(p): p for spec in specs for p in spec.parameters.values()}.values())
            self._makers = choose_makers(parameters, self._sources, self._quantised, ranks)

        lanes = Lanes(ranks.device, serial=serial)
        stores = ranks.together(lambda: Stores.make(lanes, ranks.rank, paths_of(plan, nvme_paths or {})))
        reductions = ReductionsInFlight(lanes)
        faults = Faults(ranks, stores.drives)
        peers = PeerMemory.open(ranks, lanes, gather_with) if plan.frozen.sharded or plan.parameter.sharded else None
        self._engine = Engine(ranks, lanes, stores, precision.reduce, reductions, faults, peers)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        with torch.no_grad():
            self._place_buffers()
            self.units = self._build(specs)
        self._sources = {}
        self.drain()
        if peers is not None:
            peers.meet()
        self.schedule = Schedule(self.units, ranks, lanes, reductions, prefetch, faults)
        dtype = precision.compute
        self._hooks = Hooks(
            self.schedule,
            root=model,
            boundary=lambda: self.sync_gradients,
            after=self._after_backward,
            compute_dtype=dtype,
        )
        _sharded[id(model)] = self

    @staticmethod
    def all() -> list[ShardedModel]:
        """Every sharded model of this process."""
        return list(_sharded.values())

    def holds(self, parameter: Parameter) -> bool:
        """Whether this object is one of the model's weights, as it was prepared; an empty one is in no buffer."""
        buffers = (b for unit in self.units for b in (unit.frozen, unit.trainable) if b is not None)
        return parameter.numel() == 0 or any(parameter is m.parameter for b in buffers for m in b.members)

    @property
    def engine(self) -> Engine:
        """Ranks, lanes and stores, for what steps and saves this model."""
        return self._engine

    # Construction.

    def _agree_on_shapes(self, specs: Sequence[UnitSpec]) -> None:
        mine = [
            (n, tuple(p.shape), str(p.dtype), p.requires_grad, p.is_meta)
            for s in specs
            for n, p in s.parameters.items()
        ]
        theirs = self.ranks.broadcast_object(mine)
        error = None
        if mine != theirs:
            differing = next((m[0] for m, t in zip(mine, theirs, strict=False) if m != t), "the number of parameters")
            error = PrepareError(
                f"the model of rank {self.ranks.rank} differs from rank 0's at {differing}: name, shape, dtype, "
                "requires_grad, or having memory. Build the same model in the same way on every rank."
            )
        self.ranks.agree(error)

    def _place_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    placed = buffer.to(self.ranks.device)
                    if self.ranks.world_size > 1 and placed.numel():
                        placed = placed.contiguous()
                        self.ranks.broadcast(placed)
                    module._buffers[name] = placed

    def _build(self, specs: Sequence[UnitSpec]) -> list[Unit]:
        """The units of all specs, and behind them the buckets of what is trained and stays whole.

        Whole weights are never gathered, so they need not follow the modules: neighbours share a bucket, that is one
        reduction and one publication for many adapters.
        """
        units: list[Unit] = []
        portions = divide(
            specs, self.plan, self.precision, whole_adapters=self._whole_adapters, bucket_nbytes=BUCKET_NBYTES
        )
        for divided in portions:
            portion = self._quantised.with_scales(divided, self._sources, self._makers, self.ranks)
            frozen = self._frozen_buffer(portion.frozen, portion.plan) if portion.frozen else None
            trainable, gradients = None, None
            if portion.trainable:
                trainable, gradients = self._trainable_buffer(portion.trainable, portion.dtype, portion.plan)
            entries = list(portion.entries)
            unit = Unit(portion.name, entries, portion.plan, self._engine, frozen, trainable, gradients)
            unit.in_turn = portion.in_turn
            if unit.leaves:  # before the next one is built: the device never holds more than one whole unit
                unit.release()
            units.append(unit)
        return units

    def _frozen_buffer(self, members: Sequence[Member], plan: Plan) -> FlatBuffer:
        ranks = self.ranks
        buffer = FlatBuffer(
            members,
            dtype=torch.uint8,
            placement=plan.frozen,
            store=self._engine.stores.of(plan.frozen.tier, "param"),
            rank=ranks.rank,
            world_size=ranks.world_size if plan.frozen.sharded else 1,
            device=ranks.device,
            peers=self._engine.peers,
        )
        if self._have_sources(members):
            fill_region(buffer, self._sources, self._makers, ranks, buffer.own_slice)
        else:
            if ranks.rank == 0:
                buffer.fill()
            ranks.broadcast(buffer.whole)
        self._settle_in(buffer)
        self._quantised.settle(members)
        return buffer

    def _trainable_buffer(
        self, members: Sequence[Member], dtype: torch.dtype, plan: Plan
    ) -> tuple[FlatBuffer, Gradients]:
        ranks, stores = self.ranks, self._engine.stores
        buffer = FlatBuffer(
            members,
            dtype=dtype,
            placement=plan.parameter,
            store=stores.of(plan.parameter.tier, "param"),
            rank=ranks.rank,
            world_size=ranks.world_size if plan.optimizer.sharded else 1,
            device=ranks.device,
            # Offloaded states step chunk by chunk while other units are gathered: no fence fits in between.
            peers=self._engine.peers if plan.optimizer.tier is Tier.GPU else None,
            changes=True,
        )
        # The masters start from the user's own values, not from their 16-bit rounding.
        master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        n = buffer.layout.shard_numel if plan.optimizer.sharded else buffer.layout.numel
        if self._have_sources(members):
            own = torch.zeros(n, dtype=master_dtype, device=ranks.device)
            fill_region(buffer, self._sources, self._makers, ranks, own)
            buffer.own_slice.copy_(own)
            if plan.optimizer.sharded and not plan.parameter.sharded:
                ranks.all_gather(buffer.whole, buffer.own_slice)
        else:
            values = torch.zeros(buffer.layout.numel, dtype=master_dtype, device=ranks.device)
            if ranks.rank == 0:
                for index, member in enumerate(members):
                    buffer.view(index, values).copy_(member.parameter.data)
            ranks.broadcast(values)
            buffer.whole.copy_(values)
            own = values[buffer.rank * n : (buffer.rank + 1) * n]
        self._settle_in(buffer)
        tier = plan.optimizer.tier
        shares = dtype == master_dtype and plan.parameter.tier is tier
        if not shares:
            master = stores.of(tier, "optimizer").allocate(n, master_dtype, f"{members[0].name}.master")
            self.put_to_rest(own, master)
        elif buffer.slab is not None:
            master = buffer.slab
        else:
            master = Slab(None, tier, n, master_dtype, buffer.own_slice if plan.optimizer.sharded else buffer.whole)
        return buffer, Gradients(buffer, plan, self._engine, master, shares)

    def _have_sources(self, members: Sequence[Member]) -> bool:
        return any(id(member.parameter) in self._sources for member in members)

    def _settle_in(self, buffer: FlatBuffer) -> None:
        """Put this rank's shard to rest and make the parameters views; the whole is still there."""
        if buffer.slab is not None:
            self.put_to_rest(buffer.own_slice, buffer.slab)
        buffer.adopt()

    def put_to_rest(self, values: Tensor, slab: Slab) -> None:
        """Put a device tensor to rest; its memory may go afterwards. A drive's error waits for the ranks to agree."""
        lanes = self._engine.lanes
        lanes.down.wait(lanes.mark_compute())
        try:
            lanes.compute_waits(slab.put(values).enqueued())
        except StoreError as error:
            self._engine.faults.note(error)

    def drain(self) -> None:
        """What was put is where it rests. Collective where a drive is used; raises StoreError."""
        try:
            self._engine.stores.drain()
        except StoreError as error:
            self._engine.faults.note(error)
        self._engine.faults.agree()

    # Training.

    def _after_backward(self, boundary: bool) -> None:
        self.accumulating = not boundary
        if not boundary:
            return
        self.schedule.reducing.settle()
        gradients = [unit.gradients for unit in self.units if unit.gradients is not None]
        # A parameter that no rank used keeps no gradient, as in one process: the optimizer must not touch it.
        used = self.ranks.any_of([flag for g in gradients for flag in g.used])
        start = 0
        for g in gradients:
            g.used = used[start : start + len(g.used)]
            start += len(g.used)

    def in_forward_order(self, units: Sequence[Unit]) -> list[Unit]:
        """`units` as the next forward will need them, as far as that is known; those without modules last."""
        place = {i: n for n, i in reversed(list(enumerate(self.schedule.forward_sequence)))}
        last = len(self.units)
        return sorted(units, key=lambda unit: place.get(self.schedule.index[id(unit)], last))

    def drop_gradients(self) -> None:
        """Forget every gradient since the last step, reduced or not."""
        for unit in self.units:
            if unit.gradients is not None:
                unit.gradients.drop()

    def meet(self) -> None:
        """`synchronize`, and where ranks read each other's shards, wait until all have. Collective."""
        self.synchronize()
        if self._engine.peers is not None:
            self._engine.peers.meet()

    def synchronize(self) -> None:
        """The host waits for everything that was enqueued on the device, and for what goes on in host memory."""
        self._engine.lanes.synchronize()
        self._engine.stores.cpu.drain()

    # Reading and leaving.

    def gathered(
        self, parameters: Sequence[Parameter] | None = None, *, modify: bool = False
    ) -> AbstractContextManager[None]:
        """Inside, the weights are whole and readable on every rank.

        parameters: gather only the units that hold these. Collective; not inside a forward or a backward.
        modify: at the end rank 0's values become everybody's, masters included; without it what is written is lost.
        """
        chosen = self.units
        if parameters is not None:
            wanted = {id(p) for p in parameters}
            chosen = [
                u
                for u in self.units
                if any(id(m.parameter) in wanted for b in (u.frozen, u.trainable) if b for m in b.members)
            ]
        return self._modified(chosen) if modify else self.schedule.hold(chosen)

    @contextmanager
    def _modified(self, units: Sequence[Unit]) -> Iterator[None]:
        with self.schedule.hold(units):
            before = weights_before(units)
            error: Exception | None = None
            try:
                yield
            except Exception as caught:
                error = caught
            self.ranks.agree(error)
            self.meet()
            write_back(units, before, self.ranks, self.fetched, self.put_to_rest)
            self.meet()

    def generation(self, pinned: Sequence[Parameter] = ()) -> AbstractContextManager[None]:
        """Inside, forwards without gradients: ranks may run different numbers of them, as in generation. Collective.

        As many units stay gathered as `generation_memory_budget` allows on the rank with the least room; with all of them
        there is no collective inside. pinned: parameters that are read outside of forwards; their units stay in any case.
        """
        return self.schedule.generating(lambda: self._units_to_keep({id(p) for p in pinned}))

    def _units_to_keep(self, pinned: set[int]) -> list[int]:
        ranks, schedule = self.ranks, self.schedule
        room = min(ranks.gather_numbers(room_for_weights(ranks.device, self.generation_memory_budget)))
        order = [schedule.index[id(u)] for u in self.in_forward_order([u for u in self.units if u.leaves])]
        here = [
            i for i in order if any(id(m.parameter) in pinned for part in self.units[i].parts for m in part.members)
        ]
        sizes = [sum(part.whole_nbytes for part in unit.parts) for unit in self.units]
        # The one in use, those ahead of it, and one on its way from another tier.
        window = 1 + schedule.prefetch + any(unit.travels for unit in self.units)
        return units_that_fit(sizes, order, here, window, room)

    def state_dict(self, *, trainable_only: bool = False, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Full tensors by the model's own names, on the CPU of rank 0; an empty dict on the others.

        trainable_only: leave frozen weights and buffers out. names: only these besides.
        Trained weights come from their masters, in the dtype the user gave them; frozen ones in the dtype they compute in.
        Unit by unit: no device holds more than one whole unit. Collective.
        Raises PrepareError for all of a model whose base is quantised.
        """
        if not trainable_only:
            self.refuse_whole_state()
        self.schedule.abandon_open_pass()
        main = self.ranks.rank == 0
        found: dict[int, Tensor] = {}
        keep = set(names) if names is not None else set()
        for unit in self.units:
            if unit.frozen is not None:
                wanted = [i for i, m in enumerate(unit.frozen.members) if not trainable_only or m.name in keep]
                if wanted:
                    with self.schedule.hold([unit]):
                        for i in wanted if main else ():
                            found[id(unit.frozen.members[i].parameter)] = unit.frozen.view(i).to("cpu", copy=True)
            if unit.trainable is not None and unit.gradients is not None:
                whole = self._whole_master(unit)
                for i, member in enumerate(unit.trainable.members) if main else ():
                    value = unit.trainable.view(i, whole).to("cpu", self._dtypes[member.name], copy=True)
                    found[id(member.parameter)] = value
        if not main:
            return {}
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in found:
                state[name] = found[id(parameter)]
            elif parameter.numel() == 0 and not trainable_only:
                state[name] = parameter.detach().cpu()
        if not trainable_only:
            state.update(self._persistent_buffers())
            order = self._native_order()
            state = dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order))))
        return state

    def refuse_whole_state(self) -> None:
        """Raise PrepareError, on every rank, if the model cannot be saved whole: the library's tables would be missing."""
        if self._quantised:
            raise PrepareError(
                f"this {type(self.model).__name__} has a quantised base, which is not saved: it can be loaded again from where "
                "it came. Save the adapter (save_pretrained of the PEFT model), or all with save_state."
            )

    def _whole_master(self, unit: Unit) -> Tensor:
        assert unit.gradients is not None
        assert unit.trainable is not None
        own = self.fetched(unit.gradients.master)
        if not unit.plan.optimizer.sharded:
            return own
        whole = torch.empty(unit.trainable.layout.numel, dtype=own.dtype, device=self.ranks.device)
        self.ranks.all_gather(whole, own)
        return whole

    def fetched(self, slab: Slab) -> Tensor:
        """What rests in `slab`, on the device; the computation waits for it. Collective where a drive is used."""
        if slab.tier is Tier.GPU:
            self._engine.lanes.join()
            return slab.tensor
        lanes = self._engine.lanes
        out = torch.empty(slab.numel, dtype=slab.dtype, device=self.ranks.device)
        lanes.up.wait(lanes.mark_compute())
        try:
            lanes.compute_waits(slab.fetch(out).enqueued())
        except StoreError as error:
            self._engine.faults.note(error)
        self._engine.faults.agree()
        return out

    def _persistent_buffers(self) -> dict[str, Tensor]:
        found = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}" if prefix else name] = buffer.to("cpu", copy=True)
        return found

    def _native_order(self) -> dict[str, int]:
        names = []
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            names += [f"{prefix}.{n}" if prefix else n for n in (*module._parameters, *module._buffers)]
        return {name: i for i, name in enumerate(names)}

    def ledger(self) -> dict[tuple[Role, Tier], int]:
        """Bytes on this rank by role and tier, now. The optimizer's moments are the ShardedOptimizer's to count."""
        found: dict[tuple[Role, Tier], int] = {}

        def add(role: Role, tier: Tier, nbytes: int) -> None:
            if nbytes:
                found[role, tier] = found.get((role, tier), 0) + nbytes

        for unit in self.units:
            if unit.frozen is not None:
                add("frozen", unit.frozen.tier, unit.frozen.bytes_at_rest)
            if unit.trainable is not None and unit.gradients is not None:
                add("parameter", unit.trainable.tier, unit.trainable.bytes_at_rest)
                for tier, nbytes in unit.gradients.nbytes.items():
                    add("gradient", tier, nbytes)
                if not unit.gradients.shares_weights:
                    add("optimizer", unit.gradients.master.tier, unit.gradients.master.nbytes)
        add("frozen", Tier.GPU, self._quantised.whole_nbytes)
        return found

    def release(self) -> None:
        """Undo: whole weights in their own memory on the device, no hooks. Collective."""
        self.schedule.abandon_open_pass()
        self.drop_gradients()
        self._hooks.remove()
        self._engine.lanes.gather.wait(self._engine.lanes.mark_compute())
        with torch.no_grad():
            for unit in self.units:
                if unit.leaves:
                    unit.gather()
                    unit.arrive()
                for buffer in (unit.frozen, unit.trainable):
                    if buffer is not None:
                        buffer.dissolve()
        self._quantised.unsettle()
        self.meet()
        self._engine.stores.close()
        _sharded.pop(id(self.model), None)
