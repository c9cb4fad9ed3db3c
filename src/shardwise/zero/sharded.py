"""A prepared model: the user's own object, with its weights in units and its passes under a schedule.

`ShardedModel` takes a model apart into units, moves every weight into flat buffers with rank 0's values, and hooks the
model up. It hangs nothing on the model: `find_sharded` looks it up in a side table by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn import Parameter

from ..config.offloads import Directories
from ..config.sections import EngineConfig
from ..errors import PrepareError
from ..plan.blueprint import Role
from ..plan.plan import Plan, Tier
from ..plan.precision import Precision
from ..plan.units import FoundUnits, UnitSpec
from ..ranks.ranks import Ranks
from .buffers import place_buffers
from .build import Builder, agree_on_shapes, place_empty
from .checks import check_model
from .engine import Engine, Kind
from .generation import units_to_keep
from .gradients import used_by_any
from .hooks import Hooks
from .quantised import QuantisedWeights
from .reading import Reading
from .releasing import dissolve, log_rounded
from .schedule import Schedule
from .sources import Sources, choose_makers
from .statistics import RunningBuffers
from .structure import Structure
from .thawing import Thawing
from .trained import Trained
from .unit import Unit
from .whole import WholeTensors

# Small blocks share a unit of at most this on a GPU: to gather and release one costs the host some 0.3 ms, in which NVLink
# moves half of this. On a CPU there is no lane to hide a gather behind, and nothing is won.
UNIT_NBYTES = 160 << 20

DEFAULTS = EngineConfig()

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
    options:        the engine's settings, whole and by their names in a file; `EngineConfig` tells what each does.
    found:          its units, where somebody has looked for them already by these options.
    sources:        of the parameters on the meta device: each rank reads its own interval from them.
    nvme_paths:     directories of what rests on nvme, one or several for each.
    serial:         one lane does everything, for measurements.
    after_step:     called after every step of an optimizer on this model, on every rank. after_backward: after a backward.
                    before_following: before masters follow the weights.
    trains:         False for a model that no optimizer steps: no masters, no gradients. What has gradients in a backward
                    after all, or comes to an optimizer, is thawed.
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
        options: EngineConfig = DEFAULTS,
        found: FoundUnits | None = None,
        sources: Sources | None = None,
        nvme_paths: Mapping[Kind, Directories] | None = None,
        serial: bool = False,
        trains: bool = True,
    ) -> None:
        plan = replace(plan, parts=ranks.owners.size // ranks.shards.size)
        self.model, self.plan, self.ranks = model, plan, ranks
        self.precision = precision
        self.sync_gradients, self.accumulating = True, False
        self.at_boundary: bool | None = None
        self.released = self.swapped = False
        self.options = options
        self.after_step: list[Callable[[], None]] = []
        self.after_backward: list[Callable[[], None]] = []
        self.before_following: list[Callable[[], None]] = []
        self._quantised = QuantisedWeights(model)
        own_sources = dict(sources or {})

        def checked() -> FoundUnits:
            check_model(model, [sharded.model for sharded in _sharded.values()], own_sources)
            return found or FoundUnits.of(model, options.units)

        specs = ranks.together(checked).within(UNIT_NBYTES if ranks.device.type == "cuda" else 0)
        agree_on_shapes(specs, ranks)
        makers = choose_makers(specs, own_sources, self._quantised, ranks) if own_sources else {}

        self._engine = engine = Engine.open(
            plan, ranks, precision.reduce, nvme_paths=nvme_paths or {}, options=options, serial=serial
        )
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self._builder = Builder(engine, plan, precision, options.whole_adapters, self._quantised, own_sources, makers)
        self.running_buffers, self.units = self._placed(specs, trains)
        self.schedule = Schedule(
            self.units, ranks, engine.lanes, engine.reductions, options.prefetch_units, engine.faults
        )
        self.whole = WholeTensors(
            model, self.units, self.schedule, ranks, dtypes=self._dtypes, settle=self.settle, fetched=engine.fetched
        )
        self._hooks = Hooks(
            self.schedule,
            root=model,
            before=self._before_training,
            boundary=lambda: self.sync_gradients,
            after=self._after_backward,
            compute_dtype=precision.compute,
        )
        engine.norms.before_reading(self._hooks.finish_interrupted)
        self._reading = Reading(self.units, engine, self.schedule, self._hooks)
        self.thawing = Thawing(self.units, self._builder, engine, self.schedule, self._hooks, engine.drain)
        self._structure = Structure(model, lambda: {id(p) for p in self._parameters()})
        _sharded[id(model)] = self

    def _placed(self, specs: Sequence[UnitSpec], trains: bool) -> tuple[RunningBuffers, list[Unit]]:
        """Everything of the model on the device or at rest: its buffers, and its units. Collective."""
        model, ranks, engine = self.model, self.ranks, self._engine
        with torch.no_grad():
            place_buffers(model, ranks)
            place_empty(model, ranks.device, lambda _, parameter: self.precision.compute_dtype(parameter))
            running = RunningBuffers(model, ranks)
            units = self._builder.units(specs, trains=trains)
        engine.drain()
        if engine.peers is not None:
            engine.peers.meet()
        return running, units

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

    def settle(self, *, waits: bool = True) -> None:
        """Finish what is under way, so that what rests counts. Collective, like the end of a pass.

        waits: for the device; always where something rests on a drive. Else only what is enqueued behind it may read."""
        self._hooks.finish_interrupted()
        self.schedule.abandon_open_pass()
        self.schedule.stop_lingering()
        self.follow_weights()
        if waits or self._engine.stores.uses_disk:
            self._engine.rest()

    # Training.

    def _after_backward(self, boundary: bool) -> None:
        self.accumulating = not boundary
        gradients = [trained.gradients for trained in self.trained()]
        if boundary:
            self.schedule.reducing.settle()
            # A parameter that no rank used keeps no gradient, as in one process: the optimizer must not touch it.
            used, thaws = self.thawing.vote([flag for g in gradients for flag in g.used])
            if not self._engine.share.alone:
                used_by_any(gradients, used)
            if thaws:
                self.thawing.thaw()
            if not self._engine.share.alone:
                self.running_buffers.step_ends()
        elif any(g.sums.averaged for g in gradients) and not self._engine.share.alone:
            # What is averaged is every rank's: reading it is for all, and who drops it drops what others have brought, too.
            used_by_any(gradients, self.ranks.any_of([flag for g in gradients for flag in g.used]))
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
        return self._reading.gathered(parameters, modify=modify)

    def follow_weights(self) -> None:
        """Let masters follow what a script has written into trained weights. Raises WriteError for what cannot count."""
        for call in self.before_following:
            call()
        self._reading.follow()

    @property
    def takes_first_ranks(self) -> bool:
        """Whether rank 0's weights will be everybody's, whatever this rank writes: inside of `gathered(modify=True)`."""
        return self._reading.takes_first_ranks

    @property
    def writes(self) -> int:
        """How often a script has written into its weights."""
        return self._reading.writes

    def generation(self, pinned: Sequence[Parameter] = ()) -> AbstractContextManager[None]:
        """Inside, forwards without gradients: ranks may run different numbers of them, as in generation. Collective.

        As many units stay gathered as `generation_memory_budget` allows on the rank with the least room; with all of them
        there is no collective inside. pinned: parameters that are read outside of forwards; their units stay in any case.
        """
        self._hooks.finish_interrupted()
        budget, read = self.options.generation_memory_budget, {id(p) for p in pinned}
        return self.schedule.generating(lambda: units_to_keep(self.schedule, self.ranks, budget, read))

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

    def ledger(self) -> dict[tuple[Role, Tier], int]:
        """Bytes on this rank by role and tier, now. The optimizer's moments are the ShardedOptimizer's to count."""
        found: dict[tuple[Role, Tier], int] = {("frozen", Tier.GPU): self._quantised.whole_nbytes}
        for role, tier, nbytes in (row for unit in self.units for row in unit.at_rest):
            found[role, tier] = found.get((role, tier), 0) + nbytes
        return {key: nbytes for key, nbytes in found.items() if nbytes}

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
        self._hooks.listening.remove()
        self._engine.lanes.gather.wait(self._engine.lanes.mark_compute())
        rounded = dissolve(self.units, self._dtypes, self.whole.master, parted=self.ranks.parted)
        place_empty(self.model, self.ranks.device, lambda name, _: self._dtypes[name])
        self._quantised.unsettle()
        if not self.ranks.parted:
            self._engine.meet()
        self._engine.stores.close()
        self.released = True
        _sharded.pop(id(self.model), None)
        if self.ranks.rank == 0:
            log_rounded(rounded, self.model)
