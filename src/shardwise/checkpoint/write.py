"""Writing a checkpoint: every rank its own files into a hidden directory, which one rename makes the checkpoint.

    all ranks   rank-N.safetensors, rank-N.json           each synced
    agree       an error of any rank is everybody's, and the hidden directory goes
    rank 0      manifest.json, sync the directory, rename it, sync its parent
    agree

A kill before the rename leaves a hidden directory, which nobody takes for a checkpoint; after it, a complete one. What is
written is a `Draft`: its tensors are read one at a time (a save that waits), or were all copied before (one that does not).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..zero.collectives import Ranks
from . import files
from .manifest import MANIFEST, Entry, Index, Manifest, Part, text_checksum
from .tensor_file import Spec, TensorFile

STAGING = ".staging-"
REPLACED = ".replaced-"


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its address, the whole's shape, which elements of it, and how to get them as (numel,) values."""

    address: str
    shape: tuple[int, ...]
    begin: int
    spec: Spec
    read: Callable[[], Tensor]


@dataclass
class Draft:
    """One rank's part of a checkpoint. state: JSON; its tensors are among the pieces."""

    pieces: list[Piece] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def copied(self) -> Draft:
        """The same, with every tensor copied now: training may go on while it is written."""

        def holder(value: Tensor) -> Callable[[], Tensor]:
            return lambda: value

        pieces = [Piece(p.address, p.shape, p.begin, p.spec, holder(p.read())) for p in self.pieces]
        return Draft(pieces, self.state)

    @property
    def nbytes(self) -> int:
        return sum(piece.spec.nbytes for piece in self.pieces)


def whole_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Pieces of tensors in memory, each whole and under its own name."""

    def holder(value: Tensor) -> Callable[[], Tensor]:
        return lambda: value

    return [
        Piece(name, tuple(t.shape), 0, Spec(name, t.dtype, (t.numel(),)), holder(t.reshape(-1)))
        for name, t in tensors.items()
    ]


def write_checkpoint(target: Path, draft: Draft, ranks: Ranks, describe: Callable[[Sequence[Entry]], Manifest]) -> None:
    """Publish the ranks' drafts as the directory `target`. Collective; an error of any rank is raised on every rank.

    describe: on rank 0, the manifest for the files of all ranks. An earlier checkpoint at `target` is replaced.
    """
    staging = target.with_name(STAGING + target.name)
    _together(ranks, ranks.rank == 0, lambda: _open(staging))
    entry: Entry | None = None
    error: Exception | None = None
    try:
        if not staging.is_dir():
            raise CheckpointError(
                f"rank {ranks.rank} on {socket.gethostname()} does not see {staging}, which rank 0 made. Save to a "
                "directory that all machines share."
            )
        entry = _write_rank(staging, draft, ranks.rank)
    except Exception as caught:
        error = caught
    found: list[tuple[Entry | None, str | None]] = ranks.gather_objects(
        (entry, None if error is None else f"{type(error).__name__}: {error}")
    )
    failed = [(rank, text) for rank, (_, text) in enumerate(found) if text is not None]
    if failed:
        if ranks.rank == 0:
            _forget(staging)
        raise _failure(target, *failed[0]) from error
    entries = [entry for entry, _ in found if entry is not None]
    _together(ranks, ranks.rank == 0, lambda: _publish(staging, target, describe(entries)), target)


def _failure(target: Path, rank: int, text: str) -> CheckpointError:
    return CheckpointError(f"{target} was not saved: rank {rank} failed: {text} Earlier checkpoints are as they were.")


def _together(ranks: Ranks, mine: bool, action: Callable[[], None], target: Path | None = None) -> None:
    """Run `action` on the ranks where `mine`; if it raises on one, a CheckpointError with its words is raised on all."""
    error: Exception | None = None
    if mine:
        try:
            action()
        except Exception as caught:
            error = caught
    texts = ranks.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        if target is not None:
            raise _failure(target, rank, text) from error
        raise CheckpointError(f"nothing was saved: rank {rank} failed: {text}") from error


def _open(staging: Path) -> None:
    files.make_directory(staging.parent)
    files.remove(staging)  # what a save that was killed has left
    files.make_directory(staging)


def _write_rank(staging: Path, draft: Draft, rank: int) -> Entry:
    name = f"rank-{rank:05d}"
    index = Index(state=draft.state)
    nbytes, tensors = 0, None
    if draft.pieces:
        tensors = f"{name}.safetensors"
        with TensorFile(staging / tensors, [piece.spec for piece in draft.pieces]) as file:
            for piece in draft.pieces:
                file.write(piece.address, piece.read())
            nbytes = file.nbytes
        index.parts = [
            Part(p.address, p.shape, p.begin, p.spec.shape[0], file.places[p.address]) for p in draft.pieces
        ]
    text = index.to_text()
    files.write_text(staging / f"{name}.json", text)
    return Entry(f"{name}.json", text_checksum(text), tensors, nbytes)


def _publish(staging: Path, target: Path, manifest: Manifest) -> None:
    files.write_text(staging / MANIFEST, manifest.to_text())
    files.sync_directory(staging)
    replaced = target.with_name(REPLACED + target.name)
    if target.exists():
        # The old one keeps a name under which `find` looks for it, until the new one has its place.
        files.remove(replaced)
        files.move(target, replaced)
    files.move(staging, target)
    files.sync_directory(target.parent)
    files.remove(replaced)


def _forget(staging: Path) -> None:
    try:
        files.remove(staging)
    except OSError:
        pass  # the next save begins by removing it


