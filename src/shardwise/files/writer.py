"""A safetensors file that is written tensor by tensor, in any order, and read in parts, each block checked.

The writer knows names, dtypes and shapes beforehand, so the header comes first and every tensor's place is fixed; what is in
memory is the tensor being written. A tensor is summed up in blocks of 4 MiB, so that a reader of a part checks every
byte that it uses and reads at most two blocks more than it wants. The file is plain safetensors: any reader opens it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import disk
from .documents import opened
from .past_cache import PAGE, PastCache

BLOCK_NBYTES = 4 << 20
_LARGE = 64 << 20  # bytes of a file whose tensors begin on a page, so that they can be written past the cache
_READ_NBYTES = 1 << 30  # Linux reads at most 2 GiB in a call

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors writes it. Raises CheckpointError for one that it cannot hold."""
    if dtype not in _NAMES:
        raise CheckpointError(f"a tensor of {dtype} cannot be written to a safetensors file.")
    return _NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in a safetensors file. Raises CheckpointError."""
    if name not in DTYPES:
        raise CheckpointError(f"a tensor of the unknown dtype {name!r} cannot be read.")
    return DTYPES[name]


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are in its file, and the CRC-32 of each block of them, the last one shorter."""

    dtype: torch.dtype
    offset: int
    nbytes: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """What will be written: a name, a dtype, a shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Where the tensors of a file lie, and its header; made once, and good for every file of the same tensors.

    specs: every tensor of the file. in_order: they, in the order in which they lie. start: bytes before the first of them.
    Raises CheckpointError for a tensor without elements: such a file could be loaded, and would be an empty adapter. The
    errors name `file`.
    """

    def __init__(self, specs: Sequence[Spec], file: str, metadata: Mapping[str, str] | None = None) -> None:
        self.specs = {spec.name: spec for spec in specs}
        empty = [spec.name for spec in specs if 0 in spec.shape]
        if empty:
            raise CheckpointError(
                f"{empty[0]} has no elements (shape {self.specs[empty[0]].shape}): it is not written to {file}. A "
                "sharded weight looks like that; save through the accelerator or model.save_pretrained."
            )
        if len(self.specs) != len(specs):
            raise CheckpointError(f"{file}: two tensors have the same name.")
        # The widest dtype first: then every tensor is aligned for its own, whatever comes before it.
        self.in_order = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offsets: dict[str, int] = {}
        end = 0
        for spec in self.in_order:
            offsets[spec.name] = end
            end += spec.nbytes
            header[spec.name] = {
                "dtype": dtype_name(spec.dtype),
                "shape": list(spec.shape),
                "data_offsets": [offsets[spec.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % (PAGE if end >= _LARGE else 8))
        self.header = struct.pack("<Q", len(text)) + text
        self.start = len(self.header)
        self.nbytes = self.start + end
        self.offsets = {name: self.start + offset for name, offset in offsets.items()}


class TensorFile:
    """A safetensors file being written; as a context manager it is closed, and synced if nothing was raised.

    content: every tensor of the file, or their layout. `write` each of them once, in any order.
    Raises CheckpointError as `Layout`.
    """

    def __init__(self, path: Path, content: Sequence[Spec] | Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.places: dict[str, Place] = {}
        self.layout = content if isinstance(content, Layout) else Layout(content, path.name, metadata)
        self.nbytes = self.layout.nbytes
        self._specs = dict(self.layout.specs)
        self._past: PastCache | None = None
        self._descriptor = disk.create(path, self.nbytes)
        try:
            disk.write(self._descriptor, memoryview(self.layout.header), 0, path)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, tensor: Tensor, advance: Callable[[int], None] = lambda nbytes: None) -> None:
        """Write `tensor`, on any device, as the spec of that name. Raises CheckpointError if it is not what was announced.

        advance: called with the number of bytes after each block that is written.
        """
        spec = self._specs.pop(name, None)
        if spec is None:
            raise CheckpointError(f"{name} was not announced for {self.path.name}, or is written twice.")
        if tensor.dtype != spec.dtype or tensor.numel() != math.prod(spec.shape):
            raise CheckpointError(
                f"{name} has {tensor.numel()} elements of {tensor.dtype}; {tuple(spec.shape)} of {spec.dtype} were "
                f"announced for {self.path.name}."
            )
        data = as_bytes(tensor)
        offset = self.layout.offsets[name]
        sums = []
        for begin in range(0, spec.nbytes, BLOCK_NBYTES):
            block = data[begin : begin + BLOCK_NBYTES]
            sums.append(zlib.crc32(block))
            disk.write(self._descriptor, block, offset + begin, self.path)
            advance(block.nbytes)
        self.places[name] = Place(spec.dtype, offset, spec.nbytes, tuple(sums))

    def write_span(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`, whatever tensors it is of; `note` says their sums when all of them are written.

        data: writable memory. Any thread may call it.
        """
        if self._past is None:
            disk.write(self._descriptor, data, offset, self.path)
        else:
            self._past.write(data, offset)

    def bypass_cache(self) -> None:
        """Have spans go past the page cache, where that is possible, until the file is closed."""
        self._past = PastCache(self.path, self._descriptor)

    def note(self, name: str, blocks: Sequence[int]) -> None:
        """The tensor of that name has been written by spans; blocks: the sums of its blocks."""
        spec = self._specs.pop(name)
        self.places[name] = Place(spec.dtype, self.layout.offsets[name], spec.nbytes, tuple(blocks))

    def close(self) -> None:
        """Sync and close. Raises CheckpointError if something that was announced has not been written."""
        try:
            if self._specs:
                raise CheckpointError(f"{next(iter(self._specs))} was announced for {self.path.name}, not written.")
            if self._past is not None:
                self._past.finish()
            disk.sync(self._descriptor, self.path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close without a promise: the file is to be removed."""
        if self._past is not None:
            self._past.close()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes on the CPU; a view of it where it is there and contiguous.

    Not through numpy: torch never again shrinks a storage that `.numpy()` has seen, and a gathered weight's must shrink.
    """
    held = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    if not held.nbytes:
        return memoryview(b"")
    raw: Any = (ctypes.c_ubyte * held.nbytes).from_address(held.data_ptr())
    raw.tensor = held  # the memory lives as long as the view of it
    return memoryview(raw).cast("B")


def read_part(path: Path, place: Place, begin: int, out: Tensor) -> None:
    """Fill `out` with the tensor's elements from `begin` on.

    out: 1-d and contiguous on the CPU, of the place's dtype.
    Raises CheckpointError if the file ends too early or a block does not have the sum that was written down.
    """
    target = as_bytes(out)
    first, last = begin * place.dtype.itemsize, begin * place.dtype.itemsize + target.nbytes
    with opened(path, CheckpointError) as (descriptor, _):
        for number in range(first // BLOCK_NBYTES, -(-last // BLOCK_NBYTES)):
            start = number * BLOCK_NBYTES
            size = min(BLOCK_NBYTES, place.nbytes - start)
            block = memoryview(bytearray(size))
            found = read_into(descriptor, block, place.offset + start)
            if found < size:
                raise CheckpointError(f"{path} is cut off: it ends within byte {place.offset + start + found}.")
            if zlib.crc32(block) != place.blocks[number]:
                raise CheckpointError(
                    f"{path} is damaged between bytes {place.offset + start} and {place.offset + start + size}: the "
                    "checksum differs."
                )
            low, high = max(first, start), min(last, start + size)
            target[low - first : high - first] = block[low - start : high - start]


def read_into(descriptor: int, out: memoryview, offset: int) -> int:
    """Fill `out` from `offset` on; how many bytes there were, fewer only where the file ends."""
    done = 0
    while done < out.nbytes:
        count = os.preadv(descriptor, [out[done : done + _READ_NBYTES]], offset + done)
        if not count:
            break
        done += count
    return done
