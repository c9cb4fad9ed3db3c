"""From a list that fails to a short one that fails: lines are left out for as long as it still does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrunk(lines: Sequence[T], fails: Callable[[list[T]], bool], *, seconds: float = 120.0) -> list[T]:
    """The shortest list that was found. fails: whether a list still fails as the first one did."""
    kept = list(lines)
    deadline = time.monotonic() + seconds
    size = max(1, len(kept) // 2)
    while True:
        changed = False
        begin = 0
        while begin < len(kept) and time.monotonic() < deadline:
            fewer = kept[:begin] + kept[begin + size :]
            if fails(fewer):
                kept, changed = fewer, True
            else:
                begin += size
        if (size == 1 and not changed) or time.monotonic() >= deadline:
            return kept
        size = max(1, size // 2)
