"""Every operation on the disk that writing a checkpoint makes, one function each, and nothing else.

A save is a sequence of these; a machine may stop before, between and after any two. So each asks `watch` first, which does
nothing unless a test has put a failure there: SIGKILL at the n-th operation, or a disk that is full. What a name means
on disk holds after `sync` of a file and `sync_directory` of the directory that names it, and not before.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# (operation, path) -> None; may raise, or never return.
Watcher = Callable[[str, Path], None]

_watcher: Watcher | None = None


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` is called before every file operation of this process. For tests of failures."""
    global _watcher  # noqa: PLW0603 - the one place, inert otherwise
    earlier, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = earlier


def _watch(operation: str, path: Path) -> None:
    if _watcher is not None:
        _watcher(operation, path)


def make_directory(path: Path) -> None:
    """Make `path` and its parents; nothing if it is there. Links are followed, but not to what is not there."""
    _watch("make directory", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if path.is_symlink():
            words = f"it is a link to {os.readlink(path)}, which is not there"
            raise OSError(errno.ENOENT, words, str(path)) from error
        raise


def create(path: Path, nbytes: int) -> int:
    """A descriptor of a new file of `nbytes`, for writing. A disk without so much room says so now, where it can.

    What has the name goes, unopened: behind a link there is somebody's file, behind a pipe nobody may read.
    """
    _watch("create", path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileExistsError:
        path.unlink()
        descriptor = os.open(path, flags, 0o644)
    try:
        if nbytes:
            _reserve(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_past_cache(path: Path, access: int) -> int | None:
    """A descriptor of a file that bypasses the page cache; None where its file system has none such. access: os.O_WRONLY..."""
    try:
        return os.open(path, access | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return None


def _reserve(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        # Some file systems cannot reserve; there a full disk is met while writing.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, nbytes)


def write(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """All of `data`, at `offset`."""
    _watch("write", path)
    while data.nbytes:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def sync(descriptor: int, path: Path) -> None:
    """Return when the file's content is on the disk."""
    _watch("sync", path)
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Return when the names in `path` are on the disk."""
    _watch("sync directory", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A new file with `text`, on the disk when this returns."""
    data = text.encode()
    descriptor = create(path, 0)
    try:
        write(descriptor, memoryview(data), 0, path)
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename, in one step; `target` must not be a directory with something in it."""
    _watch("move", target)
    source.rename(target)


def move_over(source: Path, target: Path) -> None:
    """Rename a file, in one step, in place of another that may be there."""
    _watch("move", target)
    source.replace(target)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it. Nothing if it is not there."""
    _watch("remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
