"""A slab that is read where its bytes lie already: in files that are somebody else's, such as those a model was loaded from.

    slab       | q of block 3 | k | norm | o |        a list of stretches, each with its file and its place there
    their file ..| k |..| q of block 3 |......| o |.. at any byte; what is read begins at the page in front of it
    host memory                    | norm |           the little of a slab that no file has

So weights that nobody trains take no second copy on the drive, and no time to be written. Such a file is never written: what is
put into the slab makes files of the store's own, with all of it, which are read from then on. Somebody else may write it,
which its size and its time of change show: that is looked at before and after each read.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoadingError
from ..files import disk
from ..files.documents import opened, printed
from ..files.past_cache import PAGE
from .drive import Drive, Reading
from .files import File
from .nvme import FileSlab, NvmeStore
from .pinned import host_tensor
from .striping import BLOCK, Stretch

# What is read at once: with a part of a page in front of it it fits a block.
_MOST = BLOCK - PAGE


@dataclass(frozen=True)
class Loan:
    """Bytes [first, last) of a slab are those of the file at `path` from byte `offset` on."""

    first: int
    last: int
    path: str
    offset: int


class _TheirFile(File):
    """Open for reading. Raises OSError."""

    __slots__ = ("_as_opened",)

    def __init__(self, path: Path) -> None:
        past = disk.open_past_cache(path, os.O_RDONLY)
        super().__init__(os.open(path, os.O_RDONLY | os.O_CLOEXEC) if past is None else past, past is not None, path)
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        self._as_opened = _seen(self.descriptor)

    def is_still(self, descriptor: int) -> bool:
        """Whether what is open there is this very file, unwritten since this was opened."""
        return _seen(descriptor) == self._as_opened

    def check(self) -> None:
        """Raises OSError if it has been written since it was opened."""
        if not self.is_still(self.descriptor):
            raise OSError(errno.ESTALE, "it has been written since the run has begun")


def _seen(descriptor: int) -> tuple[int, ...]:
    """Which file it is, and what a write to it changes."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


_opened: weakref.WeakValueDictionary[str, _TheirFile] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class _Place(Stretch):
    """drive: whose threads read it. offset: in `file`, or in what is kept in host memory."""

    file: _TheirFile | None


class BorrowedSlab(FileSlab):
    """(numel,) bytes, of which the most are in somebody else's files.

    loans: where they are there. kept: ranges that `keep` gives, which stay in host memory. The rest is padding, of any value.
    Raises LoadingError for a file that cannot be opened.
    """

    def __init__(
        self, store: NvmeStore, numel: int, loans: Sequence[Loan], kept: Sequence[tuple[int, int]], name: str
    ) -> None:
        super().__init__(store, numel, torch.uint8, name, 0)
        self._loans: list[tuple[Loan, _TheirFile]] | None = [(loan, _file(loan.path)) for loan in loans]
        self._kept = list(kept)
        self._copies: dict[str, torch.Event | None] = {}
        nbytes, pinned = sum(last - first for first, last in kept), store.lanes.device.type == "cuda"
        self._memory = host_tensor(nbytes, torch.uint8, pinned=pinned and nbytes > 0, copies=(self._copies,))

    @property
    def is_borrowed(self) -> bool:
        """Whether nothing has been put into it."""
        return self._loans is not None

    def keep(self, values: Tensor) -> None:
        """Take the ranges to keep out of `values`, (numel,) bytes on the device. Waits for the device."""
        at = 0
        for first, last in self._kept:
            self._memory[at : at + last - first].copy_(values[first:last])
            at += last - first

    def stretches(self, begin: int, end: int) -> list[Stretch]:
        if self._loans is None:
            return super().stretches(begin, end)
        found: list[Stretch] = []
        for loan, file in self._loans:
            first, last = max(begin, loan.first), min(end, loan.last)
            for at in range(first, last, _MOST):
                drive = len(found) % len(self.store.drives)
                found.append(_Place(at, min(at + _MOST, last), drive, loan.offset + at - loan.first, file))
        at = 0
        for first, last in self._kept:
            low, high = max(begin, first), min(end, last)
            if low < high:
                found.append(_Place(low, high, 0, at + low - first, None))
            at += last - first
        return found

    def bring(self, part: Stretch, out: Tensor, reading: Reading) -> None:
        if not isinstance(part, _Place):
            super().bring(part, out, reading)
            return
        drive = self.store.drives[part.drive]
        if part.file is None:
            kept = self._memory[part.offset : part.offset + out.numel()]
            self._copies["last"] = drive.give(kept, out, reading) or self._copies.get("last")
            return
        self._check(drive, part.file)
        drive.read(part.file, part.offset, out, self.name, reading)
        self._check(drive, part.file)  # somebody may have written between the two; a write shows before its bytes do

    def _check(self, drive: Drive, file: _TheirFile) -> None:
        try:
            file.check()
        except OSError as error:
            raise drive.failed(f"read {self.name} in", error, file.path) from error

    def about_to_be_written(self, first: int, last: int) -> None:
        """Have files of the store's own, with what is there and stays."""
        if self._loans is None:
            return
        stays = None if first == 0 and last == self.nbytes else self.read_part(0, self.numel)
        self._loans = None
        self.store.make_files(self)
        if stays is not None:
            lanes = self.store.lanes
            lanes.down.wait(lanes.mark_compute())
            lanes.compute_waits(self.put_parts([stays], given=True))


def _file(path: str) -> _TheirFile:
    """One for all slabs that lie in it. Raises LoadingError.

    A path may have another file by now, or a new content, while a model that was prepared before still reads what was there.
    """
    with opened(path, LoadingError) as (descriptor, _):
        found = _opened.get(path)
        if found is not None and found.is_still(descriptor):
            return found
        try:
            found = _opened[path] = _TheirFile(Path(path))
        except OSError as error:
            raise LoadingError(f"{printed(path)}: cannot be read: {error.strerror}") from error
        return found
