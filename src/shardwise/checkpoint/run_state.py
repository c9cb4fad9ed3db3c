"""Everything that a run needs to go on bit for bit: taken into a draft of a checkpoint, and brought back from one.

    model0/trained/<name>                 fp32 masters             each rank its intervals
    model0/frozen/<name>                  an adapter's; all only where asked for     each rank its intervals
    model0/adapter/<adapter>/<name>       what peft computes of an adapter           rank 0's
    model0/buffer/<name>                  rank 0's
    optimizer0/<state>/model0/<name>      moments                  each rank its intervals
    average0/ema/model0/<name>            of the masters           each rank its intervals
    state of each rank                    generators, loaders, step counts, names in parameter groups
    registered objects                    rank 0's; another rank's where they differ
    state of rank 0 besides               group settings, schedulers, loss scale, counters

Models, optimizers, schedulers, loaders and objects are matched by their order, weights by name. What a run has none of (no
optimizer in an evaluation) is left out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..data.loader import PreparedLoader
from ..data.positions import go_to, match, position
from ..errors import CheckpointError
from ..files.writer import DTYPES, Spec, as_bytes
from ..plan.precision import LossScaler
from ..ranks.ranks import Ranks, attempt_or_interrupt
from ..step import intervals
from ..step.averaging import ShardedEMA, refuse_swapped
from ..step.intervals import Interval
from ..step.optimizer import ShardedOptimizer
from ..zero.buffers import bytes_of, named_buffers, packed, parts_of, replace_buffers, unpacked, written
from ..zero.sharded import ShardedModel
from .codec import encode
from .generators import generator_states, set_generator_states
from .model_facts import KeptAdapters
from .read import Checkpoint
from .saved_states import check_counts, lacking
from .write import Draft, Piece, whole_pieces


@dataclass(frozen=True)
class Changed:
    """What of a model is trained in one of two and not in the other.

    thawed: names that the checkpoint has trained, and this run has frozen. since: that this run trains, and the checkpoint
    had frozen.
    """

    thawed: set[str]
    since: set[str]


@dataclass
class RunState:
    """The objects of a run whose state counts. counters: plain numbers that come back from `restore`."""

    ranks: Ranks
    models: Sequence[ShardedModel]
    steppers: Sequence[ShardedOptimizer]
    schedulers: Sequence[LRScheduler]
    loaders: Sequence[PreparedLoader]
    objects: Sequence[Any]
    averages: Sequence[ShardedEMA]
    scaler: LossScaler

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return max((stepper.steps for stepper in self.steppers), default=0)

    # Taking.

    def settle(self) -> None:
        """Finish what is under way on the device. Collective. Raises PrepareError while a model has averaged weights."""
        refuse_swapped(self.models, "save_state and load_state")
        for model in self.models:
            model.settle()
        for stepper in self.steppers:
            stepper.raise_if_bad()

    def draft(self, counters: dict[str, Any], adapters: Sequence[KeptAdapters], *, with_frozen: bool) -> Draft:
        """This rank's part of a checkpoint. Reads nothing yet: pieces are read when they are written, or copied.

        adapters: of each model, what is kept of them. with_frozen: all frozen weights are kept.
        Raises CheckpointError for state that a checkpoint cannot hold. Collective.
        """
        rank = self.ranks.rank
        pieces: list[Piece] = []
        # All communication comes before what may fail on one rank alone.
        state: dict[str, Any] = {"buffers": self._buffers(pieces)}
        objects, tensors = self._objects()
        state["generators"] = generator_states(self.ranks.device)
        for number, model in enumerate(self.models):
            pieces += self._pieces(f"model{number}/trained", intervals.trained(model))
        pieces += self.frozen_pieces(None if with_frozen else [kept.frozen for kept in adapters])
        for number, kept in enumerate(adapters):
            pieces += whole_pieces({f"model{number}/adapter/{name}": tensor for name, tensor in kept.computed.items()})
        state["optimizers"] = [self._optimizer(number, pieces) for number in range(len(self.steppers))]
        for number, average in enumerate(self.averages):
            pieces += self._pieces(self._place_of(number), average.intervals())
        state["loaders"] = [position(loader) for loader in self.loaders]
        if rank == 0:
            state["models"] = len(self.models)
            state["schedulers"] = [scheduler.state_dict() for scheduler in self.schedulers]
            state["averages"] = [average.updates for average in self.averages]
            state["scaler"] = self.scaler.state_dict()
            state["counters"] = counters
        encoded = {**encode(state, tensors, "state"), "objects": objects}
        return Draft([*pieces, *whole_pieces(tensors)], encoded)

    def frozen_pieces(self, only: Sequence[Container[str]] | None = None) -> list[Piece]:
        """This rank's part of the frozen weights. only: for each model, the names that are wanted."""
        return [
            piece
            for number, model in enumerate(self.models)
            for piece in self._pieces(
                f"model{number}/frozen",
                [held for held in intervals.frozen(model) if only is None or held.name in only[number]],
            )
        ]

    def _pieces(self, prefix: str, held: Sequence[Interval]) -> Iterator[Piece]:
        for interval in intervals.share(held, self.ranks.rank, self.ranks.world_size):
            address = f"{prefix}/{interval.name}"
            spec = Spec(address, interval.dtype, (interval.numel,))
            yield Piece(address, interval.shape, interval.begin, spec, interval.read)

    def _objects(self) -> tuple[Any, dict[str, Tensor]]:
        """The registered objects' states, encoded, and their tensors; None and nothing where they are equal to rank 0's."""
        tensors: dict[str, Tensor] = {}
        encoded, error = attempt_or_interrupt(
            lambda: encode([item.state_dict() for item in self.objects], tensors, "objects")
        )
        mine = zlib.crc32(json.dumps(encoded).encode())
        for tensor in tensors.values():
            mine = zlib.crc32(as_bytes(tensor), mine)
        sums = self.ranks.gather_numbers(mine)
        if error is not None:
            raise error
        return (None, {}) if self.ranks.rank and mine == sums[0] else (encoded, tensors)

    def _buffers(self, pieces: list[Piece]) -> dict[str, Any]:
        """Rank 0's go into `pieces`, or are given if safetensors lacks their kind; another rank's are given if they differ.

        Running statistics may. Raises CheckpointError for a buffer that is no plain tensor and not made of some.
        """
        held = {address: buffer for address, _, buffer in self._persistent_buffers() if buffer.numel()}
        mine = 0
        for address, buffer in held.items():
            try:
                parts = parts_of(buffer)
            except TypeError as error:  # every rank has the same model
                raise CheckpointError(f"{address} {error}, which a checkpoint cannot hold.") from error
            for part in parts:
                mine = zlib.crc32(as_bytes(bytes_of(part)), mine)
        sums = self.ranks.gather_numbers(mine)
        kept = {address: packed(buffer, DTYPES.values()) for address, buffer in held.items()}
        if self.ranks.rank == 0:
            plain = {address: found for address, found in kept.items() if isinstance(found, Tensor)}
            pieces += whole_pieces({address: found.detach().to("cpu", copy=True) for address, found in plain.items()})
            return {address: found for address, found in kept.items() if address not in plain}
        return {} if mine == sums[0] else kept

    def _persistent_buffers(self) -> Iterator[tuple[str, int, Tensor]]:
        """(address, number of the model, buffer)"""
        for number, model in enumerate(self.models):
            for path, module, name, buffer in named_buffers(model.model):
                if name not in module._non_persistent_buffers_set:
                    yield f"model{number}/buffer/{path}", number, buffer

    def _optimizer(self, number: int, pieces: list[Piece]) -> dict[str, Any]:
        stepper = self.steppers[number]
        homes = self._homes(stepper)
        held: dict[str, list[Interval]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for state in stepper.states.intervals():
            model, name = state.key
            for key, interval in state.elementwise.items():
                held.setdefault(f"optimizer{number}/{key}/model{homes[model]}", []).append(interval)
            numbers[f"model{homes[model]}/{name}"] = state.numbers
        for prefix, found in held.items():
            pieces += self._pieces(prefix, found)
        groups = stepper.states.settings()
        mine: dict[str, Any] = {
            "numbers": numbers,
            "names": [sorted(f"model{homes[model]}/{name}" for model, name in names) for _, names in groups],
        }
        if self.ranks.rank == 0:
            mine["groups"] = [settings for settings, _ in groups]
            mine["sizes"] = _sizes(stepper)
            mine["steps"] = stepper.steps
            mine["step_was_skipped"] = stepper.step_was_skipped
            mine["besides"] = stepper.states.besides
        return mine

    def _place_of(self, number: int) -> str:
        """Where an average is kept."""
        model = self.averages[number].model
        return f"average{number}/ema/model{next(n for n, own in enumerate(self.models) if own is model)}"

    def _homes(self, stepper: ShardedOptimizer) -> list[int]:
        """Each of the optimizer's models as a number among the run's."""
        return [next(n for n, model in enumerate(self.models) if model is own) for own in stepper.models]

    # Bringing back.

    def check(self, checkpoint: Checkpoint, first: dict[str, Any], *, strict: bool = True) -> list[Changed]:
        """Raise CheckpointError, before anything is changed, if the checkpoint is of another model or another script.

        first: the saved state of rank 0. strict: False allows weights that only one of the two has. Every rank finds the
        same, without communication. Gives for each model which weights the checkpoint has trained and this run has not, and
        the other way round.
        """
        where = checkpoint.directory
        for kind, have, count in (
            ("model", len(self.models), first["models"]),
            ("optimizer", len(self.steppers), len(first["optimizers"])),
            ("scheduler", len(self.schedulers), len(first["schedulers"])),
            ("registered object", len(self.objects), len(first["objects"])),
            ("average", len(self.averages), len(first.get("averages", ()))),
        ):
            if have and have != count and kind not in lacking(first):
                raise CheckpointError(
                    f"{where} was saved with {count} {kind}(s), but this run has prepared {have}. Prepare the same objects "
                    "in the same order before load_state."
                )
        try:
            match(first["loaders"], checkpoint.manifest.world_size, self.loaders, self.ranks.world_size)
        except CheckpointError as error:
            raise CheckpointError(f"{where} {error}") from error
        changed = [self._changed(checkpoint, number, strict=strict) for number in range(len(self.models))]
        for address, _, buffer in self._persistent_buffers():
            saved, where_it_is = first["buffers"].get(address), _where(checkpoint, address)
            if saved is None and where_it_is is None:
                continue
            shape = tuple(unpacked(saved).shape) if saved is not None else checkpoint.shape(where_it_is or address)
            if shape != tuple(buffer.shape):
                raise CheckpointError(
                    f"{where}: {address} has shape {shape}, but this model's is {tuple(buffer.shape)}."
                )

        return changed

    def _changed(self, checkpoint: Checkpoint, number: int, *, strict: bool) -> Changed:
        members = {member.name: member for member in self.models[number].whole.members()}
        trained = {name for name, member in members.items() if member.trained}
        prefix = f"model{number}/trained/"
        known = {address.removeprefix(prefix) for address in checkpoint.addresses(prefix)}
        frozen = {*checkpoint.manifest.frozen["models"].get(f"model{number}", {}).get("sums", {})}
        frozen |= {address.split("/", 2)[2] for address in checkpoint.addresses(f"model{number}/frozen/")}
        missing, unknown = sorted(trained - known - frozen), sorted(known - members.keys())
        if strict and (missing or unknown):
            raise CheckpointError(
                f"{checkpoint.directory} does not fit this model: {_some('it has no', missing)}"
                f"{_some('this model has no', unknown)}build the model and its adapter as they were when it was saved."
            )
        known &= members.keys()
        trained -= set() if strict else set(missing)
        for name in sorted(known):
            if checkpoint.shape(prefix + name) != members[name].shape:
                raise CheckpointError(
                    f"{checkpoint.directory}: {prefix}{name} has shape {checkpoint.shape(prefix + name)}, but this model's is "
                    f"{members[name].shape}."
                )
        return Changed(thawed=known - trained, since=trained - known)

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

    def restore_tensors(
        self, checkpoint: Checkpoint, states: Sequence[dict[str, Any]], frozen: Mapping[int, Container[str]]
    ) -> None:
        """Read this rank's intervals, of weights and optimizer states. frozen: the names that are read too, by model.

        No communication: the caller agrees on how it went, and then calls `publish`.
        """
        for number, model in enumerate(self.models):
            wanted = frozen.get(number, ())
            trained = intervals.trained(model)
            known = [held for held in trained if f"model{number}/trained/{held.name}" in checkpoint]
            _fill(checkpoint, f"model{number}/trained", known)
            since = [held for held in trained if held not in known and held.name in wanted]
            _fill(checkpoint, f"model{number}/frozen", since)
            _fill(
                checkpoint, f"model{number}/frozen", [held for held in intervals.frozen(model) if held.name in wanted]
            )
        self._restore_buffers(checkpoint, states)
        for number, average in enumerate(self.averages):
            place = self._place_of(number)
            for held, weight in zip(average.intervals(), intervals.trained(average.model), strict=True):
                if f"{place}/{held.name}" in checkpoint:
                    _fill(checkpoint, place, [held])
                else:  # it is trained since then: the average begins with the weight
                    held.write(weight.read())
            average.updates = states[0]["averages"][number]
        for number, stepper in enumerate(self.steppers):
            self._restore_states(checkpoint, number, stepper, states)

    def _restore_buffers(self, checkpoint: Checkpoint, states: Sequence[dict[str, Any]]) -> None:
        own = dict(states[0]["buffers"])
        own |= states[self.ranks.rank]["buffers"] if self.ranks.rank < len(states) else {}
        new: list[dict[int, Tensor]] = [{} for _ in self.models]
        for address, number, buffer in self._persistent_buffers():
            where = _where(checkpoint, address)
            if buffer.numel() and (address in own or where is not None):
                value = unpacked(own[address]) if where is None or address in own else checkpoint.read_whole(where)
                new[number][id(buffer)] = written(buffer, value)
        for model, buffers in zip(self.models, new, strict=True):
            replace_buffers(model.model, buffers)

    def _restore_states(
        self, checkpoint: Checkpoint, number: int, stepper: ShardedOptimizer, states: Sequence[dict[str, Any]]
    ) -> None:
        homes = self._homes(stepper)
        numbers: dict[str, dict[str, Any]] = {}
        for state in states:
            numbers.update(state["optimizers"][number]["numbers"])
        kinds: dict[str, dict[str, torch.dtype]] = {}
        for address in checkpoint.addresses(f"optimizer{number}/"):
            _, key, parameter = address.split("/", 2)
            kinds.setdefault(parameter, {})[key] = checkpoint.dtype(address)
        stepper.states.make(
            lambda key: kinds.get(f"model{homes[key[0]]}/{key[1]}", {}),
            lambda key: numbers.get(f"model{homes[key[0]]}/{key[1]}", {}),
            states[0]["optimizers"][number].get("besides", {}),
        )
        for made in stepper.states.intervals():
            for name, interval in made.elementwise.items():
                _fill(checkpoint, f"optimizer{number}/{name}/model{homes[made.key[0]]}", [interval])

    def publish(self) -> None:
        """Bring the masters that were read into the weights that compute. Collective."""
        for model in self.models:
            intervals.publish(model)

    def group_names(self) -> list[list[set[str]]]:
        """For each optimizer, the names in each of its groups, over all ranks. Collective."""
        mine = []
        for stepper in self.steppers:
            homes = self._homes(stepper)
            mine.append([sorted(f"model{homes[m]}/{n}" for m, n in names) for _, names in stepper.states.settings()])
        rows = self.ranks.gather_objects(mine)
        return [_united([row[number] for row in rows]) for number in range(len(self.steppers))]

    def restore_rest(
        self,
        states: Sequence[dict[str, Any]],
        groups: Sequence[Sequence[set[str]]],
        since: set[str],
        *,
        generators: bool = True,
    ) -> dict[str, Any]:
        """Group settings, schedulers, scale, objects, loaders, generators; gives the counters.

        groups, since: as `check_groups` has seen them. generators: False leaves them as they are.
        """
        first = states[0]
        for number, stepper in enumerate(self.steppers):
            self._restore_groups(number, stepper, states, groups[number], since)
        for number, (scheduler, saved) in enumerate(zip(self.schedulers, first["schedulers"], strict=False)):
            with _taking(f"scheduler {number}", scheduler):
                scheduler.load_state_dict(saved)
        with _taking("the loss scale", self.scaler):
            self.scaler.load_state_dict(first["scaler"])
        own = states[self.ranks.rank]["objects"] if self.ranks.rank < len(states) else None
        for number, (item, saved) in enumerate(
            zip(self.objects, first["objects"] if own is None else own, strict=False)
        ):
            with _taking(f"registered object {number}", item):
                item.load_state_dict(saved)
        matched = match(first["loaders"], len(states), self.loaders, self.ranks.world_size)
        for number, (loader, saved) in enumerate(matched.pairs):
            with _taking(f"data loader {number}", loader):
                go_to(loader, saved, len(states), self.ranks)
        if self.ranks.rank == 0:
            matched.say()
        if generators:
            set_generator_states([state["generators"] for state in states], self.ranks)
        counters: dict[str, Any] = first["counters"]
        return counters

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
                _update(group, saved["groups"][place if place in same else same[0]])
        stepper.resume(saved["steps"], saved["step_was_skipped"])


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


@contextmanager
def _taking(what: str, item: Any) -> Iterator[None]:
    """An error of something that takes its state says whose it is."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} (a {type(item).__name__}) cannot take its state: {type(error).__name__}: {error}."
        ) from error


def _united(rows: Sequence[Sequence[Sequence[str]]]) -> list[set[str]]:
    """Group by group, the names that any rank has."""
    return [set().union(*(row[index] for row in rows)) for index in range(len(rows[0]))]


def _fill(checkpoint: Checkpoint, prefix: str, held: Sequence[Interval]) -> None:
    for interval in held:
        interval.write(checkpoint.read(f"{prefix}/{interval.name}", interval.begin, interval.numel))


def _where(checkpoint: Checkpoint, address: str) -> str | None:
    """The address of a persistent buffer, None if it is not there. Of an imported model, weights and buffers may be as one."""
    model, _, name = address.split("/", 2)
    others = [f"{model}/frozen/{name}"] if model not in checkpoint.manifest.frozen["models"] else []
    return next((found for found in (address, *others) if found in checkpoint), None)


def _some(words: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{words} {names[0]}{more}; "
