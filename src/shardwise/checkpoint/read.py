"""Reading a checkpoint: any interval of any tensor, from whichever files hold parts of it.

A reader knows addresses and elements, not ranks: a checkpoint of 4 ranks is read by 1 or by 7 the same way, each taking
only the intervals that it asks for. Memory is the tensor being filled and one block.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .codec import decode
from .manifest import Index, Manifest, Part, read_index, read_manifest
from .names import beside
from .tensor_file import read_part


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

    def _add(self, directory: Path, file: str | None, index: Index) -> dict[str, tuple[Path, Part]]:
        own = {}
        for part in index.parts:
            assert file is not None
            own[part.address] = (directory / file, part)
            self._parts.setdefault(part.address, []).append(own[part.address])
        return own

    def add(self, other: Checkpoint, prefix: str) -> None:
        """Read tensors whose address begins with `prefix` from `other`: frozen weights that checkpoints share."""
        for address, parts in other._parts.items():
            if address.startswith(prefix):
                self._parts[address] = parts

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
        own = self._own[rank]

        def tensor(name: str) -> Tensor:
            path, part = own[name]
            out = torch.empty(part.numel, dtype=part.place.dtype)
            read_part(path, part.place, 0, out)
            return out

        return decode({key: value for key, value in self._states[rank].items() if key not in without}, tensor)

    def verify(self) -> None:
        """Read every byte and compare its sums. Raises CheckpointError at the first that differs."""
        for parts in self._parts.values():
            for path, part in parts:
                read_part(path, part.place, 0, torch.empty(part.numel, dtype=part.place.dtype))


def shared_by(checkpoint: Checkpoint) -> Checkpoint:
    """The frozen weights that `checkpoint` shares with others, in a directory beside it. Raises CheckpointError."""
    return Checkpoint(beside(checkpoint.directory, checkpoint.manifest.frozen["kept"]))
