"""What a checkpoint keeps of a run's models: masters, frozen weights, buffers; taken, compared with a run, and brought back.

    model0/trained/<name>    each rank its intervals
    model0/frozen/<name>     each rank its intervals
    model0/buffer/<name>     rank 0's; another rank's are in its state, where they differ

Models are known by their order, weights by name.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files.writer import DTYPES, as_bytes
from ..ranks.agreeing import attempt
from ..ranks.ranks import Ranks
from ..step import intervals
from ..step.intervals import Interval
from ..zero.buffers import bytes_of, named_buffers, packed, parts_of, replace_buffers, unpacked, written
from ..zero.sharded import ShardedModel
from .pieces import Piece, pieces_of, whole_pieces
from .read import Checkpoint
from .standing import Standing


@dataclass(frozen=True)
class Changed:
    """What of a model is trained in one of two and not in the other.

    thawed: names that the checkpoint has trained, and this run has frozen. since: that this run trains, and the checkpoint
    had frozen.
    """

    thawed: set[str]
    since: set[str]


@dataclass(frozen=True)
class RunModels:
    """The models of a run, by their order."""

    ranks: Ranks
    models: Sequence[ShardedModel]
    standing: Standing = field(default_factory=Standing)

    # Taking.

    def trained_pieces(self) -> list[Piece]:
        """This rank's part of the masters."""
        return self.standing.of(
            "trained",
            [one for model in self.models for one in rests_of(model)],
            [model.engine.share.alone for model in self.models],
            lambda: [
                piece
                for number, model in enumerate(self.models)
                for piece in pieces_of(
                    model.ranks,
                    f"model{number}/trained",
                    intervals.trained(model),
                    apart=model.engine.share.alone,
                )
            ],
        )

    def frozen_pieces(self, only: Sequence[frozenset[str]] | None = None) -> list[Piece]:
        """This rank's part of the frozen weights. only: for each model, the names that are wanted."""
        if only is not None and not any(only):
            return []
        return [
            piece
            for number, model in enumerate(self.models)
            for piece in pieces_of(
                model.ranks,
                f"model{number}/frozen",
                [held for held in intervals.frozen(model) if only is None or held.name in only[number]],
            )
        ]

    def buffers(self, pieces: list[Piece]) -> dict[str, Any]:
        """Rank 0's go into `pieces`, or are given if safetensors lacks their kind; another rank's are given if they differ.

        Running statistics may. Raises CheckpointError for a buffer that is no plain tensor and not made of some.
        """
        held = {address: buffer for address, _, buffer in self._persistent_buffers() if buffer.numel()}
        mine, error = attempt(lambda: _sum_of(held))
        sums = self.ranks.gather_numbers(mine or 0)
        if error is not None:  # perhaps on this rank alone: a script may have replaced a buffer
            raise error
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

    # Bringing back.

    def check(self, checkpoint: Checkpoint, buffers: Mapping[str, Any], *, strict: bool) -> list[Changed]:
        """What the checkpoint has trained of each model and this run has not, and the other way round.

        buffers: of rank 0, as `buffers` has given them. Raises CheckpointError if it is of other models.
        """
        changed = [self._changed(checkpoint, number, strict=strict) for number in range(len(self.models))]
        for address, _, buffer in self._persistent_buffers():
            saved, where_it_is = buffers.get(address), _where(checkpoint, address)
            if saved is None and where_it_is is None:
                continue
            shape = tuple(unpacked(saved).shape) if saved is not None else checkpoint.shape(where_it_is or address)
            if shape != tuple(buffer.shape):
                raise CheckpointError(
                    f"{checkpoint.directory}: {address} has shape {shape}, but this model's is {tuple(buffer.shape)}."
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

    def restore(
        self, checkpoint: Checkpoint, states: Sequence[dict[str, Any]], frozen: Mapping[int, Container[str]]
    ) -> None:
        """Read this rank's intervals, and the buffers. frozen: the names that are read too, by model. No communication."""
        for number, model in enumerate(self.models):
            wanted = frozen.get(number, ())
            trained = intervals.trained(model)
            known = [held for held in trained if f"model{number}/trained/{held.name}" in checkpoint]
            fill(checkpoint, f"model{number}/trained", known)
            since = [held for held in trained if held not in known and held.name in wanted]
            fill(checkpoint, f"model{number}/frozen", since)
            fill(checkpoint, f"model{number}/frozen", [held for held in intervals.frozen(model) if held.name in wanted])
        self._restore_buffers(checkpoint, states)

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


def _sum_of(buffers: Mapping[str, Tensor]) -> int:
    """A checksum, by which ranks find out whether theirs are the same."""
    found = 0
    for address, buffer in buffers.items():
        try:
            parts = parts_of(buffer)
        except TypeError as error:
            raise CheckpointError(f"{address} {error}, which a checkpoint cannot hold.") from error
        for part in parts:
            found = zlib.crc32(as_bytes(bytes_of(part)), found)
    return found


def rests_of(model: ShardedModel) -> list[object]:
    """What the intervals of the trained weights are made from, and what they rest in."""
    trained = model.trained()
    return [model, *trained, *(one.master for one in trained)]


def fill(checkpoint: Checkpoint, prefix: str, held: Sequence[Interval]) -> None:
    """Read intervals from `prefix/<name>`."""
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
