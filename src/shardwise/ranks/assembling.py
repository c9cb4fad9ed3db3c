"""Waiting until every rank is in one call, and saying which are not: for verbs that scripts write under `if is_main_process`.

Each rank leaves a mark for each call that it comes to:

    rank 0   state_dict() | mark 0 ... looks for mark 1 ......... says who is missing ..... RankError after the timeout
    rank 1   ... elsewhere, in a step's collectives, which the marks in the store do not touch
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from datetime import timedelta
from typing import Any

from ..errors import RankError
from .blame import led_by
from .watcher import explained

log = logging.getLogger("shardwise")

# How often all ranks have come together in each call.
_assembled: Counter[str] = Counter()


def assemble(
    store: Any, rank: int, world_size: int, call: str, where: str, timeout: timedelta, *, say_after_s: float
) -> None:
    """See `Ranks.assemble`. store: the one by which the ranks met."""
    place = f"shardwise/{call}/{_assembled[call]}"
    store.set(f"{place}/{rank}", "here")
    missing, present = list(range(world_size)), []
    began, said = time.monotonic(), False
    rule = f"{call} is collective{where and ' ' + where}: call it on every rank, not only on the main process."
    while True:
        present += [other for other in missing if store.check([f"{place}/{other}"])]
        missing = [other for other in missing if other not in present]
        if not missing:
            break
        waited = time.monotonic() - began
        names = f"rank {', '.join(map(str, missing))}"
        if waited >= timeout.total_seconds():
            store.delete_key(f"{place}/{rank}")
            text = f"{rule} Rank {rank} has waited {waited:.0f} s for {names}, which did not call it."
            raise RankError(led_by(explained(TimeoutError("timed out")), text))
        if waited >= say_after_s and not said:
            said = True
            if rank == min(present):
                log.warning("%s Rank %d has waited %.0f s for %s.", rule, rank, waited, names)
        time.sleep(min(0.05, 0.001 + waited / 50))
    if _assembled[call]:
        # Every rank is in this call, so none looks for the marks of the one before.
        store.delete_key(f"shardwise/{call}/{_assembled[call] - 1}/{rank}")
    _assembled[call] += 1
