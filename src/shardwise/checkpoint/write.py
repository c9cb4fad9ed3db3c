"""Writing a checkpoint: every rank its own files into a hidden directory, which one rename makes the checkpoint.

    all ranks   rank-N.safetensors, rank-N.json           each synced
    agree       an error of any rank is everybody's, and the hidden directory goes
    rank 0      manifest.json, sync the directory, rename it, sync its parent
    agree

Each agreement waits as long as the disks take (`patience.py`).

A kill before the rename leaves a hidden directory, which nobody takes for a checkpoint; after it, a complete one. What is
written is a `Draft`: its tensors are read one at a time (a save that waits), or were taken before (one that does not).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import disk
from ..files.documents import check_json, printed, read_text
from ..files.writer import TensorFile
from ..ranks.agree import sees_another
from ..ranks.agreeing import attempt
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks
from .file_plan import FilePlan, Way
from .manifest import MANIFEST, Entry, Manifest, index_text, row_end, text_checksum
from .patience import Progress, patiently
from .pieces import Piece
from .places import MARK, STAGING, discard, left_behind, make_staging, put_in_place, refuse_taken
from .snapshot import Pool, Snapshot

logger = logging.getLogger("shardwise")


@dataclass
class Draft:
    """One rank's part of a checkpoint. state: JSON; its tensors are among the pieces.

    late: called before the state is written, by whoever writes it: what of it comes from the device, and may fail.
    plan: how its file comes about, where that is known.
    """

    pieces: list[Piece] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    late: list[Callable[[], None]] = field(default_factory=list)
    plan: FilePlan | None = None

    @property
    def nbytes(self) -> int:
        return sum(piece.spec.nbytes for piece in self.pieces)


@dataclass
class Taken:
    """What a save that does not wait has of its draft. file: opened already, where something had to be written at once."""

    snapshot: Snapshot
    file: TensorFile | None = None

    def close(self) -> None:
        """Let go of everything, written or not."""
        self.snapshot.close()
        if self.file is not None:
            self.file.discard()


def open_staging(target: Path, ranks: Ranks) -> Path:
    """The hidden directory in which the checkpoint `target` is put together, empty. Collective."""
    staging = target.with_name(STAGING + target.name)

    making = Progress("makes the directory")
    patiently(ranks, lambda: make_staging(staging), making, what=f"Saving {target}", on=0, failed=_failed(target))
    # What rank 0 has just written there: a directory of that name may be on another machine's own disk too.
    mark, _ = attempt(lambda: read_text(staging / MARK, CheckpointError))
    apart = sees_another(ranks, mark)
    if apart is not None and apart.rank == 0:
        raise CheckpointError(
            f"{_failed(target)}{staging} was removed, or cannot be read any more, as soon as it was made."
        )
    if apart is not None:
        raise CheckpointError(
            f"{_failed(target)}rank {apart.rank} on {apart.host} does not see {staging}, which rank 0 made on "
            f"{apart.host_of_0}. Save to a directory that all machines share."
        )
    return staging


def _failed(target: Path) -> str:
    return f"{target} was not saved, earlier checkpoints are as they were: "


def take(staging: Path | None, draft: Draft, rank: int, lanes: Sequence[Lanes], pool: Pool) -> list[Taken]:
    """Take this rank's part as it is now; nothing where it has no tensors.

    staging: the directory from `open_staging`; None where nothing rests on a drive or as codes. lanes: of the run's models.
    pool:    where copies go; the save before this one has ended.
    What rests on a drive or as codes is written before this returns.
    """
    if draft.plan is None:
        return []
    taken = Taken(Snapshot(draft.plan, draft.pieces, lanes, pool))
    try:
        taken.snapshot.take()
        if draft.plan.numbers(Way.WRITTEN):
            assert staging is not None
            taken.file = TensorFile(staging / tensors_of(rank), draft.plan.layout)
            taken.snapshot.write_now(taken.file)
    except BaseException:
        taken.close()
        raise
    return [taken]


def tensors_of(rank: int) -> str:
    """The name of a rank's file of tensors."""
    return f"rank-{rank:05d}.safetensors"


def write_checkpoint(
    staging: Path,
    target: Path,
    draft: Draft,
    ranks: Ranks,
    describe: Callable[[Sequence[Entry]], Manifest],
    taken: Taken | None = None,
) -> None:
    """Publish the ranks' drafts as the directory `target`. Collective; an error of any rank is raised on every rank.

    staging:  from `open_staging`. taken: the draft's pieces as they were; None reads them where they rest.
    describe: on rank 0, the manifest for the files of all ranks. An earlier checkpoint at `target` is replaced.
    """
    failed, what = _failed(target), f"Saving {target}"
    writing, publishing = Progress("writes"), Progress("gives the checkpoint its name")
    try:
        entry = patiently(
            ranks, lambda: _write_rank(staging, draft, ranks.rank, writing, taken), writing, what=what, failed=failed
        )
        entries = [found for found in ranks.gather_objects(entry) if found is not None]
        patiently(
            ranks, lambda: _publish(staging, target, describe(entries)), publishing, what=what, on=0, failed=failed
        )
    except CheckpointError:
        if ranks.rank == 0:
            attempt(lambda: disk.remove(staging))  # else the next save begins by removing it
        raise


def write_alone(
    target: Path,
    drafts: Sequence[Draft],
    describe: Callable[[Sequence[Entry]], Manifest],
    beside: Mapping[str, str],
    check: Callable[[Path], None],
) -> None:
    """Publish `drafts`, one of each rank of a run that is not this one, as the directory `target`, from this one process.

    target: must be free. beside: name -> text of files that are put into it. check: called with the directory when all is in
    it, before it gets its name; raises CheckpointError if it cannot be read. Raises CheckpointError; then nothing is left.
    """
    refuse_taken(target)
    staging = target.with_name(STAGING + target.name)
    try:
        make_staging(staging)
        try:
            for name, text in beside.items():
                disk.write_text(staging / name, text)
            entries = [_write_rank(staging, draft, rank, Progress("writes")) for rank, draft in enumerate(drafts)]
            _seal(staging, target, describe(entries))
            check(staging)
            put_in_place(staging, target)
        except BaseException:
            attempt(lambda: disk.remove(staging))  # the first error is the one to tell
            raise
    except OSError as error:
        raise CheckpointError(f"{printed(target)} was not written: {error}.") from error


def _write_rank(staging: Path, draft: Draft, rank: int, progress: Progress, taken: Taken | None = None) -> Entry:
    name = f"rank-{rank:05d}"
    for complete in draft.late:
        complete()
    rows: list[str] = []
    nbytes, tensors = 0, None
    if draft.pieces:
        tensors = tensors_of(rank)
        progress.start(draft.nbytes, "writes")
        plan = draft.plan or FilePlan(draft.pieces, tensors)
        opened = taken.file if taken is not None else None
        with opened or TensorFile(staging / tensors, plan.layout) as file:
            if taken is not None:
                taken.snapshot.write(file, progress)
            else:
                for piece in draft.pieces:
                    file.write(piece.address, piece.source.read(), progress.advance)
            nbytes, places = file.nbytes, file.places
            progress.start(0, "waits for the disk to take what was written")
        rows = [head + row_end(places[p.address].blocks) for head, p in zip(plan.rows, draft.pieces, strict=True)]
    text = index_text(rows, draft.state)
    # What could not be read back must not be written: nobody would know before the run is to go on.
    check_json(text, f"{name}.json, which keeps the state of the run besides its tensors,", CheckpointError)
    disk.write_text(staging / f"{name}.json", text)
    return Entry(f"{name}.json", text_checksum(text), tensors, nbytes)


def _seal(staging: Path, target: Path, manifest: Manifest) -> None:
    """What makes the directory a complete checkpoint, but for its name."""
    text = manifest.to_text()
    check_json(text, f"{printed(target)}: {MANIFEST}", CheckpointError)
    disk.write_text(staging / MANIFEST, text)
    disk.remove(staging / MARK)
    disk.sync_directory(staging)


def _publish(staging: Path, target: Path, manifest: Manifest) -> None:
    _seal(staging, target, manifest)
    put_in_place(staging, target)
    for path in left_behind(target):
        _, error = attempt(lambda: discard(path))  # noqa: B023 - called at once
        if error is not None:
            logger.warning(
                "%s was saved, but the earlier one could not be removed: %s. Remove %s.", target, error, path
            )
