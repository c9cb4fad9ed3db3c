"""Waiting for what other ranks leave in the store by which all met: no collective is in the way of who does not ask."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any


def missing_after(
    store: Callable[[], Any],
    marks: Mapping[int, str],
    limit_s: float,
    say: Callable[[list[int], float], None] = lambda *_: None,
    *,
    say_after_s: float = math.inf,
) -> list[int]:
    """The ranks whose mark has not come within `limit_s`, of marks by rank; none as soon as all are there.

    say: called once, after `say_after_s`, with the ranks that are missing then and the seconds waited.
    Raises torch's RuntimeError where the store is gone.
    """
    began, said = time.monotonic(), False
    waiting = dict(marks)
    # Not the store's `wait`, which would hold its lock for all threads of the process.
    while waiting and not store().check(list(waiting.values())):
        # Who was there stays so: a rank that gives up takes its mark away.
        waiting = {rank: mark for rank, mark in waiting.items() if not store().check([mark])}
        waited = time.monotonic() - began
        if waiting and waited >= limit_s:
            return list(waiting)
        if waiting and waited >= say_after_s and not said:
            said = True
            say(list(waiting), waited)
        time.sleep(min(0.05, 1e-4 + waited / 50))
    return []
