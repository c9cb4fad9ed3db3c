"""A sum over a tensor's bytes that does not depend on how ranks have cut it.

Frozen weights are not copied into every checkpoint; what is kept of them is this, to be compared when it is loaded. Each
word of 8 bytes is mixed with its place in the tensor, and the mixed words are added up modulo 2^64: sums of parts add up
to the sum of the whole, on any number of ranks. Two such sums, mixed differently, make 128 bits. They find a wrong base
model or a changed weight; they are no defence against someone who constructs one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ranks.ranks import Ranks
from ..step.intervals import Interval

_WORD = 8
_CHUNK = 1 << 20  # words at once: the scratch memory is some multiples of 8 MiB
_MASK = (1 << 64) - 1
# Odd constants without structure (the finaliser of splitmix64 and of murmur3), as signed numbers of 64 bits.
_PLACES = (0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D)
_FACTORS = (0x3F58476D1CE4E5B9, 0x7F51AFD7ED558CCD)


def part_sums(values: Tensor, first_byte: int) -> tuple[int, int]:
    """The two sums of a part of a tensor that begins `first_byte` bytes into it. values: 1-d, contiguous, any device.

    Raises CheckpointError if the part does not begin at a whole word.
    """
    if first_byte % _WORD:
        raise CheckpointError(
            f"a part that begins at byte {first_byte} cannot be summed up: it cuts a word of 8 bytes."
        )
    raw = values.view(torch.uint8)
    totals = [0, 0]
    for start in range(0, raw.numel(), _CHUNK * _WORD):
        piece = raw[start : start + _CHUNK * _WORD]
        if piece.numel() % _WORD or piece.storage_offset() % _WORD:
            padded = piece.new_zeros(-(-piece.numel() // _WORD) * _WORD)
            padded[: piece.numel()] = piece
            piece = padded
        words = piece.view(torch.int64)
        begin = (first_byte + start) // _WORD
        places = torch.arange(begin + 1, begin + 1 + words.numel(), device=words.device)
        for which, (place, factor) in enumerate(zip(_PLACES, _FACTORS, strict=True)):
            mixed = words + places * place
            mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * factor
            mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * factor
            totals[which] += int(mixed.sum())
    return totals[0] & _MASK, totals[1] & _MASK


def fingerprints(intervals: Iterable[Interval], ranks: Ranks) -> dict[str, str]:
    """The fingerprint of each named tensor, equal on every rank. Collective.

    intervals: this rank's; over all ranks each element once. What cannot be read on one rank is every rank's error.
    """

    def own() -> dict[str, tuple[int, int]]:
        mine: dict[str, tuple[int, int]] = {}
        for interval in intervals:
            first, second = part_sums(interval.look().to(interval.dtype), interval.begin * interval.dtype.itemsize)
            before = mine.get(interval.name, (0, 0))
            mine[interval.name] = (before[0] + first, before[1] + second)
        return mine

    # What rests on a drive may be unreadable, on one rank alone.
    mine = ranks.together(own)
    totals: dict[str, tuple[int, int]] = {}
    for found in ranks.gather_objects(mine):
        for name, sums in found.items():
            before = totals.get(name, (0, 0))
            totals[name] = (before[0] + sums[0], before[1] + sums[1])
    return {name: f"{a & _MASK:016x}{b & _MASK:016x}" for name, (a, b) in sorted(totals.items())}
