"""What the groups of an optimizer hold: the pieces of the user's parameters that lie in this rank's master shards.

    group 0: [q.lora_A (8, 512), q.lora_B (512, 8)]   ->   rank 0: [q.lora_A[0:4096], q.lora_B[0:1024]]
                                                           rank 1: [q.lora_B[1024:4096]]

Frozen parameters have no shards. Once they are trained, theirs come into the group that they have always belonged to. A group
whose parameters are stepped whole holds stand-ins of them, also of those that another rank owns (`wholes.py`); their pieces are
here for what is done to gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import OptimizerError
from ..plan.blueprint import Role
from ..plan.plan import Tier
from ..zero.guard import unasked
from ..zero.sharded import ShardedModel
from ..zero.trained import Trained
from ..zero.unit import Unit
from .kept import nbytes_of
from .resting import UnitStates
from .visits import Shard
from .wholes import Whole, assign

# Those whose fused kernels take a gradient scale, on GPU and CPU.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class Groups:
    """The groups of one optimizer.

    parameters: the user's, group by group, as torch's verbs number them. as_set: of each group, the settings that were
                changed here, as the user had set them. is_whole: whether group `number` is stepped whole. together: where
                each rank has everything in place, so that it holds whole parameters themselves, in their shapes.
    shards:     this rank's pieces of what the optimizer drives. stepped: those that it holds itself; the others are parts of
                `wholes`, which are those of all ranks.
    unit_states: id(trained) -> where the states of what is stepped in shards there rest that are not in place.
    members: id(trained) -> it and the places of what it drives there. places: the same by the number of the group.
    frozen:     those of `parameters` that have no shards.
    strays:     id(parameter) -> what is trained in the models that this optimizer does not step, and its place: in torch
                their gradients are clipped with the others, if a script says so.
    norm_dtype: of norms over the gradients: fp64 where any of them is, as torch has it, else fp32. The same on every rank.
    sole:       ids of what no other optimizer steps: what a step does to its gradients in place is nobody else's matter.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        models: Sequence[ShardedModel],
        is_whole: Callable[[int], bool] = lambda _: False,
        *,
        together: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.models = models
        self.is_whole = is_whole
        self.together = together
        self.parameters: list[list[Parameter]] = []
        self.as_set: list[dict[str, Any]] = []
        self.shards: list[Shard] = []
        self.stepped: list[Shard] = []
        self.wholes: list[Whole] = []
        self.unit_states: dict[int, UnitStates] = {}
        self.members: dict[int, tuple[Trained, list[int]]] = {}
        self.places: dict[int, list[tuple[Trained, int]]] = {}
        self.sole: set[int] = set()
        self.frozen: list[Parameter] = []
        self.strays: dict[int, tuple[Trained, int]] = {}
        self.norm_dtype = torch.float32

    def check(self, groups: Sequence[dict[str, Any]], first: int = 0) -> None:
        """Raise OptimizerError if one of these groups holds what is no prepared model's. first: the number of the first one."""
        known = {id(p) for model in self.models for p in model.model.parameters()}
        name = type(self.optimizer).__name__
        for number, group in enumerate(groups, first):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise OptimizerError(
                        f"parameter {place} of group {number} of this {name}, of shape {tuple(parameter.shape)}, belongs to "
                        "no prepared model. Make the optimizer from the parameters of the model that you prepare, after "
                        "adapters have been added to it."
                    )

    def take_over(self) -> None:
        """Let every group from the first one that is new hold shards."""
        homes = self._homes()
        for number, group in enumerate(self.optimizer.param_groups):
            if number < len(self.parameters):
                continue
            self.parameters.append(list(group["params"]))
            self.as_set.append({})
            group["params"] = []
            self._join(number, self.parameters[number], homes)
            if _steps_as_torchs(self.optimizer) and group.get("fused") is None and not group.get("foreach"):
                # One kernel over all shards, which also takes the clip factor; torch's default is a loop on the CPU.
                self.as_set[-1]["fused"] = group.get("fused")
                group["fused"] = not (group.get("capturable") or group.get("differentiable"))
        self._count()

    def take_thawed(self, thawed: set[int]) -> list[Shard]:
        """Parameters of these ids are trained from now on: their shards join the groups. Gives them."""
        homes = {key: home for key, home in self._homes().items() if key in thawed}
        before = len(self.shards)
        for number, own in enumerate(self.parameters):
            self._join(number, own, homes)
        self._count()
        return self.shards[before:]

    @contextmanager
    def as_given(
        self, parameters: Sequence[Sequence[Parameter]] | None = None, state: Mapping[Any, Any] | None = None
    ) -> Iterator[None]:
        """Inside, the optimizer has the user's parameters in its groups and their settings as they were set, for torch's verbs.

        parameters, state: what stands for the user's, and for the optimizer's states.
        """
        optimizer: Any = self.optimizer
        groups, held = optimizer.param_groups, optimizer.state
        now = [dict(group) for group in groups]
        for group, own, as_set in zip(groups, parameters or self.parameters, self.as_set, strict=True):
            group.update(as_set, params=list(own))
        optimizer.state = held if state is None else state
        try:
            yield
        finally:
            optimizer.param_groups, optimizer.state = groups, held
            for group, before, as_set in zip(groups, now, self.as_set, strict=False):  # a group may have been added
                group.update({name: before[name] for name in ("params", *as_set)})

    @property
    def fused(self) -> bool:
        """Whether its kernels take a scale of the gradients: one in fp32, which is not enough for gradients in fp64."""
        takes = _steps_as_torchs(self.optimizer) and all(g.get("fused") for g in self.optimizer.param_groups)
        return takes and self.norm_dtype == torch.float32

    def units(self, model: ShardedModel) -> list[Unit]:
        """The units of `model` that hold something of what is driven."""
        return [unit for unit in model.units if unit.trained is not None and id(unit.trained) in self.members]

    def driven(self) -> Iterator[Parameter]:
        """The models' parameters that this optimizer changes, on this rank or another."""
        for trained, indices in self.members.values():
            for index in indices:
                yield trained.buffer.members[index].parameter

    def zero_frozen(self, set_to_none: bool) -> None:
        """`zero_grad` for what has no shards: of a weight that was thawed since the last backward, there may be a gradient."""
        with unasked():
            for parameter in self.frozen:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def chosen(self, parameters: Sequence[Tensor]) -> list[Shard]:
        """The shards of these, strays included; what the optimizer's groups hold stands for its parameter."""
        wanted = {id(p) for p in parameters}
        wanted |= {id(whole.parameter) for whole in self.wholes if id(whole.tensor) in wanted}
        own = [shard for shard in self.shards if id(shard.parameter) in wanted or id(shard.tensor) in wanted]
        # In the order of the model: a set of ids has another one in each process, and a sum in it other bits.
        return own + [shard for key, home in self.strays.items() if key in wanted for shard in _shards_of(*home)]

    def is_all(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are all that the optimizer drives, and no strays: the same on every rank.

        Asked of parameters, for this rank's shards may all be theirs; of shards only where there is one group that they can be.
        """
        given = {id(p) for p in parameters}
        if given & self.strays.keys():
            return False
        one = len(self.optimizer.param_groups) == 1
        return {id(p) for p in self.driven()} <= given or (one and {id(shard.tensor) for shard in self.shards} <= given)

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any of these is in the groups, frozen or not."""
        mine = {id(parameter) for own in self.parameters for parameter in own}
        return any(id(p) in mine for p in parameters)

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all of these are the models'."""
        mine = {id(parameter) for model in self.models for parameter in model.model.parameters()}
        return all(id(p) in mine for p in parameters)

    def ledger(self) -> dict[tuple[Role, Tier], int]:
        """Bytes of the optimizer's states on this rank."""
        found: dict[tuple[Role, Tier], int] = {}

        def add(tier: Tier, nbytes: int) -> None:
            if nbytes:
                found["optimizer", tier] = found.get(("optimizer", tier), 0) + nbytes

        for shard in self.stepped:
            for value in self.optimizer.state.get(shard.tensor, {}).values():
                if shard.trained.in_place or not (isinstance(value, Tensor) and value.ndim):
                    add(shard.trained.master.tier, nbytes_of(value))
        for whole in self.owned:
            tier = whole.trained.master.tier if whole.trained.in_place else Tier.CPU
            for name, value in self.optimizer.state.get(whole.tensor, {}).items():
                if name not in whole.states:
                    add(tier, nbytes_of(value))
        slabs = [one.slabs for one in self.unit_states.values()] + [whole.states for whole in self.owned]
        for slab in (slab for states in slabs for slab in states.values()):
            add(slab.tier, slab.nbytes)
        return found

    def _homes(self) -> dict[int, tuple[ShardedModel, Trained, int]]:
        """id(parameter) -> its model, its gradients and its place among them."""
        return {
            id(member.parameter): (model, unit.trained, index)
            for model in self.models
            for unit in model.units
            if unit.trained is not None
            for index, member in enumerate(unit.trained.buffer.members)
        }

    def _join(self, number: int, own: Sequence[Parameter], homes: dict[int, tuple[ShardedModel, Trained, int]]) -> None:
        """What rests here of the parameters `own` joins group `number`."""
        group = self.optimizer.param_groups[number]
        whole, shaped = self.is_whole(number) and not self.together, self.is_whole(number) and self.together
        new: list[Whole] = []
        for parameter in own:
            if id(parameter) not in homes:
                continue
            model, trained, index = homes[id(parameter)]
            self.members.setdefault(id(trained), (trained, []))[1].append(index)
            self.places.setdefault(number, []).append((trained, index))
            if whole:
                new.append(Whole(trained, index, number, model.engine))
            for shard in _shards_of(trained, index, trained.buffer.layout.slots[index].shape if shaped else None):
                shard.group = number
                self.shards.append(shard)
                if not whole:
                    states = self.unit_states.setdefault(id(trained), UnitStates(trained, model.engine))
                    states.join(shard.begin, shard.end)
                    shard.unit_states = states
                    group["params"].append(shard.tensor)
                    self.stepped.append(shard)
        assign(new, self.wholes)
        self.wholes += new
        # Of other ranks' too: a script may give them for all to be clipped.
        group["params"] += [one.tensor for one in new]

    def pairs(self) -> Iterator[tuple[int, Tensor]]:
        """Of what is stepped in shards: id(parameter), and a shard of it."""
        for shard in self.stepped:
            yield id(shard.parameter), shard.tensor

    def elsewhere(self, here: Sequence[Shard]) -> dict[int, Tensor]:
        """Of each group of which something has a gradient, but nothing of `here`: one of its parameters, without memory."""
        having = {shard.group for shard in here if shard.gradient() is not None}
        found: dict[int, Tensor] = {}
        for number, places in self.places.items():
            for trained, index in places if number not in having else ():
                if trained.gradients.at_rest is not None and trained.gradients.used[index]:
                    slot = trained.buffer.layout.slots[index]
                    shape = slot.shape if self.is_whole(number) else (slot.numel,)
                    found[number] = torch.empty(shape, dtype=trained.master.dtype, device="meta")
                    break
        return found

    @property
    def partly(self) -> set[int]:
        """The ids of what holds something that is stepped in shards, on this rank or another."""
        whole = {(id(one.trained), one.index) for one in self.wholes}
        return {key for key, (_, indices) in self.members.items() if any((key, i) not in whole for i in indices)}

    @property
    def owned(self) -> list[Whole]:
        """Those of `wholes` that this rank steps."""
        return [whole for whole in self.wholes if whole.is_own]

    def _count(self) -> None:
        driven = {id(parameter) for parameter in self.driven()}
        self.frozen = [parameter for own in self.parameters for parameter in own if id(parameter) not in driven]
        self.strays = {key: (g, index) for key, (_, g, index) in self._homes().items() if key not in driven}
        # Gradients of whole parameters are multiplied as they are, before they leave.
        some = {id(whole.trained) for whole in self.wholes}
        alone = {key for key, (g, indices) in self.members.items() if len(indices) == len(g.buffer.members)}
        self.sole = alone - some
        every = [trained for trained, _ in (*self.members.values(), *self.strays.values())]
        double = any(trained.master.dtype == torch.float64 for trained in every)
        self.norm_dtype = torch.float64 if double else torch.float32


def _steps_as_torchs(optimizer: Optimizer) -> bool:
    """Whether its step is that of one of _FUSED: a class derived from it may have one that reads no scale."""
    step = inspect.unwrap(type(optimizer).step)
    return any(isinstance(optimizer, kind) and step is inspect.unwrap(kind.step) for kind in _FUSED)


def _shards_of(trained: Trained, index: int, shape: tuple[int, ...] | None = None) -> Iterator[Shard]:
    """What rests here of one parameter. shape: its own, where it is held so."""
    for piece in trained.region.pieces:
        if piece.slot == index:
            yield Shard(trained, piece.slot, piece.in_slot, piece.in_shard, piece.numel, shape)
