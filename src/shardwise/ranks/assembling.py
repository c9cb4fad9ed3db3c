"""Waiting until every rank is in one call, and saying which are not: for verbs that scripts write under `if is_main_process`.

Each rank leaves a mark for each call that it comes to:

    rank 0   state_dict() | mark 0 ... looks for mark 1 ......... says who is missing ..... RankError after the timeout
    rank 1   ... elsewhere, in a step's collectives, which the marks in the store do not touch
"""

from __future__ import annotations

import logging
from collections import Counter
from datetime import timedelta
from typing import Any

from ..errors import RankError
from .blame import led_by
from .marks import missing_after
from .watcher import explained

log = logging.getLogger("shardwise")

# How often all ranks have come together in each call.
_assembled: Counter[str] = Counter()


def assemble(
    store: Any, rank: int, world_size: int, call: str, where: str, timeout: timedelta, *, say_after_s: float
) -> None:
    """See `Ranks.assemble`. store: the one by which the ranks met."""
    marks = {other: f"shardwise/{call}/{_assembled[call]}/{other}" for other in range(world_size)}
    store.set(marks[rank], "here")
    rule = f"{call} is collective{where and ' ' + where}: call it on every rank, not only on the main process."

    def say(missing: list[int], waited: float) -> None:
        if rank == min(marks.keys() - missing):  # one of those that wait is enough
            log.warning("%s Rank %d has waited %.0f s for %s.", rule, rank, waited, _named(missing))

    missing = missing_after(lambda: store, marks, timeout.total_seconds(), say, say_after_s=say_after_s)
    if missing:
        store.delete_key(marks[rank])
        text = f"{rule} Rank {rank} has waited {timeout.total_seconds():.0f} s for {_named(missing)}, which did not call it."
        raise RankError(led_by(explained(TimeoutError("timed out")), text))
    if _assembled[call]:
        # Every rank is in this call, so none looks for the marks of the one before.
        store.delete_key(f"shardwise/{call}/{_assembled[call] - 1}/{rank}")
    _assembled[call] += 1


def _named(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
