"""Reading stretches of tensors from safetensors files: only the bytes that are asked for, with no memory map.

A mapped file would count as resident memory of every rank that touches it, and would be read ahead by the page; a `pread`
of a known range costs those bytes and no more. The header is checked when a file is opened, so that a file which was cut
off in a download is an error before anything is built from it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadingError
from ..zero.scratch import scratch
from .tensor_file import DTYPES, read_into

_HEADER_LIMIT = 100_000_000  # bytes; the format's own


class Bytes:
    """How many bytes of tensors this process has read, over all files."""

    read = 0


@dataclass(frozen=True)
class FileStretch:
    """The bytes of one tensor: `nbytes` of the file at `path`, from `offset` on."""

    path: str
    offset: int
    nbytes: int
    name: str

    def read(self, begin: int, end: int) -> Tensor:
        """(end - begin,) of uint8, in new memory. Raises LoadingError if the file ends before."""
        result = scratch(end - begin)
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise LoadingError(f"{self.path}: {error.strerror}, while {self.name} is read from it.") from error
        try:
            done = read_into(descriptor, memoryview(result.numpy()), self.offset + begin)  # type: ignore[arg-type]
        finally:
            os.close(descriptor)
        if done < end - begin:
            raise LoadingError(f"{self.path} ends in the middle of {self.name}. It has changed since it was opened.")
        Bytes.read += done
        return result


class TensorFile:
    """A safetensors file by its header.

    tensors: name -> (dtype, shape, where it lies). metadata: the file's own notes.
    Raises LoadingError for a file that is cut off, is no safetensors file, or lacks a tensor that the index beside it lists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        header, start, size = _header_of(self.path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], FileStretch]] = {}
        end = start
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            end = max(end, start + last)
            if entry["dtype"] not in DTYPES:
                raise LoadingError(f"{self.path}: {name} has the dtype {entry['dtype']}, which torch does not have.")
            stretch = FileStretch(self.path, start + first, last - first, name)
            self.tensors[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), stretch)
        if size < end:
            raise LoadingError(
                f"{self.path} is cut off: its header describes {end} bytes, the file has {size}. Download or copy it again."
            )
        self._check_index()

    def _check_index(self) -> None:
        """Every tensor that an index in the same folder places in this file must be there."""
        own = Path(self.path)
        for index in sorted(own.parent.glob("*.safetensors.index.json")):
            try:
                places = json.loads(index.read_text()).get("weight_map", {})
            except ValueError as error:
                raise LoadingError(f"{index} is not JSON: {error}. Download or copy it again.") from error
            absent = [name for name, file in places.items() if file == own.name and name not in self.tensors]
            if absent:
                others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
                raise LoadingError(
                    f"{self.path} lacks {absent[0]}{others}, which {index.name} says it holds. Download or copy both again."
                )


def _header_of(path: str) -> tuple[dict[str, Any], int, int]:
    """(the header, where the data starts, the size of the file)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT or 8 + length > size:
            raise LoadingError(
                f"{path} is cut off or is no safetensors file: {size} bytes, a header of {length}. Download or copy it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise LoadingError(f"{path}: its header is not JSON ({error}). Download or copy it again.") from error
    return header, 8 + length, size
