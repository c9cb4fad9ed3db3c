"""Words that one rank leaves for others, who may ask for them or not: nobody waits who does not ask.

A collective needs every rank. Whether a rank should come to one it may have to learn from another that will not: rank 0, which
was given a state dict, saves it alone. Its word lies in the store by which the ranks met, under the place in the program:

    rank 0   exchange 41 | save_pretrained: "given"       | exchange 42
    rank 1   exchange 41 | save_pretrained: what of rank 0? | exchange 42        the first one behind exchange 41, on both
"""

from __future__ import annotations

import datetime
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import RankError
from .activity import activity
from .marks import missing_after

log = logging.getLogger("shardwise")


class _Program:
    """How far this process is, whatever Ranks it has: exchanges of facts among all ranks, and places named since the last."""

    def __init__(self) -> None:
        self.exchanges = 0
        self.places: Counter[str] = Counter()


_program = _Program()


def exchanged() -> None:
    """All ranks exchange facts now: each counts it, so that the count is the same on all at one place of the program."""
    _program.exchanges += 1
    _program.places.clear()


def exchanges() -> int:
    """How many exchanges of facts this process has counted."""
    return _program.exchanges


def go_on_from(counts: Sequence[int]) -> None:
    """All ranks have told each other their counts: an exchange that was interrupted on some of them no longer parts them."""
    _program.exchanges = max(counts)
    _program.places.clear()


@contextmanager
def behind(exchange: Callable[[], None]) -> Iterator[None]:
    """For a block that this rank runs behind an exchange with ranks that have run it before: its places are named as theirs."""
    before, places = _program.exchanges, _program.places.copy()
    exchange()
    counted = _program.exchanges - before
    _program.exchanges, _program.places = before, places
    try:
        yield
    finally:
        _program.exchanges += counted
        _program.places.clear()


class Words:
    """One rank's.

    store: gives the store by which the ranks met; None for a run of one rank. timeout: how long to wait for a word.
    world_size: how many ranks there are. say_after_s: after what time a wait logs the rule that its caller gives.
    """

    say_after_s = 5.0

    def __init__(
        self, rank: int, store: Callable[[], Any] | None, timeout: datetime.timedelta, world_size: int = 1
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self.timeout = timeout

    def place(self, verb: str) -> str:
        """A name for this place of the program, the same on every rank: the n-th `verb` since all last exchanged facts.

        So what one rank did there alone is not taken for what all do later.
        """
        _program.places[verb] += 1
        return f"shardwise/{verb}/{_program.exchanges}.{_program.places[verb]}"

    def say(self, place: str, word: str) -> None:
        """Leave a word; nobody waits."""
        if self._store is not None:
            self._store().set(f"{place}/{self._rank}", word)

    def heard(self, place: str, ranks: Sequence[int], rule: str = "") -> list[str]:
        """What these ranks say at that place. Waits for them; raises RankError if one does not come, or rank 0 has ended.

        rule: what a script may not have known, logged where the wait is a long one.
        """
        if self._store is None or not ranks:
            return []
        marks, verb = {rank: f"{place}/{rank}" for rank in ranks}, place.split("/")[1]

        def say(missing: list[int], waited: float) -> None:
            names = ", ".join(map(str, missing))
            log.warning("%s Rank %d has waited %.0f s for rank %s.", rule, self._rank, waited, names)

        try:
            with activity.waiting(verb):
                late = self.say_after_s if rule else math.inf
                missing = missing_after(self._store, marks, self.timeout.total_seconds(), say, say_after_s=late)
            if missing:
                raise RankError(f"{verb}: rank {missing[0]} has not come to it within {self.timeout}.")
            return [word.decode() for word in self._store().multi_get(list(marks.values()))]
        except RankError:
            raise
        except RuntimeError as error:  # torch's, of the connection
            raise RankError(
                f"{verb}: the process by which the ranks met, rank 0's or the launcher's, has ended."
            ) from error

    def meet(self, place: str, limit_s: float, say_after_s: float) -> bool:
        """Whether every rank has come to `place` within `limit_s`. It is logged, once, that ranks are missing."""
        if self._store is None:
            return True

        def say(missing: list[int], waited: float) -> None:
            log.warning("rank %d reads sharded weights and waits for the other ranks to read them too.", self._rank)

        marks = {rank: f"shardwise/{place}/{rank}" for rank in range(self._world_size)}
        self._store().set(marks[self._rank], "here")
        missing = missing_after(self._store, marks, limit_s, say, say_after_s=say_after_s)
        if missing:
            self._store().delete_key(marks[self._rank])
        return not missing
