"""The order in which units are gathered in one kind of pass: agreed once, from what each rank saw. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher


def merge(seen: Sequence[Sequence[int]]) -> list[int]:
    """A sequence that holds every rank's as a subsequence, in rank 0's order where they agree."""
    merged = list(seen[0])
    for other in seen[1:]:
        common: list[int] = []
        for _, a0, a1, b0, b1 in SequenceMatcher(None, merged, list(other), autojunk=False).get_opcodes():
            same = merged[a0:a1] == list(other[b0:b1])
            common += merged[a0:a1] if same else [*merged[a0:a1], *other[b0:b1]]
        merged = common
    return merged


def insert(sequence: list[int], i: int, natural: Sequence[int]) -> None:
    """Put `i` behind the nearest one that precedes it in the natural order."""
    for before in reversed(natural[: natural.index(i)]):
        if before in sequence:
            sequence.insert(sequence.index(before) + 1, i)
            return
    sequence.insert(0, i)
