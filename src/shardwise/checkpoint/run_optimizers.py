"""What a checkpoint keeps of a run's optimizers: moments, counts, the settings of parameter groups; taken and brought back.

    optimizer0/<state>/model0/<name>    each rank its intervals
    state of each rank                  numbers of states, names in parameter groups
    state of rank 0 besides             group settings, step counts

Optimizers are known by their order, their states by the names of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ranks.ranks import Ranks
from ..step.intervals import Interval
from ..step.kept import packages_of, packed, unpacked
from ..step.optimizer import ShardedOptimizer
from ..step.sighting import Sighting, read_at_once, sight
from ..step.state_kinds import Key
from ..zero.sharded import ShardedModel
from .codec import encode
from .pieces import Piece, pieces_of
from .read import Checkpoint
from .run_models import fill, rests_of
from .saved_states import check_counts
from .standing import Standing


@dataclass(frozen=True)
class TakenStates:
    """What a save takes of an optimizer: `state` for this rank's, to be encoded, and `encoded`, which belongs to it and is.

    stand: pieces that stand until the next save. pieces: others.
    """

    state: dict[str, Any]
    encoded: dict[str, Any]
    stand: list[Piece]
    pieces: list[Piece]


@dataclass(frozen=True)
class RunOptimizers:
    """The optimizers of a run, by their order, and its models, in which their parameters are. standing: see `RunState`."""

    ranks: Ranks
    steppers: Sequence[ShardedOptimizer]
    models: Sequence[ShardedModel]
    standing: Standing = field(default_factory=Standing)

    # Taking.

    def taken(self, number: int, late: list[Callable[[], None]]) -> TakenStates:
        """What a save takes of one of them, now but for what `late` completes. No communication."""
        stepper = self.steppers[number]
        if self._is_apart(stepper) and self.ranks.rank:  # rank 0's count, and that has its own of other weights
            names = _names(stepper.states.settings(), self._homes(stepper))
            return TakenStates({"numbers": {}}, {"names": names}, stand=[], pieces=[])
        seen = sight(stepper.states)
        witnesses = [*(one for model in stepper.models for one in rests_of(model)), *seen.witnesses]
        facts = (seen.names, seen.groups, self._is_apart(stepper))
        plan = self.standing.of(f"optimizer{number}", witnesses, facts, lambda: self._planned(number, seen))
        is_plain = seen.is_plain and plan.names == seen.names
        if not is_plain:  # there are states that are neither intervals nor numbers
            plan = self._planned(number, seen)
        mine: dict[str, Any] = {"numbers": {} if is_plain else plan.numbers}
        if self.ranks.rank == 0:
            mine["groups"] = [packed(settings) for settings in stepper.states.own_settings()]
            mine["sizes"] = _sizes(stepper)
            mine["steps"] = stepper.steps
            mine["step_was_skipped"] = stepper.step_was_skipped
            mine["added"] = packed(stepper.dictionary.added())
            mine["besides"] = {key: packed(value) for key, value in stepper.states.besides.items()}
        encoded: dict[str, Any] = {"names": plan.in_groups}
        if is_plain:
            encoded["numbers"] = _counted(seen, plan.keys, late)
            return TakenStates(mine, encoded, stand=plan.pieces, pieces=[])
        return TakenStates(mine, encoded, stand=[], pieces=plan.pieces)

    def _planned(self, number: int, seen: Sighting) -> _Planned:
        stepper = self.steppers[number]
        homes = self._homes(stepper)
        held: dict[str, list[Interval]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        states = iter(found := stepper.states.intervals())
        for state in found:
            model, name = state.key
            for key, interval in state.elementwise.items():
                held.setdefault(f"optimizer{number}/{key}/model{homes[model]}", []).append(interval)
            numbers[f"model{homes[model]}/{name}"] = {key: packed(value) for key, value in state.numbers.items()}
        return _Planned(
            pieces=[
                piece
                for at, some in held.items()
                for piece in pieces_of(stepper.ranks, at, some, are_states=True, apart=self._is_apart(stepper))
            ],
            in_groups=_names(stepper.states.settings(), homes),
            numbers=numbers,
            keys=[f"model{homes[state.key[0]]}/{state.key[1]}" for state in found],
            names=[None if names is None else tuple(next(states).elementwise) for names in seen.names],
        )

    @staticmethod
    def _is_apart(stepper: ShardedOptimizer) -> bool:
        """Whether ranks have stepped a model each for itself (of zero_stage 0), so that all states are each rank's own."""
        return any(model.engine.share.apart for model in stepper.models)

    def _homes(self, stepper: ShardedOptimizer) -> list[int]:
        """Each of the optimizer's models as a number among the run's."""
        return [next(n for n, model in enumerate(self.models) if model is own) for own in stepper.models]

    def group_names(self) -> list[list[set[str]]]:
        """For each optimizer, the names in each of its groups, over all ranks. Collective."""
        mine = [_names(stepper.states.settings(), self._homes(stepper)) for stepper in self.steppers]
        rows = self.ranks.gather_objects(mine)
        return [_united([row[number] for row in rows]) for number in range(len(self.steppers))]

    # Bringing back.

    def check_groups(
        self, states: Sequence[dict[str, Any]], now: Sequence[Sequence[set[str]]], since: set[str]
    ) -> None:
        """Raise CheckpointError, before anything is changed, if the parameter groups are not those that were saved.

        now: what `group_names` gave. since: addresses of weights that were not trained when it was saved.
        """
        for number, groups in enumerate(now):
            then = _united([state["optimizers"][number]["names"] for state in states])
            mine = [names - since for names in groups]
            odd = next((names for names in mine if names and names not in then), None)
            gone = next((names for names in then if names and names not in mine), None)
            if odd is not None or gone is not None:
                which = odd if odd is not None else gone
                assert which is not None
                raise CheckpointError(
                    f"the parameter groups of optimizer {number} are not those that were saved: there, as here, should be one "
                    f"of exactly the {len(which)} parameters with {min(which)}. Build the groups as they were, those that "
                    "add_param_group has added included, before load_state."
                )
            saved = states[0]["optimizers"][number]
            check_counts(number, saved, _sizes(self.steppers[number]))

    def restore(self, checkpoint: Checkpoint, states: Sequence[dict[str, Any]]) -> None:
        """Read this rank's intervals of the states. No communication."""
        for number, stepper in enumerate(self.steppers):
            self._restore_states(checkpoint, number, stepper, states)

    def _restore_states(
        self, checkpoint: Checkpoint, number: int, stepper: ShardedOptimizer, states: Sequence[dict[str, Any]]
    ) -> None:
        homes = self._homes(stepper)
        numbers: dict[str, dict[str, Any]] = {}
        packages = packages_of(stepper.optimizer)
        for state in states:
            for address, found in state["optimizers"][number]["numbers"].items():
                numbers[address] = {key: unpacked(value, packages) for key, value in found.items()}
        kinds: dict[str, dict[str, torch.dtype]] = {}
        for address in checkpoint.addresses(f"optimizer{number}/"):
            _, key, parameter = address.split("/", 2)
            kinds.setdefault(parameter, {})[key] = checkpoint.dtype(address)
        stepper.states.make(
            lambda key: kinds.get(f"model{homes[key[0]]}/{key[1]}", {}),
            lambda key: numbers.get(f"model{homes[key[0]]}/{key[1]}", {}),
            {k: unpacked(v, packages) for k, v in states[0]["optimizers"][number].get("besides", {}).items()},
        )
        for made in stepper.states.intervals():
            for name, interval in made.elementwise.items():
                fill(checkpoint, f"optimizer{number}/{name}/model{homes[made.key[0]]}", [interval])

    def restore_groups(
        self, states: Sequence[dict[str, Any]], now: Sequence[Sequence[set[str]]], since: set[str]
    ) -> None:
        """Group settings and step counts. now, since: as `check_groups` has seen them."""
        for number, stepper in enumerate(self.steppers):
            self._restore_groups(number, stepper, states, now[number], since)

    def _restore_groups(
        self,
        number: int,
        stepper: ShardedOptimizer,
        states: Sequence[dict[str, Any]],
        now: Sequence[set[str]],
        since: set[str],
    ) -> None:
        saved = states[0]["optimizers"][number]
        then = _united([state["optimizers"][number]["names"] for state in states])
        for place, (group, names) in enumerate(zip(stepper.optimizer.param_groups, now, strict=True)):
            same = [index for index, other in enumerate(then) if other == names - since]
            if same:  # of groups without trained weights, which are all alike, the one in its place
                settings = saved["groups"][place if place in same else same[0]]
                _update(group, unpacked(settings, packages_of(stepper.optimizer)))
        stepper.dictionary.take_added(unpacked(saved.get("added", {}), packages_of(stepper.optimizer)))
        stepper.resume(saved["steps"], saved["step_was_skipped"])


@dataclass(frozen=True)
class _Planned:
    """What a save takes of an optimizer's states.

    in_groups: of each group the names of what is trained in it. numbers: by address, `packed`. keys: the addresses of what has
    taken a step. names: as `Sighting.names`, but as the intervals are.
    """

    pieces: list[Piece]
    in_groups: list[list[str]]
    numbers: dict[str, dict[str, Any]]
    keys: list[str]
    names: list[tuple[str, ...] | None]


def _counted(seen: Sighting, keys: Sequence[str], late: list[Callable[[], None]]) -> dict[str, Any]:
    """The numbers of what has taken a step, by `keys`, as `encode` would have them. What is on the device comes `late`."""
    found: dict[str, dict[str, Any]] = {key: {} for key in keys}
    rows = [found[key] for key in keys]
    for name, (places, values) in seen.counts.items():
        mine = [rows[place] for place in places]
        at_once = read_at_once(values)
        if at_once is None:
            for row, value in zip(mine, values, strict=True):
                row[name] = encode(value, {}, name)
            continue
        kind = str(at_once.dtype).removeprefix("torch.")
        if at_once.device.type == "cuda":
            late.append(_coming(at_once, name, kind, mine))
        else:
            _fill(at_once, name, kind, mine)
    return found


def _coming(values: Tensor, name: str, kind: str, rows: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """Have device values copied to the host behind what is enqueued; gives what waits for them, and fills the rows."""
    landing = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    landing.copy_(values, non_blocking=True)
    event = torch.accelerator.current_stream(values.device.index).record_event()

    def arrive() -> None:
        event.synchronize()
        _fill(landing, name, kind, rows)

    return arrive


def _fill(values: Tensor, name: str, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    for row, value in zip(rows, values.tolist(), strict=True):
        row[name] = {"!": "scalar", "dtype": kind, "value": encode(value, {}, name)}


def _names(groups: Sequence[tuple[dict[str, Any], set[Key]]], homes: Sequence[int]) -> list[list[str]]:
    """Of each group, the names of what is trained in it, sorted. groups: from `OptimizerState.settings`."""
    return [sorted(f"model{homes[model]}/{name}" for model, name in names) for _, names in groups]


def _sizes(stepper: ShardedOptimizer) -> list[int]:
    """How many parameters of the user's each group has, frozen ones included."""
    return [len(own) for own in stepper.groups.parameters]


def _update(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Settings of a group. A tensor (a learning rate) stays the object that it is: groups may share it, and scripts hold it."""
    for name, value in saved.items():
        own = group.get(name)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape:
            own.detach().copy_(value)
        else:
            group[name] = value


def _united(rows: Sequence[Sequence[Sequence[str]]]) -> list[set[str]]:
    """Group by group, the names that any rank has."""
    return [set().union(*(row[index] for row in rows)) for index in range(len(rows[0]))]
