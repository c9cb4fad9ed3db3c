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
from ..zero.collectives import Ranks, attempt
from . import files
from .agree import together
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


def open_staging(target: Path, ranks: Ranks) -> Path:
    """The hidden directory in which the checkpoint `target` is put together, empty. Collective."""
    staging = target.with_name(STAGING + target.name)

    def look() -> None:
        if not staging.is_dir():
            raise CheckpointError(
                f"{socket.gethostname()} does not see {staging}, which rank 0 made. Save to a directory that all machines "
                "share."
            )

    together(ranks, lambda: _open(staging), on=0, what=_failed(target))
    together(ranks, look, what=_failed(target))
    return staging


def _failed(target: Path) -> str:
    return f"{target} was not saved, earlier checkpoints are as they were: "


def write_checkpoint(
    staging: Path, target: Path, draft: Draft, ranks: Ranks, describe: Callable[[Sequence[Entry]], Manifest]
) -> None:
    """Publish the ranks' drafts as the directory `target`. Collective; an error of any rank is raised on every rank.

    staging:  from `open_staging`.
    describe: on rank 0, the manifest for the files of all ranks. An earlier checkpoint at `target` is replaced.
    """
    failed = _failed(target)
    try:
        entry = together(ranks, lambda: _write_rank(staging, draft, ranks.rank), what=failed)
    except CheckpointError:
        if ranks.rank == 0:
            attempt(lambda: files.remove(staging))  # else the next save begins by removing it
        raise
    entries = [found for found in ranks.gather_objects(entry) if found is not None]
    together(ranks, lambda: _publish(staging, target, describe(entries)), on=0, what=failed)


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
        index.parts = [Part(p.address, p.shape, p.begin, p.spec.shape[0], file.places[p.address]) for p in draft.pieces]
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
