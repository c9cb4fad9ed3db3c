"""Everything that a run needs to go on bit for bit: taken into a draft of a checkpoint, and brought back from one.

    model0/trained/<name>                 fp32 masters             each rank its intervals
    model0/frozen/<name>                  only where asked for     each rank its intervals
    model0/buffer/<name>                  rank 0's
    optimizer0/<state>/model0/<name>      moments                  each rank its intervals
    state of each rank                    generators, loaders, step counts, names in parameter groups
    registered objects                    rank 0's; another rank's where they differ
    state of rank 0 besides               group settings, schedulers, loss scale, counters

Models, optimizers, schedulers, loaders and objects are matched by their order, weights by name. What a run has none of (no
optimizer in an evaluation) is left out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .checkpoint.codec import encode
from .checkpoint.read import Checkpoint
from .checkpoint.tensor_file import Spec, as_bytes
from .checkpoint.write import Draft, Piece, whole_pieces
from .data_loader import PreparedLoader
from .errors import CheckpointError
from .generators import generator_states, set_generator_states
from .loader_positions import go_to, match, position
from .zero import intervals
from .zero.collectives import Ranks, attempt
from .zero.intervals import Interval
from .zero.optimizer import ShardedOptimizer
from .zero.precision import LossScaler
from .zero.sharded import ShardedModel


@dataclass
class RunState:
    """The objects of a run whose state counts. counters: plain numbers that come back from `restore`."""

    ranks: Ranks
    models: Sequence[ShardedModel]
    steppers: Sequence[ShardedOptimizer]
    schedulers: Sequence[LRScheduler]
    loaders: Sequence[PreparedLoader]
    objects: Sequence[Any]
    scaler: LossScaler

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return max((stepper.steps for stepper in self.steppers), default=0)

    # Taking.

    def settle(self) -> None:
        """Finish what is under way on the device. Collective."""
        for model in self.models:
            intervals.settle(model)
        for stepper in self.steppers:
            stepper.raise_if_bad()

    def draft(self, counters: dict[str, Any], *, with_frozen: bool) -> Draft:
        """This rank's part of a checkpoint. Reads nothing yet: pieces are read when they are written, or copied.

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
        pieces += self.frozen_pieces() if with_frozen else []
        state["optimizers"] = [self._optimizer(number, pieces) for number in range(len(self.steppers))]
        state["loaders"] = [position(loader) for loader in self.loaders]
        if rank == 0:
            state["models"] = len(self.models)
            state["schedulers"] = [scheduler.state_dict() for scheduler in self.schedulers]
            state["scaler"] = self.scaler.state_dict()
            state["counters"] = counters
        encoded = {**encode(state, tensors, "state"), "objects": objects}
        return Draft([*pieces, *whole_pieces(tensors)], encoded)

    def frozen_pieces(self) -> list[Piece]:
        """This rank's part of the frozen weights."""
        return [
            piece
            for number, model in enumerate(self.models)
            for piece in self._pieces(f"model{number}/frozen", intervals.frozen(model))
        ]

    def _pieces(self, prefix: str, held: Sequence[Interval]) -> Iterator[Piece]:
        for interval in intervals.share(held, self.ranks.rank, self.ranks.world_size):
            address = f"{prefix}/{interval.name}"
            spec = Spec(address, interval.dtype, (interval.numel,))
            yield Piece(address, interval.shape, interval.begin, spec, interval.read)

    def _objects(self) -> tuple[Any, dict[str, Tensor]]:
        """The registered objects' states, encoded, and their tensors; None and nothing where they are equal to rank 0's."""
        tensors: dict[str, Tensor] = {}
        encoded, error = attempt(lambda: encode([item.state_dict() for item in self.objects], tensors, "objects"))
        mine = zlib.crc32(json.dumps(encoded).encode())
        for tensor in tensors.values():
            mine = zlib.crc32(as_bytes(tensor), mine)
        sums = self.ranks.gather_numbers(mine)
        if error is not None:
            raise error
        return (None, {}) if self.ranks.rank and mine == sums[0] else (encoded, tensors)

    def _buffers(self, pieces: list[Piece]) -> dict[str, Tensor]:
        """Rank 0's go into `pieces`; another rank's are given, if they differ (running statistics may)."""
        held = {address: buffer for address, buffer in self._persistent_buffers() if buffer.numel()}
        mine = 0
        for buffer in held.values():
            mine = zlib.crc32(as_bytes(buffer), mine)
        sums = self.ranks.gather_numbers(mine)
        if self.ranks.rank == 0:
            pieces += whole_pieces({address: buffer.detach().to("cpu", copy=True) for address, buffer in held.items()})
            return {}
        return {} if mine == sums[0] else held

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for number, model in enumerate(self.models):
            for prefix, module in model.model.named_modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and name not in module._non_persistent_buffers_set:
                        yield (
                            f"model{number}/buffer/{prefix}.{name}" if prefix else f"model{number}/buffer/{name}",
                            buffer,
                        )

    def _optimizer(self, number: int, pieces: list[Piece]) -> dict[str, Any]:
        stepper = self.steppers[number]
        homes = self._homes(stepper)
        held: dict[str, list[Interval]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for state in intervals.states(stepper):
            for key, interval in state.elementwise.items():
                held.setdefault(f"optimizer{number}/{key}/model{homes[state.model]}", []).append(interval)
            numbers[f"model{homes[state.model]}/{state.name}"] = state.numbers
        for prefix, found in held.items():
            pieces += self._pieces(prefix, found)
        groups = intervals.groups(stepper)
        mine: dict[str, Any] = {
            "numbers": numbers,
            "names": [sorted(f"model{homes[model]}/{name}" for model, name in names) for _, names in groups],
        }
        if self.ranks.rank == 0:
            mine["groups"] = [settings for settings, _ in groups]
            mine["steps"] = stepper.steps
            mine["step_was_skipped"] = stepper.step_was_skipped
        return mine

    def _homes(self, stepper: ShardedOptimizer) -> list[int]:
        """Each of the optimizer's models as a number among the run's."""
        return [next(n for n, model in enumerate(self.models) if model is own) for own in stepper.models]

    # Bringing back.

    def check(self, checkpoint: Checkpoint, first: dict[str, Any]) -> None:
        """Raise CheckpointError, before anything is changed, if the checkpoint is of another model or another script.

        first: the saved state of rank 0. Every rank finds the same, without communication.
        """
        where = checkpoint.directory
        for kind, have, count in (
            ("model", len(self.models), first["models"]),
            ("optimizer", len(self.steppers), len(first["optimizers"])),
            ("scheduler", len(self.schedulers), len(first["schedulers"])),
            ("registered object", len(self.objects), len(first["objects"])),
        ):
            if have and have != count:
                raise CheckpointError(
                    f"{where} was saved with {count} {kind}(s), but this run has prepared {have}. Prepare the same objects "
                    "in the same order before load_state."
                )
        try:
            match(first["loaders"], checkpoint.manifest.world_size, self.loaders, self.ranks.world_size)
        except CheckpointError as error:
            raise CheckpointError(f"{where} {error}") from error
        for number, model in enumerate(self.models):
            expected = {f"model{number}/trained/{m.name}": m.shape for m in intervals.members(model) if m.trained}
            known = set(checkpoint.addresses(f"model{number}/trained/"))
            missing, unknown = sorted(expected.keys() - known), sorted(known - expected.keys())
            if missing or unknown:
                raise CheckpointError(
                    f"{where} does not fit this model: {_some('it has no', missing)}{_some('this model trains no', unknown)}"
                    "build the model and its adapter as they were when it was saved."
                )
            for address, shape in expected.items():
                if checkpoint.shape(address) != shape:
                    raise CheckpointError(
                        f"{where}: {address} has shape {checkpoint.shape(address)}, but this model's is {shape}."
                    )

    def restore_tensors(self, checkpoint: Checkpoint, states: Sequence[dict[str, Any]], frozen: Sequence[int]) -> None:
        """Read this rank's intervals, of weights and optimizer states. frozen: models whose frozen weights are read too.

        No communication: the caller agrees on how it went, and then calls `publish`.
        """
        for number, model in enumerate(self.models):
            _fill(checkpoint, f"model{number}/trained", intervals.trained(model))
            if number in frozen:
                _fill(checkpoint, f"model{number}/frozen", intervals.frozen(model))
        own = states[self.ranks.rank]["buffers"] if self.ranks.rank < len(states) else {}
        with torch.no_grad():
            for address, buffer in self._persistent_buffers():
                if buffer.numel() and (address in own or address in checkpoint):
                    buffer.copy_(own[address] if address in own else checkpoint.read_whole(address))
        for number, stepper in enumerate(self.steppers):
            self._restore_states(checkpoint, number, stepper, states)

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
        intervals.make_states(
            stepper,
            lambda model, name: kinds.get(f"model{homes[model]}/{name}", {}),
            lambda model, name: numbers.get(f"model{homes[model]}/{name}", {}),
        )
        for made in intervals.states(stepper):
            for key, interval in made.elementwise.items():
                _fill(checkpoint, f"optimizer{number}/{key}/model{homes[made.model]}", [interval])

    def publish(self) -> None:
        """Bring the masters that were read into the weights that compute. Collective."""
        for model in self.models:
            intervals.publish(model)

    def group_names(self) -> list[list[set[str]]]:
        """For each optimizer, the names in each of its groups, over all ranks. Collective."""
        mine = []
        for stepper in self.steppers:
            homes = self._homes(stepper)
            mine.append([sorted(f"model{homes[m]}/{n}" for m, n in names) for _, names in intervals.groups(stepper)])
        rows = self.ranks.gather_objects(mine)
        return [_united([row[number] for row in rows]) for number in range(len(self.steppers))]

    def restore_rest(self, states: Sequence[dict[str, Any]], groups: Sequence[Sequence[set[str]]]) -> dict[str, Any]:
        """Group settings, schedulers, scale, objects, loaders, generators; gives the counters.

        groups: what `group_names` gave. Raises CheckpointError if they are not those that were saved.
        """
        first = states[0]
        for number, stepper in enumerate(self.steppers):
            self._restore_groups(number, stepper, states, groups[number])
        for scheduler, saved in zip(self.schedulers, first["schedulers"], strict=False):
            scheduler.load_state_dict(saved)
        self.scaler.load_state_dict(first["scaler"])
        own = states[self.ranks.rank]["objects"] if self.ranks.rank < len(states) else None
        for item, saved in zip(self.objects, first["objects"] if own is None else own, strict=False):
            item.load_state_dict(saved)
        matched = match(first["loaders"], len(states), self.loaders, self.ranks.world_size)
        for loader, saved in matched.pairs:
            go_to(loader, saved, len(states), self.ranks)
        if self.ranks.rank == 0:
            matched.say()
        set_generator_states([state["generators"] for state in states], self.ranks)
        counters: dict[str, Any] = first["counters"]
        return counters

    def _restore_groups(
        self, number: int, stepper: ShardedOptimizer, states: Sequence[dict[str, Any]], now: Sequence[set[str]]
    ) -> None:
        saved = states[0]["optimizers"][number]
        then = _united([state["optimizers"][number]["names"] for state in states])
        for group, names in zip(stepper.optimizer.param_groups, now, strict=True):
            found = next((index for index, other in enumerate(then) if other == names), None)
            if found is None:
                raise CheckpointError(
                    f"the parameter groups of optimizer {number} are not those that were saved: no saved group has exactly "
                    f"the {len(names)} parameters of the one with {min(names, default='nothing')}. Build the groups as they "
                    "were."
                )
            group.update(saved["groups"][found])
        stepper.steps = saved["steps"]
        stepper.step_was_skipped = saved["step_was_skipped"]


def _united(rows: Sequence[Sequence[Sequence[str]]]) -> list[set[str]]:
    """Group by group, the names that any rank has."""
    return [set().union(*(row[index] for row in rows)) for index in range(len(rows[0]))]


def _fill(checkpoint: Checkpoint, prefix: str, held: Sequence[Interval]) -> None:
    for interval in held:
        interval.write(checkpoint.read(f"{prefix}/{interval.name}", interval.begin, interval.numel))


def _some(words: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{words} {names[0].split('/', 2)[2]}{more}; "
