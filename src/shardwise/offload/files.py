"""Files without a name: nothing but a descriptor of this process leads to them, so they end with it, however it ends.

A run that is killed cannot tidy up, and a later one cannot tell for certain what of a stranger's files is dead: locks are
inherited by forked children and mean little on network file systems, process ids come again, another host's are unknown. What
has no name needs no owner. The kernel gives the space back when the last descriptor goes: with the last reference to the
File, with the end of the process, or at the next mount after the machine lost its power.

    O_TMPFILE         ext4, xfs, btrfs, tmpfs, overlayfs: the file never has a name
    create, unlink    elsewhere: it has one for some microseconds, while it is empty; if that is when its process is killed, the
                      next start removes the name, which does no harm to a living one

A forked child inherits descriptors and may outlive a killed rank (a loader's worker does, for some seconds): it closes its
copies as soon as it begins. Why not locks: docs/design/offload.md.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import weakref
from pathlib import Path

PAGE = 4096
_PATTERN = b"\x5a" * PAGE
_PREFIX = ".shardwise-nameless-"

_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)  # this file system's, and an old kernel's, for O_TMPFILE


class File:
    """An open file. direct: past the page cache, so offsets, sizes and memory are whole pages. path: if it has a name."""

    __slots__ = ("__weakref__", "descriptor", "direct", "path")

    def __init__(self, descriptor: int, direct: bool, path: Path | None = None) -> None:
        self.descriptor = descriptor
        self.direct = direct
        self.path = path


class Files:
    """The files of this process in `folder`, which is made where it is missing.

    Raises OSError if the directory cannot be made or written, or if its file system does not keep what has no name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: set[int] = set()
        folder.mkdir(parents=True, exist_ok=True)
        _everywhere.add(self)
        for path in folder.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # another one was faster, or it is another user's
                path.unlink()
        self._try()

    def make(self) -> File:
        """A new file, empty. It is closed with the last reference to it. Raises OSError."""
        try:
            file = File(_open(self.folder, os.O_DIRECT), True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file = File(_open(self.folder, 0), False)  # some file systems have no way past the page cache
        self._open.add(file.descriptor)
        # At exit `close` does it for all.
        weakref.finalize(file, _close, self._open, file.descriptor).atexit = False
        return file

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    @property
    def nbytes(self) -> int:
        """What the open ones take on the drive."""
        return sum(os.fstat(descriptor).st_blocks * 512 for descriptor in list(self._open))

    def close(self) -> None:
        """Close all of them, referenced or not."""
        for descriptor in list(self._open):
            _close(self._open, descriptor)

    def _try(self) -> None:
        """Write a page and read it: some network file systems take a file away with its name."""
        file, page = self.make(), mmap.mmap(-1, PAGE)
        page.write(_PATTERN)
        try:
            if os.pwrite(file.descriptor, page, 0) < PAGE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            page[:] = bytes(PAGE)
            os.preadv(file.descriptor, [page], 0)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
        if page[:] != _PATTERN:
            raise OSError(errno.EOPNOTSUPP, "its file system does not keep open files without a name")


def take_space(file: File, nbytes: int) -> None:
    """Make `file` `nbytes` long, with the space taken now where the file system can do that. Raises OSError."""
    try:
        os.posix_fallocate(file.descriptor, 0, nbytes)
    except OSError as error:
        # A file system without preallocation; libc's own way round writes single bytes, which files past the cache refuse.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(file.descriptor, nbytes)


def _open(folder: Path, flags: int) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | flags, 0o600)
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
    path = folder / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | flags, 0o600)
    except OSError:
        with contextlib.suppress(OSError):  # Linux has made a file that it then could not open past the cache
            os.unlink(path)
        raise
    try:
        with contextlib.suppress(FileNotFoundError):  # another process has begun in the meantime, see above
            os.unlink(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _close(opened: set[int], descriptor: int) -> None:
    # Once: the number may be another file's a moment later.
    try:
        opened.remove(descriptor)
    except KeyError:
        return
    os.close(descriptor)


_everywhere: weakref.WeakSet[Files] = weakref.WeakSet()


def _close_inherited() -> None:
    for files in list(_everywhere):
        files.close()


os.register_at_fork(after_in_child=_close_inherited)
