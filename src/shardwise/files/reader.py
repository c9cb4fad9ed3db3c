"""Reading stretches of tensors from safetensors files: only the bytes that are asked for, with no memory map.

A mapped file would count as resident memory of every rank that touches it, and would be read ahead by the page; a `pread`
of a known range costs those bytes and no more. The header is checked when a file is opened, so that a file which was cut
off in a download is an error before anything is built from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoadingError
from .documents import opened, read_json_object, shown
from .safetensors_header import read_header
from .scratch import scratch
from .writer import DTYPES, read_into


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
        with opened(self.path, LoadingError) as (descriptor, _):
            done = read_into(descriptor, memoryview(result.numpy()), self.offset + begin)  # type: ignore[arg-type]
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
        header = read_header(self.path, LoadingError)
        self.metadata = header.metadata
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], FileStretch]] = {}
        for name, stored in header.tensors.items():
            if stored.dtype not in DTYPES:
                raise LoadingError(f"{self.path}: {shown(name)} has the dtype {stored.dtype}, which is not read here.")
            stretch = FileStretch(self.path, stored.begin, stored.end - stored.begin, name)
            self.tensors[name] = (DTYPES[stored.dtype], stored.shape, stretch)
        self._check_index()

    def _check_index(self) -> None:
        """Every tensor that an index in the same folder places in this file must be there."""
        own = Path(self.path)
        for index in sorted(own.parent.glob("*.safetensors.index.json")):
            places = read_json_object(index, LoadingError).get("weight_map", {})
            if not isinstance(places, dict):
                raise LoadingError(f"{index}: its weight_map is not an object. Download or copy it again.")
            absent = [name for name, file in places.items() if file == own.name and name not in self.tensors]
            if absent:
                others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
                raise LoadingError(
                    f"{self.path} lacks {absent[0]}{others}, which {index.name} says it holds. Download or copy both again."
                )
