"""`state_dict` and `load_state_dict` of a prepared optimizer: torch's own verbs, shown the optimizer as it was before prepare.

    user's groups    [q.lora_A (8, 512), q.lora_B (512, 8)]      what torch's verbs see: the numbers 0 and 1, whole states
    groups now       [q.lora_A[0:4096], q.lora_B[0:1024]]        what a step sees on rank 0

So the dictionary is torch's to the letter, with its numbering, its hooks and what the optimizer's class adds to it. It goes
into an optimizer that was never prepared, and comes from one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import OptimizerError
from .comparing import plain
from .groups import Groups
from .optimizer_state import OptimizerState
from .state_kinds import MACHINE, Key, WholeState, digest, has_stepped, in_little_memory, split_states


@dataclass(frozen=True)
class _Loaded:
    """A dictionary that was read and found to fit.

    groups: their new settings. besides: under keys that are no parameters. frozen: the states of weights that are not trained.
    """

    groups: Sequence[Mapping[str, Any]]
    states: Mapping[Key, WholeState]
    besides: Mapping[Any, Any]
    frozen: Mapping[Parameter, Mapping[str, Any]]

    def digest(self) -> int:
        settings = [
            sorted((name, plain(value)) for name, value in group.items() if name != "params") for group in self.groups
        ]
        return digest(self.states, settings)


class OptimizerDict:
    """The dictionary of one prepared optimizer.

    states, groups: the optimizer's.
    """

    def __init__(self, states: OptimizerState, groups: Groups) -> None:
        self._states = states
        self._groups = groups

    def install(self) -> OptimizerDict:
        """Set both verbs on the optimizer, as methods of this one object, not of its class. Gives this."""

        def state_dict(_: Optimizer) -> dict[str, Any]:
            """torch's `state_dict` of the optimizer as it was before prepare: whole states, copied to the CPU of every rank.

            Collective where states are sharded (zero_stage 1 to 3 on several ranks): call it on every rank, not only on the
            main process. For states that a host cannot hold once for each rank, use accelerator.save_state.
            """
            return self.give()

        def load_state_dict(_: Optimizer, state_dict: dict[str, Any]) -> None:
            """torch's `load_state_dict`: each rank keeps its part of a whole `state_dict`. Collective: the same on every rank.

            Raises OptimizerError, before anything is changed, if the dictionary does not fit.
            """
            self.take(state_dict)

        for verb in (state_dict, load_state_dict):
            setattr(self._states.optimizer, verb.__name__, MethodType(verb, self._states.optimizer))
        return self

    def give(self) -> dict[str, Any]:
        """What torch's `state_dict` gives for the optimizer as it was before prepare; states are whole, on the CPU, and copies.

        The same on every rank. Collective where states are sharded, else without communication. Raises RankError if the other
        ranks do not come, StoreError for a drive that fails.
        """
        states, optimizer = self._states, self._states.optimizer
        states.refuse_released()
        if states.sharded:
            stage = max(model.plan.stage for model in states.models)
            states.ranks.assemble("optimizer.state_dict()", f"under zero_stage {stage}")
        states.settle()
        whole = states.whole()
        state: defaultdict[Any, Any] = defaultdict(dict)
        for parameter in _flat(self._groups.parameters):
            key = states.keys.get(id(parameter))
            if key in whole:
                state[parameter] = whole[key]
            elif id(parameter) in states.dormant:
                kept = states.dormant[id(parameter)]
                state[parameter] = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in kept.items()}
        state.update(states.besides)
        with self._groups.as_given(state=state):
            found: dict[str, Any] = type(optimizer).state_dict(optimizer)
        return found

    def take(self, state_dict: dict[str, Any]) -> None:
        """What torch's `load_state_dict` does: each rank keeps its intervals of `state_dict`. Collective.

        How an optimizer computes (fused, foreach, capturable, differentiable) stays as it is here.
        Before anything is changed, raises OptimizerError if the dictionary does not fit or the ranks were given different ones,
        and RankError for another rank's error. Raises StoreError for a drive that fails.
        """
        states, ranks = self._states, self._states.ranks
        states.refuse_released()
        ranks.assemble("optimizer.load_state_dict()")
        loaded = ranks.together(lambda: self._read(state_dict))
        for model in states.models:  # what has stepped needs a place for its states
            model.thawing.thaw(p for p in loaded.frozen if model.thawing.holds(p) and has_stepped(loaded.frozen[p]))
        if any(id(parameter) in states.keys for parameter in loaded.frozen):
            loaded = ranks.together(lambda: self._read(state_dict))
        sums = ranks.gather_numbers(loaded.digest())
        other = next((rank for rank, found in enumerate(sums) if found != sums[0]), None)
        if other is not None:
            raise OptimizerError(
                f"optimizer.load_state_dict() was given one dictionary on rank 0 and another on rank {other}: their settings, "
                "step counts or kinds of states differ. Nothing was loaded. Load the same one on every rank."
            )
        ranks.together(lambda: states.replace(loaded.states, loaded.besides))
        states.dormant = {id(parameter): in_little_memory(state) for parameter, state in loaded.frozen.items()}
        for group, new in zip(states.optimizer.param_groups, loaded.groups, strict=True):
            kept = {name: group[name] for name in (*MACHINE, "params") if name in group}
            group.clear()
            group.update({name: value for name, value in new.items() if name not in MACHINE} | kept)

    def added(self) -> dict[str, Any]:
        """What the class puts into its dictionary beside states and groups, such as a count of its own. No communication."""
        optimizer = self._states.optimizer
        if type(optimizer).state_dict is Optimizer.state_dict:
            return {}
        with self._groups.as_given(state=defaultdict(dict)):
            found = type(optimizer).state_dict(optimizer)
        return {name: value for name, value in found.items() if name not in ("state", "param_groups")}

    def take_added(self, added: Mapping[str, Any]) -> None:
        """Let the class take what `added` gave, and keep its states and groups as they are. No communication."""
        optimizer = self._states.optimizer
        if not added:
            return
        stand_ins = [[self._stand_in(parameter) for parameter in own] for own in self._groups.parameters]
        with self._groups.as_given(stand_ins, defaultdict(dict)):
            now = type(optimizer).state_dict(optimizer)
            type(optimizer).load_state_dict(optimizer, now | dict(added))

    def _read(self, state_dict: dict[str, Any]) -> _Loaded:
        """What torch's verb, its hooks included, makes of `state_dict`. Nothing of the prepared optimizer is changed."""
        states, optimizer = self._states, self._states.optimizer
        states.settle_here()
        # torch casts states to their parameter's dtype and moves them to its device: here the master's, and the CPU.
        stand_ins = [[self._stand_in(parameter) for parameter in own] for own in self._groups.parameters]
        with self._groups.as_given(stand_ins, defaultdict(dict)):
            try:
                type(optimizer).load_state_dict(optimizer, state_dict)
            except ValueError as error:
                raise OptimizerError(f"{self._fault(error)} {self._count()}") from error
            groups, found = optimizer.param_groups, optimizer.state
        numbers = {id(stand_in): index for index, stand_in in enumerate(_flat(stand_ins))}
        given = _flat(self._groups.parameters)
        by_number = {numbers[id(key)]: value for key, value in found.items() if id(key) in numbers and value}
        without = next(
            (n for n, s in by_number.items() for v in s.values() if isinstance(v, Tensor) and v.is_meta), None
        )
        if without is not None:
            raise OptimizerError(
                self._fault(f"the states of parameter {without} are on the meta device, without values.")
            )
        shapes = {number: tuple(given[number].shape) for number in by_number}

        def name_of(number: int) -> str:
            key = states.keys.get(id(given[number]))
            return f"parameter {number}" if key is None else f"parameter {number} ({key[1]})"

        try:
            apart = split_states(
                by_number,
                shapes,
                name_of,
                lambda n: (key := states.keys.get(id(given[n]))) is not None and states.is_whole(key),
            )
        except OptimizerError as error:
            raise OptimizerError(
                f"{self._fault(error)} The dictionary is of another model, or a part of one that was saved on one rank."
            ) from error
        keys = {number: key for number in apart if (key := states.keys.get(id(given[number]))) is not None}
        besides = {key: value for key, value in found.items() if id(key) not in numbers}
        frozen = {given[number]: by_number[number] for number in apart if number not in keys}
        return _Loaded(groups, {key: apart[number] for number, key in keys.items()}, besides, frozen)

    def _fault(self, error: object) -> str:
        name, words = type(self._states.optimizer).__name__, str(error).rstrip(".")
        return f"optimizer.load_state_dict(): this {name} cannot take the dictionary: {words}. Nothing was loaded."

    def _count(self) -> str:
        counts = ", ".join(str(len(own)) for own in self._groups.parameters)
        return (
            f"It has {len(self._groups.parameters)} parameter group(s), of {counts} parameters, frozen ones included."
        )

    def _stand_in(self, parameter: Parameter) -> Parameter:
        key = self._states.keys.get(id(parameter))
        dtype = parameter.dtype if key is None else self._states.dtypes[key]
        return Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), requires_grad=False)


def _flat(parameters: Sequence[Sequence[Parameter]]) -> list[Parameter]:
    return [parameter for own in parameters for parameter in own]
