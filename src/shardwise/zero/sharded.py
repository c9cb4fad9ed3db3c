"""A prepared model: the user's own object, with its weights in units and its passes under a schedule.

`ShardedModel` takes a model apart into units, moves every weight into flat buffers with rank 0's values, and hooks the
model up. It hangs nothing on the model: `find_sharded` looks it up in a side table by identity.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import PrepareError, StoreError, WriteError
from ..offload.peers import GatherWith, PeerMemory
from ..offload.store import Slab
from ..plan.blueprint import Role
from ..plan.plan import Plan, Tier
from ..plan.precision import Precision
from ..plan.units import FoundUnits, UnitSpec, find_units
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks
from .asking import asking
from .buffers import place_buffers
from .build import Builder, place_empty
from .checks import check_model, paths_of
from .engine import Doubts, Engine, Faults, Kind, ReductionsInFlight, Stores
from .generation import room_for_weights, units_that_fit
from .hooks import Hooks
from .norms import Norms
from .quantised import QuantisedWeights
from .releasing import dissolve, log_rounded
from .schedule import Schedule
from .sources import Makers, Sources, choose_makers
from .statistics import RunningBuffers
from .structure import Structure
from .thawing import Thawing
from .trained import Trained
from .unit import Unit
from .whole import WholeTensors
from .writing import follow, has_strayed, write_back

# Small blocks share a unit of at most this on a GPU: to gather and release one costs the host some 0.3 ms, in which NVLink
# moves half of this. On a CPU there is no lane to hide a gather behind, and nothing is won.
UNIT_NBYTES = 160 << 20

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
    units:          block classes or module paths; None finds them; or those that were found.
    whole_adapters: True keeps trainable weights whole on the gpu at stage 3, False shards them, 'auto' keeps those that
                    are at most 1/16 of what is frozen in their unit.
    sources:        of the parameters on the meta device: each rank reads its own interval from them.
    gather_with:    "copy_engine" lets ranks of one machine copy shards from each other, "nccl" gathers with its kernels, "auto"
                    takes the first where it is possible.
    after_step:     called after every step of an optimizer on this model, on every rank. after_backward: after a backward.
    trains:         False for a model that no optimizer steps: no masters, no gradients. What has gradients in a backward
                    after all, or comes to an optimizer, is thawed.
    generation_memory_budget: bytes of gathered weights while generating; "auto" for what is free, None for the fewest.
    writes:         how often a script has written into its weights.
    whole:          the weights whole, one unit at a time.
    running_buffers: those that forwards change. swapped: its weights are averages now, see `averaging.py`.
    sync_gradients: set False before a backward whose gradients are accumulated only. accumulating: the last one was so.
    at_boundary:    whether the script has said that a step follows this micro-batch, backward or not; None if it says nothing.
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
        units: Sequence[str] | FoundUnits | None = None,
        whole_adapters: bool | Literal["auto"] = "auto",
        sources: Sources | None = None,
        nvme_paths: Mapping[Kind, str] | None = None,
        gpu_memory_budget: int | str | None = None,
        generation_memory_budget: int | str | None = "auto",
        serial: bool = False,
        gather_with: GatherWith = "auto",
        trains: bool = True,
    ) -> None:
        self.model = model
        self.plan = plan
        self.ranks = ranks
        self.precision = precision
        self.sync_gradients = True
        self.accumulating = False
        self.at_boundary: bool | None = None
        self.released = False
        self.swapped = False
        self.gpu_memory_budget = gpu_memory_budget
        self.after_step: list[Callable[[], None]] = []
        self.after_backward: list[Callable[[], None]] = []
        self.writes = 0
        self.generation_memory_budget = generation_memory_budget
        self._quantised = QuantisedWeights(model)
        own_sources = dict(sources or {})
        makers: Makers = {}

        def divided() -> list[UnitSpec]:
            check_model(model, [sharded.model for sharded in _sharded.values()], own_sources)
            return find_units(model, units, unit_nbytes=UNIT_NBYTES if ranks.device.type == "cuda" else 0)

        specs = ranks.together(divided)
        self._agree_on_shapes(specs)
        if own_sources:
            parameters = list({id(p): p for spec in specs for p in spec.parameters.values()}.values())
            makers = choose_makers(parameters, own_sources, self._quantised, ranks)

        lanes = Lanes(ranks.device, serial=serial)
        stores = ranks.together(lambda: Stores.make(lanes, ranks.rank, paths_of(plan, nvme_paths or {})))
        reductions = ReductionsInFlight(lanes)
        faults = Faults(ranks, stores.drives)
        peers = PeerMemory.open(ranks, lanes, gather_with) if plan.frozen.sharded or plan.parameter.sharded else None
        self._engine = Engine(ranks, lanes, stores, precision.reduce, reductions, faults, Norms(ranks), Doubts(), peers)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self._builder = Builder(self._engine, plan, precision, whole_adapters, self._quantised, own_sources, makers)
        with torch.no_grad():
            place_buffers(model, ranks)
            place_empty(model, ranks.device, lambda _, parameter: precision.compute_dtype(parameter))
            self.running_buffers = RunningBuffers(model, ranks)
            self.units = self._builder.units(specs, trains=trains)
        self.drain()
        if peers is not None:
            peers.meet()
        self.schedule = Schedule(self.units, ranks, lanes, reductions, prefetch, faults)
        self.whole = WholeTensors(
            model, self.units, self.schedule, ranks, dtypes=self._dtypes, settle=self.settle, fetched=self.fetched
        )
        dtype = precision.compute
        self._hooks = Hooks(
            self.schedule,
            root=model,
            before=self._before_training,
            boundary=lambda: self.sync_gradients,
            after=self._after_backward,
            compute_dtype=dtype,
        )
        self._engine.norms.before_reading(self._hooks.finish_interrupted)
        self.thawing = Thawing(self.units, self._builder, self._engine, self.schedule, self._hooks, self.drain)
        self._structure = Structure(model, lambda: {id(p) for p in self._parameters()})
        _sharded[id(model)] = self

    @staticmethod
    def all() -> list[ShardedModel]:
        """Every sharded model of this process."""
        return list(_sharded.values())

    def holds(self, parameter: Parameter) -> bool:
        """Whether this object is one of the model's weights, as it was prepared; an empty one is in no buffer."""
        return parameter.numel() == 0 or any(parameter is held for held in self._parameters())

    def _parameters(self) -> Iterator[Parameter]:
        """Every weight that is in a buffer."""
        buffers = (buffer for unit in self.units for buffer in unit.buffers)
        return (m.parameter for b in buffers for m in b.members)

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

    def put_to_rest(self, values: Tensor, slab: Slab) -> None:
        """See `Engine.put_to_rest`."""
        self._engine.put_to_rest(values, slab)

    def settle(self) -> None:
        """Finish what is under way, so that what rests is what counts. Collective, like the end of a pass."""
        self._hooks.finish_interrupted()
        self.schedule.abandon_open_pass()
        self.schedule.stop_lingering()
        self.follow_weights()
        self.meet()
        self.drain()

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
        if boundary:
            self.schedule.reducing.settle()
            gradients = [trained.gradients for trained in self.trained()]
            # A parameter that no rank used keeps no gradient, as in one process: the optimizer must not touch it.
            used, thaws = self.thawing.vote([flag for g in gradients for flag in g.used])
            flags = iter(used)
            for g in gradients:
                g.used = list(islice(flags, len(g.used)))
            if thaws:
                self.thawing.thaw()
            self.running_buffers.step_ends()
        for trained in self.trained():
            trained.gradients.shown.show()
        for call in self.after_backward:
            call()

    def end_accumulation(self) -> None:
        """A step comes: where its last micro-batch had no backward, average what the others brought. Collective then."""
        if self.accumulating and self.at_boundary:
            self._hooks.finish_interrupted()
            self.schedule.average_sums()
            self._after_backward(True)

    def _before_training(self) -> None:
        """A forward begins that records gradients."""
        self._structure.check()
        self.thawing.listen()
        self.look_at_gradients()

    def finish_interrupted(self) -> None:
        """End the pass that an error or an interrupt has left open. Collective where there is one."""
        self._hooks.finish_interrupted()

    def look_at_gradients(self) -> None:
        """Take over what a script has done to `grad` of the parameters since a backward: dropped, assigned or changed it."""
        self._hooks.finish_interrupted()
        for trained in self.trained():
            trained.gradients.shown.look()

    def trained(self) -> list[Trained]:
        """Of every unit that is trained."""
        return [unit.trained for unit in self.units if unit.trained is not None]

    def in_forward_order(self, units: Sequence[Unit]) -> list[Unit]:
        """`units` as the next forward will need them, as far as that is known; those without modules last."""
        place = {i: n for n, i in reversed(list(enumerate(self.schedule.forward_sequence)))}
        last = len(self.units)
        return sorted(units, key=lambda unit: place.get(self.schedule.index[id(unit)], last))

    @property
    def gradient_share(self) -> float:
        """What the gradients of the coming backwards are multiplied by. To be set between two passes; 1 in the beginning.

        For a script that writes `loss.backward()` for each of n micro-batches, and wants their mean: 1/n.
        """
        return self._engine.share.value

    @gradient_share.setter
    def gradient_share(self, value: float) -> None:
        self._engine.share.value = value

    def drop_gradients(self) -> None:
        """Forget every gradient since the last step, reduced or not."""
        for trained in self.trained():
            trained.gradients.drop()

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

    @property
    def in_pass(self) -> bool:
        """Whether a forward or a backward of this model is running."""
        return self._hooks.in_pass

    def gathered(
        self, parameters: Sequence[Parameter] | None = None, *, modify: bool = False
    ) -> AbstractContextManager[None]:
        """Inside, the weights are whole and readable on every rank.

        parameters: gather only the units that hold these. Collective; inside a forward or a backward of this model, every
                    rank's pass must come to it, as to a module of its own, and nothing may be written.
        modify: at the end rank 0's values become everybody's, masters included. Without it every rank writes the same, as in
                plain torch, or WriteError is raised on all.
        """
        chosen = self.units
        if parameters is not None:
            wanted = {id(p) for p in parameters}
            chosen = [u for u in self.units if any(id(m.parameter) in wanted for b in u.buffers for m in b.members)]
        return self._read(chosen, modify=modify)

    @contextmanager
    def _read(self, units: Sequence[Unit], *, modify: bool) -> Iterator[None]:
        self._hooks.finish_interrupted()
        if self._hooks.in_pass:
            with asking(self._hooks, units, modify=modify):
                yield
            return
        self.ranks.require_same(
            "gathered", {"modify": modify, "what is gathered": ", ".join(unit.name for unit in units)}
        )
        with self.schedule.hold(units):
            error: BaseException | None = None
            try:
                try:
                    # What is computed of the weights here may have its backward when they are released again.
                    with self._hooks.saved.following():
                        yield
                except BaseException as caught:
                    if not modify:
                        raise
                    error = caught
                if modify:
                    self.ranks.agree(error)
                    self.writes += 1
                    self.meet()
                    write_back(units, self.ranks, self.fetched, self.put_to_rest)
                    self.meet()
                else:
                    self._keep_written(units)
            finally:
                for unit in units:
                    unit.written()  # what nobody has kept goes with the block

    def _keep_written(self, units: Sequence[Unit]) -> None:
        """What every rank has written into gathered weights goes into the shards. Collective.

        Raises WriteError on every rank if some have written and others not, or not the same weights.
        """
        names = [name for unit in units for name in unit.written()]
        said = self.ranks.gather_numbers(zlib.crc32("\n".join(names).encode()) if names else 0)
        if len(set(said)) > 1:
            who = ", ".join(str(rank) for rank, number in enumerate(said) if number)
            raise WriteError(
                f"weights were written inside `gathered` on rank {who}, and not the same ones on all ranks: the ranks would "
                f"differ. On this rank: {', '.join(names[:3]) or 'none'}. Write on every rank, or in gathered(model, "
                "modify=True), which takes rank 0's."
            )
        if any(said):
            self.writes += 1
            self.meet()
            for unit in units:
                unit.put_own()
            self.meet()

    def follow_weights(self) -> None:
        """Let masters follow what a script has written into trained weights. Raises WriteError for what cannot count."""
        self._engine.doubts.settle()
        for unit in self.units:
            if has_strayed(unit) and unit.trained is not None:
                self._engine.lanes.join()  # what was written inside of a pass goes into the shards on a lane
                follow(unit, self._engine.look_at, self.put_to_rest)

    def generation(self, pinned: Sequence[Parameter] = ()) -> AbstractContextManager[None]:
        """Inside, forwards without gradients: ranks may run different numbers of them, as in generation. Collective.

        As many units stay gathered as `generation_memory_budget` allows on the rank with the least room; with all of them
        there is no collective inside. pinned: parameters that are read outside of forwards; their units stay in any case.
        """
        self._hooks.finish_interrupted()
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

    def state_dict(self, *, trainable_only: bool = False) -> dict[str, Any]:
        """Full tensors by the model's own names, on the CPU of rank 0; an empty dict on the others.

        trainable_only: leave frozen weights and buffers out. Trained weights come from their masters, in the dtype the user
        gave them; frozen ones in the dtype they compute in. Unit by unit: no device holds more than one whole unit. Collective.
        Raises PrepareError for all of a model whose base is quantised.
        """
        if not trainable_only:
            self.refuse_whole_state()
            return self.whole.state_dict()
        trained = {member.name for member in self.whole.members() if member.trained}
        return self.whole.on_first(trained.__contains__)

    @property
    def is_quantised(self) -> bool:
        """Whether frozen weights are codes with scales beside them."""
        return bool(self._quantised)

    def refuse_whole_state(self) -> None:
        """Raise PrepareError, on every rank, if the model cannot be saved whole: the library's tables would be missing."""
        if self._quantised:
            raise PrepareError(
                f"this {type(self.model).__name__} has a quantised base, which is not saved: it can be loaded again from where "
                "it came. Save the adapter (save_pretrained of the PEFT model), or all with save_state."
            )

    def fetched(self, slab: Slab) -> Tensor:
        """What rests in `slab`, on the device; the computation waits for it. Collective where a drive is used."""
        out = self._engine.look_at(slab)
        if slab.tier is not Tier.GPU:
            self._engine.faults.agree()
        return out

    def ledger(self) -> dict[tuple[Role, Tier], int]:
        """Bytes on this rank by role and tier, now. The optimizer's moments are the ShardedOptimizer's to count."""
        found: dict[tuple[Role, Tier], int] = {}

        def add(role: Role, tier: Tier, nbytes: int) -> None:
            if nbytes:
                found[role, tier] = found.get((role, tier), 0) + nbytes

        for unit in self.units:
            if unit.frozen is not None:
                add("frozen", unit.frozen.tier, unit.frozen.bytes_at_rest)
            if (trained := unit.trained) is not None:
                add("parameter", trained.buffer.tier, trained.buffer.bytes_at_rest)
                for tier, nbytes in trained.sums.nbytes.items():
                    add("gradient", tier, nbytes)
                if not trained.shares_weights:
                    add("optimizer", trained.master.tier, trained.master.nbytes)
        add("frozen", Tier.GPU, self._quantised.whole_nbytes)
        return found

    def release(self) -> None:
        """Undo: whole weights in their own memory on the device, in the dtype that they came in, and no hooks. Collective.

        Trained weights come from their masters. Frozen ones have the values that they computed with, which is logged if those
        are rounded. Raises PrepareError, and changes nothing, where the ranks have parted and weights are sharded.
        """
        if self.ranks.parted and any(unit.leaves for unit in self.units):
            raise PrepareError(
                f"this {type(self.model).__name__} cannot be released any more: its weights are sharded, and the ranks have "
                "parted. Call free_memory() before end_training()."
            )
        self._hooks.finish_interrupted()
        self.schedule.abandon_open_pass()
        self.drop_gradients()
        self._hooks.remove()
        self._engine.lanes.gather.wait(self._engine.lanes.mark_compute())
        rounded = dissolve(self.units, self._dtypes, self.whole.master, parted=self.ranks.parted)
        place_empty(self.model, self.ranks.device, lambda name, _: self._dtypes[name])
        self._quantised.unsettle()
        if not self.ranks.parted:
            self.meet()
        self._engine.stores.close()
        self.released = True
        _sharded.pop(id(self.model), None)
        if self.ranks.rank == 0:
            log_rounded(rounded, self.model)
