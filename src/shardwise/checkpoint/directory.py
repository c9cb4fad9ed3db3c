"""The directory that holds a run's checkpoints: which of them are complete, the newest, the best, and whose it is.

Every judgement here is rank 0's; the callers tell the others. A directory is one run's: a lock that the kernel gives back
when the process ends, however it ends, keeps a second run from mixing its checkpoints with the first one's.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from . import files
from .manifest import Manifest, read_manifest
from .write import REPLACED, STAGING

_NUMBERED = re.compile(r"checkpoint_(\d+)")


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Survey:
    """What a directory holds. complete: the newest first; skipped: (path, why it is no complete checkpoint)."""

    complete: tuple[Found, ...]
    skipped: tuple[tuple[Path, str], ...]


def survey(folder: Path) -> Survey:
    """Judge everything in `folder`. A directory that is not there holds nothing."""
    complete: list[Found] = []
    skipped: list[tuple[Path, str]] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(STAGING):
            skipped.append((path, f"{path} is a save that was cut short."))
            continue
        replaced = path.name.startswith(REPLACED)
        if not path.is_dir() or (path.name.startswith(".") and not replaced) or path.name.startswith("frozen-"):
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            continue
        if replaced and _is_complete(path.with_name(path.name.removeprefix(REPLACED))):
            continue
        complete.append(Found(path, manifest))
    complete.sort(key=lambda found: (found.manifest.order, found.path.name), reverse=True)
    return Survey(tuple(complete), tuple(skipped))


def _is_complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def resolve(path: Path) -> Path:
    """The checkpoint at `path`; if it was being replaced when a run was killed, the one that it was.

    Raises CheckpointError with the reason why there is none.
    """
    try:
        read_manifest(path)
    except CheckpointError:
        replaced = path.with_name(REPLACED + path.name)
        if _is_complete(replaced):
            return replaced
        raise
    return path


def next_number(folder: Path, at_least: int) -> int:
    """The number of the next `checkpoint_N` in `folder`: above every one that is there, complete or not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name)) is not None]
    return max([at_least, *(number + 1 for number in numbers)])


def sweep(folder: Path) -> None:
    """Remove what saves that were cut short have left. For the run that has claimed `folder`, with no save under way."""
    for path in list(folder.glob(f"{STAGING}*")):
        files.remove(path)


def next_order(folder: Path) -> int:
    return 1 + max((found.manifest.order for found in survey(folder).complete), default=-1)


def refuse_foreign(target: Path) -> None:
    """CheckpointError if saving to `target` would replace something that is not a checkpoint."""
    if target.is_dir() and not any(target.iterdir()):
        files.remove(target)
    elif target.is_dir() and not (target / "manifest.json").exists():
        raise CheckpointError(
            f"{target} holds files that are not a checkpoint; saving there would remove them. Save to a directory of its "
            f"own, such as {target / 'state'}."
        )
    elif target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, not a directory.")


def prune(folder: Path, *, newest: int | None, best: int = 0, smaller_is_better: bool = True) -> list[Path]:
    """Remove complete checkpoints but the `newest` so many and the `best` so many by their metric; those removed.

    newest: None keeps all.
    """
    if newest is None:
        return []
    complete = survey(folder).complete
    kept = {found.path for found in complete[: max(newest, 1)]}
    kept |= {found.path for found in _best_first(complete, smaller_is_better)[:best]}
    removed = [found.path for found in reversed(complete) if found.path not in kept]
    for path in removed:
        # Under a name that nobody takes for a checkpoint first: a kill must not leave half of one under its own.
        doomed = path.with_name(STAGING + "removed-" + path.name.lstrip("."))
        files.remove(doomed)
        files.move(path, doomed)
        files.remove(doomed)
    return removed


def _best_first(complete: Sequence[Found], smaller_is_better: bool) -> list[Found]:
    """Those that have a metric; of equal ones the newest first."""
    scored = [(found.manifest.metric, found) for found in complete if found.manifest.metric is not None]
    return [found for _, found in sorted(scored, key=lambda row: row[0] if smaller_is_better else -row[0])]


class Lock:
    """This process's claim on a directory, until `release` or its end. Raises CheckpointError if another holds it."""

    def __init__(self, path: Path) -> None:
        files.make_directory(path.parent)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # A record lock: unlike flock's it is not inherited by forked loader workers, which may outlive the run.
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise CheckpointError(
                f"{path.parent} is in use by another run ({holder or error}). Two runs would remove each other's "
                "checkpoints: give this one another directory, or end the other."
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
