"""The header of a safetensors file, checked as the format's own library checks it.

    8 bytes: length of the header | the header, JSON | the tensors' bytes, one after another to the end of the file

Every byte behind the header belongs to exactly one tensor, and each tensor has as many as its shape and dtype need. So nobody
can make a reader take the bytes of one tensor for another's, and a file that was cut off is an error before anything is
built from it. One thing is stricter here: a name that occurs twice is an error, where the library lets the last one win.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ..errors import ShardwiseError
from .documents import opened, parse_json, shown
from .writer import read_into

_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_COUNT_LIMIT = 1 << 64  # its numbers are of 64 bits
_SURROGATE = "\\ud"

# Of every dtype of the format, whether torch has it or not.
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. begin, end: its bytes, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """metadata: the file's own notes. tensors: by name, in the order of the header."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]


def read_header(path: str, raises: type[ShardwiseError]) -> Header:
    """The checked header of the file at `path`. Raises `raises`, with the file and the tensor."""
    with opened(path, raises) as (descriptor, size):
        length = int.from_bytes(_bytes_of(descriptor, 0, min(8, size)), "little")
        if size < 8 or length > _HEADER_LIMIT or 8 + length > size:
            raise raises(
                f"{path} is cut off or is no safetensors file: {size} bytes, a header of {length}. Download or copy it again."
            )
        data = _bytes_of(descriptor, 8, length)
    return _parse(data, path, 8 + length, size, raises)


def _bytes_of(descriptor: int, offset: int, count: int) -> bytes:
    data = bytearray(count)
    read_into(descriptor, memoryview(data), offset)
    return bytes(data)


def _parse(data: bytes, path: str, start: int, size: int, raises: type[ShardwiseError]) -> Header:
    name = f"{path}: its header"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise raises(f"{name} is not UTF-8. Download or copy it again.") from None
    content = parse_json(text, name, raises, limit=_HEADER_LIMIT, whole_number=_whole)
    if not isinstance(content, dict):
        raise raises(f"{name} is not a JSON object. Download or copy it again.")
    if _SURROGATE in text.lower() and not _is_unicode(content):
        raise raises(f"{name} holds half of a character. Download or copy it again.")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise raises(f"{name} has metadata that are not texts by name. Download or copy it again.")
    rows = {tensor: _row(tensor, row, path, raises) for tensor, row in content.items()}
    _check_cover(rows, path, start, size, raises)
    return Header(metadata, {tensor: Stored(d, s, start + a, start + b) for tensor, (d, s, a, b) in rows.items()})


def _whole(text: str) -> Any:
    return -0.0 if text == "-0" else int(text)  # which the format's library takes for a broken number


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _row(tensor: str, row: Any, path: str, raises: type[ShardwiseError]) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, offsets) of one tensor, each of its kind, and fitting each other."""
    where = f"{path}: the tensor {shown(tensor)}"
    if isinstance(row, list) and len(row) == 3:  # which the format's library takes too
        row = dict(zip(("dtype", "shape", "data_offsets"), row, strict=True))
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        raise raises(f"{where} lacks a dtype, a shape or offsets. Download or copy the file again.")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise raises(f"{where} has the dtype {shown(dtype)}, which the format does not have.")
    if not _are_counts(shape):
        raise raises(f"{where} has the shape {shown(shape)}, which is not a list of sizes.")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise raises(f"{where} has the offsets {shown(offsets)}, which are not two places in the file.")
    numel = 1
    for length in shape:
        numel *= length
        if numel >= _COUNT_LIMIT:
            raise raises(f"{where} has the shape {shown(shape)}, which no file can hold.")
    nbytes, rest = divmod(numel * _BITS[dtype], 8)
    begin, end = offsets
    if rest or end - begin != nbytes:
        raise raises(
            f"{where} has {end - begin} bytes by its offsets, but {math.ceil(numel * _BITS[dtype] / 8)} by its shape "
            f"{shown(shape)} and dtype {dtype}. Download or copy the file again."
        )
    return dtype, tuple(shape), begin, end


def _are_counts(values: Any) -> bool:
    # A bool is an int to Python.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _COUNT_LIMIT for value in values)


def _check_cover(
    rows: dict[str, tuple[str, tuple[int, ...], int, int]],
    path: str,
    start: int,
    size: int,
    raises: type[ShardwiseError],
) -> None:
    """Every byte behind the header belongs to one tensor."""
    at = 0
    for begin, end, tensor in sorted((begin, end, tensor) for tensor, (_, _, begin, end) in rows.items()):
        if begin != at:
            kind = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise raises(
                f"{path}: the tensor {shown(tensor)} {kind}: it begins at byte {start + begin} instead of {start + at}. "
                "Download or copy the file again."
            )
        at = end
    if size < start + at:
        raise raises(
            f"{path} is cut off: its header describes {start + at} bytes, the file has {size}. Download or copy it again."
        )
    if size > start + at:
        raise raises(f"{path} has {size - start - at} bytes more than its header describes. Download or copy it again.")
