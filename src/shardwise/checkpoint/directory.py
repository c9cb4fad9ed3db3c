"""The directory that holds a run's checkpoints: which of them are complete, the newest, the best, and whose it is.

Every judgement here is rank 0's; the callers tell the others. A directory is one run's: a lock that the kernel gives back
when the process ends, however it ends, keeps a second run from mixing its checkpoints with the first one's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import disk
from ..files.documents import printed
from ..ranks.agreeing import attempt
from .checks import STORE
from .manifest import Manifest
from .places import REPLACED, STAGING, discard, followed
from .read import read_manifest

logger = logging.getLogger("shardwise")

_NUMBERED = re.compile(r"checkpoint_([0-9]{1,18})")
_LEFT_OVER = re.compile(rf"{re.escape(STAGING)}(removed-)?checkpoint_[0-9]{{1,18}}")


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
    """Judge everything in `folder`. A directory that is not there holds nothing.

    Raises CheckpointError if `folder` itself cannot be read. What is wrong with one entry concerns that one alone.
    """
    complete: list[Found] = []
    skipped: list[tuple[Path, str]] = []
    for path in _entries(folder):
        found, error = attempt(lambda: _judge(path))  # noqa: B023 - called at once
        if error is not None:
            words = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            skipped.append((path, words))
        elif found is not None:
            complete.append(found)
    complete.sort(key=lambda found: (found.manifest.order, found.path.name), reverse=True)
    return Survey(tuple(complete), tuple(skipped))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if os.path.lexists(folder) else []
    except NotADirectoryError:
        raise CheckpointError(f"{printed(folder)} is a file, not a directory.") from None
    except OSError as error:
        raise CheckpointError(f"{printed(folder)} cannot be read: {error.strerror}.") from error


def _judge(path: Path) -> Found | None:
    """The checkpoint at `path`; None for what is not meant as one. Raises CheckpointError with what is wrong with it."""
    replaced = path.name.startswith(REPLACED)
    if path.name.startswith(STAGING):
        raise CheckpointError(f"{printed(path)} is a save that was cut short.")
    if STORE.fullmatch(path.name) or (path.name.startswith(".") and not replaced):
        return None
    if path.is_symlink():
        real = followed(path)
        if not real.is_dir():
            raise CheckpointError(f"{printed(path)} is a link to {printed(real)}, which is no directory.")
        if real.parent == Path(os.path.realpath(path.parent)):
            return None  # another name of one that is found by its own
    elif not stat.S_ISDIR(path.lstat().st_mode):
        return None
    manifest = read_manifest(path)
    if manifest.order < 0:
        raise CheckpointError(f"{printed(path)} holds frozen weights alone, which checkpoints share.")
    if replaced and _is_complete(path.with_name(path.name.removeprefix(REPLACED))):
        return None
    return Found(path, manifest)


def _is_complete(path: Path) -> bool:
    return attempt(lambda: read_manifest(path))[1] is None


def resolve(path: Path) -> Path:
    """The checkpoint at `path`; if it was being replaced when a run was killed, the one that it was. Links are followed.

    Raises CheckpointError with the reason why there is none.
    """
    real = followed(path)
    try:
        read_manifest(path)
    except CheckpointError:
        replaced = real.with_name(REPLACED + real.name)
        if _is_complete(replaced):
            return replaced
        raise
    return path


def next_number(folder: Path, at_least: int) -> int:
    """The number of the next `checkpoint_N` in `folder`: above every one that is there, complete or not."""
    numbers = [int(match[1]) for path in _entries(folder) if (match := _NUMBERED.fullmatch(path.name)) is not None]
    return max([at_least, *(number + 1 for number in numbers)])


def sweep(folder: Path) -> None:
    """Remove what automatic saves that were cut short have left. For the run that has claimed `folder`, with none under way."""
    for path in _entries(folder):
        if _LEFT_OVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            disk.remove(path)


def next_order(folder: Path) -> int:
    return 1 + max((found.manifest.order for found in survey(folder).complete), default=-1)


def prune(
    folder: Path, runs: Collection[str], *, newest: int | None, best: int = 0, smaller_is_better: bool = True
) -> list[Path]:
    """Remove complete checkpoints of `runs` but the `newest` so many and the `best` so many by their metric; those removed.

    runs: the numbers of this run and of those that it goes on with, see `Origin`. Only what automatic naming made in them
    counts and is removed: not what a script has named itself, not a copy under another name, not what another run has made.
    newest: None keeps all.
    """
    if newest is None:
        return []
    complete = [found for found in survey(folder).complete if _made_by(found, runs)]
    kept = {found.path for found in complete[: max(newest, 1)]}
    kept |= {found.path for found in _best_first(complete, smaller_is_better)[:best]}
    removed = [found.path for found in reversed(complete) if found.path not in kept]
    for path in removed:
        discard(path)
    return removed


def not_counted(folder: Path, runs: Collection[str]) -> list[str]:
    """The names of checkpoints that look as if automatic naming had made them, and that `prune` leaves alone."""
    found = [one for one in survey(folder).complete if not _made_by(one, runs)]
    return [one.path.name for one in found if _NUMBERED.fullmatch(one.path.name) is not None]


def _made_by(found: Found, runs: Collection[str]) -> bool:
    made = found.manifest.made
    return made is not None and made.run in runs and made.name == found.path.name and not found.path.is_symlink()


def _best_first(complete: Sequence[Found], smaller_is_better: bool) -> list[Found]:
    """Those that have a metric; of equal ones the newest first."""
    scored = [(found.manifest.metric, found) for found in complete if found.manifest.metric is not None]
    return [found for _, found in sorted(scored, key=lambda row: row[0] if smaller_is_better else -row[0])]


class Lock:
    """This process's claim on a directory, until `release` or its end. Raises CheckpointError if another holds it."""

    def __init__(self, path: Path) -> None:
        disk.make_directory(path.parent)
        self.path = path
        self._descriptor = self._take()
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # a full disk
            os.close(self._descriptor)
            raise

    def _take(self) -> int:
        while True:
            try:
                # A link is not followed: behind it is somebody's file, which the next lines would empty.
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(self.path, flags, 0o644)
            except OSError as error:
                words = "it is a link" if error.errno == errno.ELOOP else error.strerror
                raise CheckpointError(
                    f"{printed(self.path)} cannot be opened, to claim the directory: {words}."
                ) from error
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise CheckpointError(
                        f"{printed(self.path)} is not a file. Move it away; a run claims the directory by it."
                    )
                self._lock(descriptor)
                if self._is_at_path(descriptor):
                    return descriptor
                os.close(descriptor)  # its holder has just released it, and removed it
            except BaseException:
                os.close(descriptor)
                raise

    def _lock(self, descriptor: int) -> None:
        try:
            # A record lock: unlike flock's it is not inherited by forked loader workers, which may outlive the run.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"{printed(self.path)} cannot be locked: {error.strerror}.") from error
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise CheckpointError(
                f"{printed(self.path.parent)} is in use by another run ({printed(holder or error)}). Two runs would remove "
                "each other's checkpoints: give this one another directory, or end the other."
            ) from None

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the claim back. A file that cannot be removed is harmless, the kernel's lock is gone: that is a warning."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be removed: %s. It claims nothing any more.", self.path, error.strerror)
        finally:
            os.close(self._descriptor)
