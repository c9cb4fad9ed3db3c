"""Whole tensors on every rank, from the intervals that each rank of `ranks.owners` holds of them.

The intervals of a rank, one after another, are a stream of bytes. Equal parts of all streams go in one all-gather: the device
holds that much for each rank and no more, dtypes may be mixed, and as the ranks hold about equally much in all, the order of
the tensors does not matter.

    rank 0   exp_avg a[0:6]  exp_avg b[0:2]  ...      | round 0 | round 1 | ...
    rank 1   exp_avg a[6:8]  exp_avg b[2:9]  ...      | round 0 | round 1 | ...
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..ranks.agreeing import FirstError
from ..ranks.ranks import Ranks
from .intervals import Interval

# Bytes of a rank's stream in one round.
ROUND_NBYTES = 16 << 20

Label = TypeVar("Label", bound=Hashable)


def exchange(held: Sequence[tuple[Label, Interval]], ranks: Ranks) -> dict[Label, Tensor]:
    """The whole tensors of all labels, on the CPU of every rank, each in its own shape and dtype. Collective.

    held: this rank's intervals; those of one label are the tensor, over the ranks that divide them.
    Raises StoreError for a drive that fails on this rank, RankError for one of another rank.
    """
    mine, owners = [interval for _, interval in held], ranks.owners
    rows = ranks.gather_objects([(label, i.shape, i.dtype, i.begin, i.numel) for label, i in held])
    table = [rows[rank] for rank in owners.members]
    found: dict[Label, Tensor] = {}
    for label, shape, dtype, _, _ in (row for rows in table for row in rows):
        if label not in found:
            found[label] = torch.empty(shape, dtype=dtype)
    streams = [list(_rounds([(dtype.itemsize, numel) for _, _, dtype, _, numel in rows])) for rows in table]
    size = max((segment.end for stream in streams for one in stream for segment in one), default=0)
    sent = torch.zeros(size, dtype=torch.uint8, device=ranks.device)
    got = torch.empty(size * owners.size, dtype=torch.uint8, device=ranks.device)
    first = FirstError()

    def read(segment: _Segment) -> None:
        interval = mine[segment.interval]
        values = interval.part(interval.begin + segment.first, segment.numel).look()
        sent[segment.begin : segment.end].copy_(values.contiguous().view(torch.uint8))

    for number in range(max(map(len, streams))):
        for segment in _of(streams[owners.rank], number):
            first.attempt(lambda: read(segment))  # noqa: B023 - called at once
        owners.all_gather(got, sent)
        here = got.to("cpu")
        for rank, stream in enumerate(streams):
            for segment in _of(stream, number):
                label, _, _, begin, _ = table[rank][segment.interval]
                at = begin + segment.first
                target = found[label].view(-1)[at : at + segment.numel].view(torch.uint8)
                target.copy_(here[rank * size + segment.begin : rank * size + segment.end])
    ranks.agree(first.error)
    return found


@dataclass(frozen=True)
class _Segment:
    """`numel` elements of a rank's interval of that number, from its element `first` on; bytes [begin, end) of a round."""

    interval: int
    first: int
    numel: int
    begin: int
    end: int


def _rounds(intervals: Sequence[tuple[int, int]]) -> Iterator[list[_Segment]]:
    """A rank's intervals, given by (bytes of an element, elements), in portions that fit a round, cut between elements."""
    segments: list[_Segment] = []
    at = 0
    for index, (itemsize, numel) in enumerate(intervals):
        first = 0
        while first < numel:
            count = min((ROUND_NBYTES - at) // itemsize, numel - first)
            if not count:
                yield segments
                segments, at = [], 0
                continue
            segments.append(_Segment(index, first, count, at, at + count * itemsize))
            first, at = first + count, at + count * itemsize
    if segments:
        yield segments


def _of(stream: Sequence[list[_Segment]], number: int) -> Sequence[_Segment]:
    return stream[number] if number < len(stream) else ()
