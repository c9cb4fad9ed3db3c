"""Reading a checkpoint: any interval of any tensor, from whichever files hold parts of it.

A reader knows addresses and elements, not ranks: a checkpoint of 4 ranks is read by 1 or by 7 the same way, each taking
only the intervals that it asks for. Memory is the tensor being filled and one block.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.documents import RECORD_NBYTES, parse_json, printed, read_json, read_text, shown
from ..files.writer import read_part
from .checks import check_together, index_from, manifest_from
from .codec import decode
from .manifest import MANIFEST, Entry, Index, Manifest, Part, text_checksum


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete checkpoint: every file is there and has its size. Contents are checked when they are read.

    Raises CheckpointError with the reason why `directory` is not a complete checkpoint.
    """
    path, where = directory / MANIFEST, printed(directory)
    _check_directory(directory)
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{where} is not a checkpoint of shardwise, or one whose save was cut short: it has no {MANIFEST}."
        )
    manifest = manifest_from(read_json(path, CheckpointError, infinities=True), where)
    for entry in manifest.entries:
        _check_file(directory, entry.index, None)
        if entry.tensors is not None:
            _check_file(directory, entry.tensors, entry.tensors_nbytes)
    return manifest


def _check_directory(directory: Path) -> None:
    """It is one, and what it holds may be looked at."""
    where = printed(directory)
    try:
        if not stat.S_ISDIR(directory.stat().st_mode):
            raise CheckpointError(f"{where} is a file, not a directory.")
        if not os.access(directory, os.X_OK, effective_ids=True):
            owner = directory.stat().st_uid
            raise CheckpointError(f"{where} cannot be read: it belongs to user {owner}, who does not let others in.")
    except FileNotFoundError:
        what = f"it is a link to {printed(os.readlink(directory))}: " if directory.is_symlink() else ""
        raise CheckpointError(f"{where}: {what}there is no such directory.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}.") from None


def _check_file(directory: Path, name: str, nbytes: int | None) -> None:
    """The file is there, and is one, of `nbytes` bytes (None: of few enough to be read)."""
    where = printed(directory)
    try:
        found = (directory / name).stat()
    except FileNotFoundError:
        raise CheckpointError(f"{where} is incomplete: {name} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {name}: {error.strerror}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{where} is damaged: {name} is not a file.")
    if nbytes is not None and found.st_size != nbytes:
        raise CheckpointError(f"{where} is damaged: {name} has {found.st_size} bytes instead of {nbytes}.")
    if nbytes is None and found.st_size > RECORD_NBYTES:
        raise CheckpointError(f"{where} is damaged: {name} has {found.st_size} bytes, more than an index has.")


def read_index(directory: Path, entry: Entry) -> Index:
    """One rank's index, its sum checked. Raises CheckpointError."""
    path = directory / entry.index
    where = printed(path)
    text = read_text(path, CheckpointError)
    if text_checksum(text) != entry.index_crc:
        raise CheckpointError(f"{where} is damaged: its checksum differs.")
    return index_from(parse_json(text, where, CheckpointError), where, entry)


class Checkpoint:
    """A complete checkpoint, opened: its manifest and indexes are read and checked, its tensors are not.

    Raises CheckpointError if `directory` is not a complete checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self._states: list[dict[str, Any]] = []
        self._parts: dict[str, list[tuple[Path, Part]]] = {}
        self._own: list[dict[str, tuple[Path, Part]]] = []
        for entry in self.manifest.entries:
            index = read_index(directory, entry)
            self._states.append(index.state)
            self._own.append(self._add(directory, entry.tensors, index))
        for parts in self._parts.values():
            parts.sort(key=lambda found: found[1].begin)
        check_together({address: [part for _, part in found] for address, found in self._parts.items()}, directory)

    def _add(self, directory: Path, file: str | None, index: Index) -> dict[str, tuple[Path, Part]]:
        own = {}
        for part in index.parts:
            assert file is not None  # see index_from
            own[part.address] = (directory / file, part)
            self._parts.setdefault(part.address, []).append(own[part.address])
        return own

    def add(self, other: Checkpoint, prefix: str) -> None:
        """Read tensors whose address begins with `prefix` from `other`: frozen weights that checkpoints share."""
        for address, parts in other._parts.items():
            if address.startswith(prefix):
                self._parts[address] = parts

    def beside(self, name: str) -> Path:
        """What lies beside the checkpoint under `name`: where a link to it lies, or what the link leads to."""
        place = self.directory
        while not (place.parent / name).exists() and place.is_symlink():
            place = place.parent / os.readlink(place)
        return place.parent / name

    def __contains__(self, address: str) -> bool:
        return address in self._parts

    def addresses(self, prefix: str = "") -> Iterator[str]:
        """Every address that begins with `prefix`, in the order of the files."""
        return (address for address in self._parts if address.startswith(prefix))

    def shape(self, address: str) -> tuple[int, ...]:
        return self._parts_of(address)[0][1].shape

    def dtype(self, address: str) -> torch.dtype:
        return self._parts_of(address)[0][1].place.dtype

    def _parts_of(self, address: str) -> list[tuple[Path, Part]]:
        if address not in self._parts:
            raise CheckpointError(f"{self.directory} holds no {address}.")
        return self._parts[address]

    def read(self, address: str, begin: int, numel: int) -> Tensor:
        """Elements [begin, begin + numel) of a tensor, (numel,) on the CPU. Raises CheckpointError, also for damage."""
        out = torch.empty(numel, dtype=self.dtype(address))
        at = begin
        for path, part in self._parts_of(address):
            first, last = max(at, part.begin), min(begin + numel, part.begin + part.numel)
            if first >= last:
                continue
            if first > at:
                break
            read_part(path, part.place, first - part.begin, out[first - begin : last - begin])
            at = last
        if at < begin + numel:
            raise CheckpointError(
                f"{self.directory} does not hold elements {at} to {begin + numel} of {address}: it was saved from a "
                "tensor of another size."
            )
        return out

    def read_whole(self, address: str) -> Tensor:
        """A whole tensor in its shape."""
        shape = self.shape(address)
        return self.read(address, 0, math.prod(shape)).reshape(shape)

    def state(self, rank: int, without: Container[str] = ()) -> Any:
        """What rank `rank` of the saving run kept, decoded, but for the entries `without`."""
        own = dict(self._own[rank])

        def tensor(name: str) -> Tensor:
            # Each is referred to once. A state that names one a million times would be a million copies.
            if name not in own:
                raise CheckpointError(f"it refers to a tensor {shown(name)}, which is not there.")
            path, part = own.pop(name)
            out = torch.empty(part.numel, dtype=part.place.dtype)
            read_part(path, part.place, 0, out)
            return out

        try:
            return decode({key: value for key, value in self._states[rank].items() if key not in without}, tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{printed(self.directory)}: rank {rank}: {error}") from error

    def verify(self) -> None:
        """Read every byte and compare its sums. Raises CheckpointError at the first that differs."""
        for parts in self._parts.values():
            for path, part in parts:
                read_part(path, part.place, 0, torch.empty(part.numel, dtype=part.place.dtype))


def shared_by(checkpoint: Checkpoint) -> Checkpoint:
    """The frozen weights that `checkpoint` shares with others, in a directory beside it. Raises CheckpointError."""
    return Checkpoint(checkpoint.beside(checkpoint.manifest.frozen["kept"]))
