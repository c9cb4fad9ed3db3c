"""What an optimizer keeps beside the weights: its only owner, whether its constructor, a step or a load made it.

    whole     step 3   exp_avg (8, 512)                what torch's state_dict holds of a parameter
    rank 0    step 3   exp_avg [0, 2048)               in place, or in a slab where the plan rests it
    rank 1    step 3   exp_avg [2048, 4096)

An elementwise state has its parameter's shape and is cut as the parameter is. Anything else (step counts) is a number that goes
with every piece. `intervals` is the one walk over the states: checkpoints write what it gives, and `whole` puts it together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import OptimizerError
from ..zero.sharded import ShardedModel
from .exchange import exchange
from .groups import Groups
from .intervals import Interval, Rest, visiting
from .kept import mapped
from .resting import OFFLOADED
from .state_kinds import (
    COUNTS,
    MACHINE,
    NUMBERS,
    Key,
    StateOf,
    WholeState,
    digest,
    in_little_memory,
    is_like,
    kinds,
    split_states,
)
from .visits import Shard
from .wholes import Whole


class OptimizerState:
    """The states of one optimizer on this rank.

    optimizer: its dictionary `state` holds numbers, tensors that are changed in place, and stand-ins for what rests elsewhere.
    models:    whose parameters it drives. groups: what it holds of them on this rank.
    keys:      id(parameter) -> key, of what is trained. shapes, dtypes: by key, the parameter's and its master's.
    dormant:   id(parameter) -> what a constructor made for one that is frozen.
    """

    def __init__(self, optimizer: Optimizer, models: Sequence[ShardedModel], groups: Groups) -> None:
        self.optimizer = optimizer
        self.models = models
        self.groups = groups
        self.ranks = models[0].ranks
        self.dormant: dict[int, dict[str, Any]] = {}
        self.keys: dict[int, Key] = {}
        self.shapes: dict[Key, tuple[int, ...]] = {}
        self.dtypes: dict[Key, torch.dtype] = {}
        self._look()

    def _look(self) -> None:
        trained = [
            ((number, slot.name), slot.shape, member.parameter, unit.trained.master.dtype)
            for number, model in enumerate(self.models)
            for unit in model.units
            if unit.trained is not None
            for slot, member in zip(unit.trained.buffer.layout.slots, unit.trained.buffer.members, strict=True)
        ]
        self.keys = {id(parameter): key for key, _, parameter, _ in trained}
        self.shapes = {key: shape for key, shape, _, _ in trained}
        self.dtypes = {key: dtype for key, _, _, dtype in trained}

    @property
    def sharded(self) -> bool:
        """Whether a rank holds only a part of them."""
        return self.ranks.owners.size > 1 and any(model.plan.optimizer.sharded for model in self.models)

    @property
    def besides(self) -> dict[Any, Any]:
        """What the optimizer keeps under keys that are no parameters."""
        return {key: value for key, value in self.optimizer.state.items() if not isinstance(key, Tensor)}

    def refuse_released(self) -> None:
        """Raise OptimizerError if one of the models has been released: its shards are nobody's weights any more."""
        for model in self.models:
            if model.released:
                raise OptimizerError(
                    f"this {type(self.optimizer).__name__} drives shards of a {type(model.model).__name__} that has been "
                    "released (free_memory): it trains nothing any more. Make a new optimizer from the model's parameters, and "
                    "prepare both."
                )

    # On this rank.

    def _held(self) -> Iterator[tuple[Key, tuple[int, ...], int, bool, Shard | Whole]]:
        """(key, shape, begin, copied, what the optimizer holds) of each interval on this rank."""
        owners = {id(u.trained): n for n, model in enumerate(self.models) for u in model.units if u.trained}
        held: list[Shard | Whole] = [*self.groups.stepped, *self.groups.owned]
        for shard in held:
            trained = shard.trained
            slot = trained.buffer.layout.slots[shard.index]
            copied = not trained.plan.optimizer.sharded and self.ranks.owners.size > 1
            yield (owners[id(trained)], slot.name), slot.shape, shard.in_slot, copied, shard

    def intervals(self) -> list[StateOf]:
        """What the optimizer keeps for each interval on this rank; nothing for parameters that have taken no step."""
        found = []
        for key, shape, begin, copied, shard in self._held():
            state = self.optimizer.state.get(shard.tensor)
            if not state:
                continue
            elementwise, numbers = {}, {}
            for name, value in state.items():
                if name in shard.states and (isinstance(value, Tensor) or value is OFFLOADED):
                    slab = shard.states[name]
                    rest = Rest(slab, shard.state_begin, visits=visiting(slab, shard.trained))
                    elementwise[name] = Interval(key[1], shape, begin, shard.numel, slab.dtype, copied, rest)
                elif _is_elementwise(name, value, shard):
                    value = state[name] = value.contiguous()  # noqa: PLW2901 - the interval is written, too
                    rest = Rest(value, 0)
                    elementwise[name] = Interval(key[1], shape, begin, shard.numel, value.dtype, copied, rest)
                else:
                    numbers[name] = mapped(value, lambda tensor: tensor.detach().to("cpu", copy=True))
            found.append(StateOf(key, elementwise, numbers))
        return found

    def make(
        self,
        elementwise: Callable[[Key], Mapping[str, torch.dtype]],
        numbers: Callable[[Key], Mapping[str, Any]],
        besides: Mapping[Any, Any],
    ) -> None:
        """Replace all states by ones of the given kinds, for `Interval.write`, by the given numbers, and by `besides`.

        elementwise, numbers: what a parameter has, by its key. Both empty: it has taken no step.
        """
        for model in self.models:
            model.engine.lanes.states_change()
        self.optimizer.state.clear()
        self.optimizer.state.update(besides)
        self._clear_slabs(elementwise)
        self._make_for(set(self.shapes), elementwise, numbers)

    def _make_for(
        self,
        keys: Collection[Key],
        elementwise: Callable[[Key], Mapping[str, torch.dtype]],
        numbers: Callable[[Key], Mapping[str, Any]],
    ) -> None:
        groups = {id(tensor): group for group in self.optimizer.param_groups for tensor in group["params"]}
        for key, _, _, _, shard in self._held():
            if key not in keys:
                continue
            tensor = shard.tensor
            group = groups[id(tensor)]
            on_device = any(group.get(flag) for flag in ("fused", "capturable"))
            away = isinstance(shard, Whole) and not shard.trained.in_place
            state: dict[str, Any] = {}
            for name, value in numbers(key).items():
                counts = name in COUNTS and not on_device
                home = torch.device("cpu") if counts or away else self.ranks.device
                state[name] = mapped(value, partial(Tensor.to, device=home, copy=True))
                if name == "step" and group.get("fused") and isinstance(value, Tensor):
                    state[name] = state[name].float()  # the kernels take no other
            for name, dtype in elementwise(key).items():
                if isinstance(shard, Whole):
                    state[name] = shard.state_at_rest(name, dtype)
                elif shard.trained.in_place:
                    state[name] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
                else:
                    state[name] = shard.resting_place(name, dtype)
            if state:
                self.optimizer.state[tensor] = state

    def _clear_slabs(self, elementwise: Callable[[Key], Mapping[str, torch.dtype]]) -> None:
        """Let go of slabs for none of these states; the others are used again."""
        wanted: dict[int, set[tuple[str, torch.dtype]]] = {key: set() for key in self.groups.unit_states}
        for key, _, _, _, shard in self._held():
            if isinstance(shard, Whole):
                shard.states.clear()
            else:
                wanted[id(shard.trained)].update(elementwise(key).items())
        for unit, states in self.groups.unit_states.items():
            states.keep(wanted[unit])

    def _grow(self) -> None:
        """Have places off the device for what has joined the groups. No communication. Raises StoreError."""
        outgrown = [states for states in self.groups.unit_states.values() if states.outgrown]
        if not outgrown:
            return
        self.settle_here()
        for states in outgrown:
            states.grow()
        for shard in self.groups.stepped:
            state = self.optimizer.state.get(shard.tensor, {})
            for name in shard.states.keys() & state.keys():
                if isinstance(state[name], Tensor) or state[name] is OFFLOADED:
                    state[name] = shard.stand_in(name)

    def own_settings(self) -> list[dict[str, Any]]:
        """The settings of each parameter group."""
        return [
            {name: value for name, value in group.items() if name != "params" and name not in MACHINE}
            for group in self.optimizer.param_groups
        ]

    def settings(self) -> list[tuple[dict[str, Any], set[Key]]]:
        """Each parameter group: its settings, and the keys of what this rank holds of it."""
        keys = {id(shard.tensor): key for key, _, _, _, shard in self._held()}
        return [
            # Not of what stands there for parameters that another rank steps whole.
            (own, {keys[id(tensor)] for tensor in group["params"] if id(tensor) in keys})
            for own, group in zip(self.own_settings(), self.optimizer.param_groups, strict=True)
        ]

    # Whole.

    def replace(self, whole: Mapping[Key, WholeState], besides: Mapping[Any, Any]) -> None:
        """Let these be all states: this rank keeps its intervals of them. No communication; the device must be idle.

        Raises StoreError where a drive fails.
        """
        self.make(*kinds(whole), besides)
        self._write(whole)

    def _write(self, whole: Mapping[Key, WholeState]) -> None:
        for state in self.intervals():
            for name, interval in state.elementwise.items() if state.key in whole else ():
                flat = whole[state.key].elementwise[name]
                interval.write(flat[interval.begin : interval.begin + interval.numel])

    def adopt(self) -> None:
        """Take over the states that the optimizer has for the user's parameters. Collective.

        They are its constructor's, or those that it has loaded or made in steps before prepare.
        Raises OptimizerError for states that cannot be cut, and if those of the ranks differ.
        """
        apart = self.ranks.together(lambda: self._taken(self.groups.parameters))
        sums = self.ranks.gather_numbers(digest(apart))
        other = next((rank for rank, found in enumerate(sums) if found != sums[0]), None)
        if other is not None:
            raise OptimizerError(
                f"this {type(self.optimizer).__name__} has other states on rank {other} than on rank 0: step counts or kinds "
                "differ. Load the same state on every rank, before prepare or after it."
            )
        if any(sums):
            self.ranks.together(lambda: self.replace(apart, self.besides))

    def adopt_thawed(self, thawed: Collection[int]) -> None:
        """These parameters are trained from now on, some of them by this optimizer. Collective; raises StoreError."""
        self.ranks.together(lambda: self._take_thawed(thawed))

    def _take_thawed(self, thawed: Collection[int]) -> None:
        self._grow()
        self._look()
        for parameter in [p for p in self.groups.driven() if id(p) in self.dormant.keys() & thawed]:
            self.optimizer.state[parameter] = self.dormant.pop(id(parameter))
        apart = self._taken(self.groups.parameters)
        self._make_for(set(apart), *kinds(apart))
        self._write(apart)

    def _taken(self, parameters: Sequence[Sequence[Parameter]]) -> dict[Key, WholeState]:
        """What the optimizer's dictionary holds under the user's own parameters, which is taken out of it."""
        found: dict[Key, dict[str, Any]] = {}
        for group, own in zip(self.optimizer.param_groups, parameters, strict=True):
            for parameter in own:
                state = self.optimizer.state.pop(parameter, None)
                key = self.keys.get(id(parameter))
                if state and key is None:
                    self.dormant[id(parameter)] = in_little_memory(state)
                elif state and key is not None:
                    found[key] = self._with_memory(state, key, group)
        return split_states(found, self.shapes, lambda key: key[1], self.is_whole)

    def is_whole(self, key: Key) -> bool:
        """Whether it is never cut: who steps that parameter has all its states."""
        return any(
            self.keys.get(id(parameter)) == key
            for number, own in enumerate(self.groups.parameters)
            for parameter in own
            if self.groups.is_whole(number)
        )

    def _with_memory(self, state: Mapping[str, Any], key: Key, group: Mapping[str, Any]) -> dict[str, Any]:
        """What the constructor made of a parameter, in the master's dtype; made anew of one that had no memory then."""
        found = dict(state)
        if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            # What was made without values to look at is the same for every element.
            one = Parameter(torch.zeros(1, dtype=self.dtypes[key]))
            settings = {name: group.get(name, value) for name, value in self.optimizer.defaults.items()}
            try:
                anew = type(self.optimizer)([one], **settings).state[one]
            except TypeError as error:
                raise OptimizerError(
                    f"{type(self.optimizer).__name__} made states for {key[1]} when it had no memory yet, and cannot be made "
                    f"once more from its defaults ({error}). Make the optimizer after the model is prepared, or build the "
                    "model outside of accelerator.init()."
                ) from error
            found = {
                name: value.view(()).expand(self.shapes[key]) if is_like(value, (1,)) else value
                for name, value in anew.items()
            }
        for name, value in found.items():
            if is_like(value, self.shapes[key]) and value.is_floating_point() and name not in NUMBERS:
                found[name] = value.to(self.dtypes[key])
        return found

    def whole(self) -> dict[Key, dict[str, Any]]:
        """Of each parameter that has states: its numbers, and tensors in its shape on the CPU, the caller's own.

        The ranks must be settled. Collective where states are sharded. Raises StoreError; RankError for another rank's drive.
        """
        held = self.intervals()
        if not self.sharded:
            return {
                state.key: state.numbers | {name: i.read().view(i.shape) for name, i in state.elementwise.items()}
                for state in held
            }
        found: dict[Key, dict[str, Any]] = {}
        for numbers in self.ranks.gather_objects({state.key: state.numbers for state in held}):
            for key, values in numbers.items():
                found.setdefault(key, dict(values))
        mine = [((state.key, name), interval) for state in held for name, interval in state.elementwise.items()]
        for (key, name), tensor in exchange(mine, self.ranks).items():
            found[key][name] = tensor
        return found

    def settle(self) -> None:
        """Finish what is under way, so that what rests is what counts. Collective where states are sharded."""
        if not self.sharded:
            self.settle_here()
            return
        for model in self.models:
            model.settle()

    def settle_here(self) -> None:
        """`settle` for this rank alone. Raises StoreError for a write of a drive that failed."""
        for model in self.models:
            model.engine.synchronize()
            model.engine.stores.drain()


def _is_elementwise(name: str, value: Any, held: Shard | Whole) -> bool:
    """Whether a state has a number for each element of what the optimizer holds."""
    like = is_like(value, tuple(held.tensor.shape))
    return like and (bool(held.tensor.ndim) or name not in NUMBERS)  # a count has the shape of one without dimensions
