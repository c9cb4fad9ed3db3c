"""The values of one recorded tensor, as the engine asks for them (`zero.sources.Source`).

The ranks replay their records apart, so these must tell the same: `history` is what they compare. Where a script has written on
one rank alone, or another number on each, shards would not belong together: rank 0 makes such a weight for all.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..files.reader import FileStretch
from ..zero.sources import MadeBy
from .recording import Constant, Entry, Ref, constants_of, origin_of, read, read_in_stretches, records_of

# Of a constant: what is larger is not told to every rank, but stays where it is. A generator's state has 5,056.
_FACT_NBYTES = 1 << 16


class RecordedSource:
    """The values of one recorded tensor.

    Each rank makes its own interval of what can be read in stretches, and of what is only drawn. What remains was made of
    whole tensors of files, by a transposition for example, or of a large tensor that had memory in the block: rank 0's.
    """

    def __init__(self, ref: Ref) -> None:
        self.ref = ref
        self.made_by: MadeBy = "each rank"
        if any(constant.value.nbytes > _FACT_NBYTES for constant in constants_of(ref.record)):
            self.made_by = "rank 0"
        elif any(record.origin is not None for record in records_of(ref.record)) and not read_in_stretches(ref):
            self.made_by = "one rank"

    def read(self, begin: int, end: int) -> Tensor:
        return read(self.ref, begin, end)

    def in_file(self) -> FileStretch | None:
        found = origin_of(self.ref) if self.made_by == "each rank" else None
        stretch, at = found or (None, 0)
        if not isinstance(stretch, FileStretch):
            return None
        return replace(stretch, offset=stretch.offset + at, nbytes=self.ref.numel * self.ref.dtype.itemsize)

    def facts(self) -> list[Tensor]:
        # On the CPU: they are sent to processes with other devices.
        return [constant.value.cpu() for constant in self._told()]

    def adopt(self, facts: Sequence[Tensor]) -> None:
        for constant, value in zip(self._told(), facts, strict=True):
            constant.value = value.to(constant.value.device)

    def _told(self) -> list[Constant]:
        return [] if self.made_by == "rank 0" else constants_of(self.ref.record)

    def leave_to_rank_0(self) -> None:
        self.made_by = "rank 0"

    def history(self) -> int:
        """A number that is the same where the same was done in the same order; the values of constants are not in it."""
        found = [(self.ref.upto, *_view(self.ref))]
        records = records_of(self.ref.record)
        numbers = {id(record): number for number, record in enumerate(records)}
        for record in records:
            upto = self.ref.upto if record is self.ref.record else len(record.entries)
            entries = [_facts(entry, numbers) for entry in record.entries[:upto]]
            found.append((record.nbytes, record.origin is not None, entries))
        return zlib.crc32(repr(found).encode())


def _facts(entry: Entry, numbers: Mapping[int, int]) -> tuple[Any, ...]:
    """What was done, without objects that have another name in each process. numbers: of records, by their id."""
    name = str(entry.op) if hasattr(entry.op, "_schema") else entry.op.__qualname__
    return name, [_fact(item, numbers) for item in tree_leaves((entry.args, entry.kwargs))], entry.seeded


def _fact(item: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(item, Ref):
        return numbers.get(id(item.record)), item.upto, *_view(item)
    if isinstance(item, Constant):
        return tuple(item.value.shape), str(item.value.dtype)
    return item if isinstance(item, (bool, int, float, complex, str)) else type(item).__name__


def _view(ref: Ref) -> tuple[Any, ...]:
    return str(ref.dtype), ref.size, ref.stride, ref.offset
