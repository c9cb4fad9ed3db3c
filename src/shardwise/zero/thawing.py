"""Frozen weights that are trained from some step on.

A script says so by `requires_grad`, at any boundary between steps. The backward finds out at its end: such a weight has a
gradient of its own in `grad`, which nobody has reduced. From there on it has a master, gradients and states as any other:

    step 3    block 3: frozen q k | trained lora            q.requires_grad_(True)
    step 4    backward: q.grad is this rank's own           thaw: block 3: frozen k | trained lora | trained q
              its gradient is reduced, and stepped

A backward that records a graph (create_graph=True) leaves that to the next one, or to the step: the graph is still to be used,
and keeps the weight where it lies now. A script that sets `grad` of such a weight by itself needs no backward: whoever looks at
gradients before a step finds it.

An optimizer's states for a weight that is frozen are another reason to thaw it: they have to rest somewhere.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter

import torch
from torch.nn import Parameter

from ..errors import PrepareError
from .build import Builder
from .engine import Engine
from .gradients import Gradients, used_by_any
from .guard import unasked
from .hooks import Hooks
from .schedule import Schedule
from .unit import Unit

_trains = attrgetter("requires_grad")


class Thawing:
    """Watches the frozen weights of one model.

    units: of the model, changed here. drain: returns when what was put to rest is there; collective where a drive is used.
    then:  called with the ids of what was thawed, weakly held; by whoever drives the weights.
    """

    def __init__(
        self,
        units: list[Unit],
        builder: Builder,
        engine: Engine,
        schedule: Schedule,
        hooks: Hooks,
        drain: Callable[[], None],
    ) -> None:
        self._units = units
        self._builder = builder
        self._engine = engine
        self._ranks = engine.ranks
        self._schedule = schedule
        self._hooks = hooks
        self._drain = drain
        self.then: list[weakref.WeakMethod[Callable[[set[int]], None]]] = []
        self._frozen: list[tuple[str, Parameter]] = []
        self._parameters: list[Parameter] = []  # the same
        self._is_due = False
        self._look_for_frozen()

    def listen(self) -> None:
        """Before a forward: hear of a backward that comes to weights which shall be trained from now on, and to no others."""
        self._hooks.listening.listen_to([parameter for _, parameter in self._wanted()])

    def _look_for_frozen(self) -> None:
        buffers = [unit.frozen for unit in self._units if unit.frozen is not None]
        self._frozen = [(m.name, m.parameter) for b in buffers for m in b.members if m.dtype.is_floating_point]
        self._parameters = [parameter for _, parameter in self._frozen]

    def thaw_names(self, names: Collection[str]) -> None:
        """`thaw` of these frozen weights: the same on every rank."""
        if names:
            self.thaw([parameter for name, parameter in self._frozen if name in names])

    def holds(self, parameter: Parameter) -> bool:
        """Whether this is a frozen weight of the model."""
        return any(parameter is frozen for _, frozen in self._frozen)

    def vote(self, flags: list[bool]) -> tuple[list[bool], bool]:
        """`any_of(flags)` at a boundary, and whether frozen weights are to be trained from now on.

        A graph of any rank, which keeps weights, puts that off. Raises PrepareError on every rank if the ranks do not all want
        it.
        """
        if not self._frozen or self._hooks.in_forward:
            return self._ranks.any_of(flags), False
        news = bool(self._wanted())
        *flags, some, others, lingers = self._ranks.any_of([*flags, news, not news, self._schedule.lingers])
        if some and others:
            self._agree(self._wanted())
        self._is_due = some
        return flags, some and not lingers

    def catch_up(self, *, complete: bool) -> None:
        """Before gradients are read: thaw what no backward could, or what a script has given a gradient since the last one.

        complete: the last backward was the one before a step, so what `grad` holds now was set by the script, on every rank.
        Collective where there is any, on every rank.
        """
        if self._is_due:
            self.thaw()
        elif complete and any(parameter.grad is not None for _, parameter in self._wanted()):
            self._ranks.assemble("the use of a gradient that was set on a thawed weight", "before a step")
            self.thaw(boundary=None)

    def _wanted(self) -> list[tuple[str, Parameter]]:
        with unasked():
            if not any(map(_trains, self._parameters)):  # each step asks twice, of all that is frozen
                return []
            return [(name, parameter) for name, parameter in self._frozen if parameter.requires_grad]

    def thaw(self, also: Iterable[Parameter] = (), *, boundary: bool | None = True) -> None:
        """Train what shall be trained, and `also`. Collective, between passes.

        boundary: gradients that wait in the parameters are reduced; False keeps them as those of a micro-batch, and None leaves
                  them, as a script's own, to whoever looks at gradients next.
        Raises PrepareError on every rank where the ranks want different weights, or inside of `gathered`.
        """
        chosen = {id(parameter) for parameter in also}
        wanted = [item for item in self._frozen if id(item[1]) in chosen] + [
            item for item in self._wanted() if id(item[1]) not in chosen
        ]
        if not self._agree(wanted):
            return
        if self._schedule.holds:
            raise PrepareError(
                f"{wanted[0][0]} is trained from now on, and a backward or step inside `gathered` or `generation` was first to "
                "see it. Leave that block before the first of these after requires_grad was set."
            )
        self._is_due = False
        self._hooks.listening.stop_listening()
        self._schedule.abandon_open_pass()
        self._schedule.stop_lingering()
        self._engine.lanes.gather.wait(self._engine.lanes.mark_compute())
        self._meet()
        made = self._builder.thaw(self._units, [parameter for _, parameter in wanted])
        self._units[:] = _in_order(self._units, made)
        self._drain()
        self._meet()
        self._schedule.renew(self._units)
        self._hooks.renew()
        self._look_for_frozen()
        if boundary is not None:
            self._reduce([unit.trained.gradients for unit in made if unit.trained is not None], boundary)
        for call in self.then:
            if (found := call()) is not None:
                found({id(parameter) for _, parameter in wanted})

    def _meet(self) -> None:
        self._engine.lanes.synchronize()
        self._engine.stores.cpu.drain()
        if self._engine.peers is not None:
            self._engine.peers.meet()

    def _agree(self, wanted: Sequence[tuple[str, Parameter]]) -> bool:
        """Whether there is anything to thaw: the same on every rank, or PrepareError on every rank."""
        names = [name for name, _ in wanted]
        said = self._ranks.gather_numbers(zlib.crc32("\n".join(names).encode()) if names else 0)
        if len(set(said)) > 1:
            everyone = self._ranks.gather_objects(names)
            other = next(rank for rank, found in enumerate(everyone) if found != everyone[0])
            differing = sorted(set(everyone[0]) ^ set(everyone[other]))[:3]
            raise PrepareError(
                f"requires_grad of {', '.join(differing)} was set on rank {other} and not on rank 0, or the other way round. "
                "What is trained must be the same on every rank: set it everywhere, before the same backward."
            )
        return bool(names)

    @torch.no_grad()  # of a backward that has recorded a graph, gradients have one
    def _reduce(self, new: Sequence[Gradients], boundary: bool) -> None:
        """Take what autograd has brought to the weights before they had gradients here."""
        with unasked():
            for gradients in new:
                gradients.used = [m.parameter.grad is not None for m in gradients.buffer.members]
        used = self._ranks.any_of([flag for gradients in new for flag in gradients.used])
        if not any(used):
            return
        if boundary:
            used_by_any(new, used)
        for gradients in new:
            if boundary:
                gradients.reduce()
                gradients.settle()
            else:
                gradients.collect()
        self._engine.lanes.compute_waits(self._engine.lanes.reduce.mark())
        self._engine.reductions.clear()


def _in_order(units: Sequence[Unit], made: Sequence[Unit]) -> list[Unit]:
    """`made` among `units`, each behind those with its modules; buckets, which have none, last."""
    found = list(units)
    for unit in made:
        places = [i for i, other in enumerate(found) if unit.entries and other.entries[:1] == unit.entries[:1]]
        found.insert(places[-1] + 1 if places else len(found), unit)
    return found
