"""What rank 0 does alone, in a verb that scripts call on every rank or under `if is_main_process`: its error is every rank's.

    rank 0   init_trackers: opens files, fails, says so | raises what it met
    rank 1   init_trackers: what of rank 0? ............| RankError, with its words

It is no collective, in which rank 0 would wait for ranks that do not come: rank 0 leaves a word, and who comes waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .agreeing import attempt_or_interrupt, raise_first, words_of
from .ranks import Ranks

T = TypeVar("T")
_DONE = "done"


def by_first(ranks: Ranks, verb: str, action: Callable[[], T]) -> T | None:
    """What `action` gives on rank 0, once it is done there; None on the others, which do nothing.

    verb: its name, that of an identifier. Raises on rank 0 what `action` raised, and RankError with its words on the others.
    """
    words = ranks.words
    if ranks.parted:  # nobody hears words any more
        return action() if ranks.rank == 0 else None
    place = words.place(verb)
    if ranks.rank != 0:
        [said] = words.heard(place, [0])
        raise_first(None, [None if said == _DONE else said])
        return None
    result, error = attempt_or_interrupt(action)
    words.say(place, words_of(error) or _DONE)
    if error is not None:
        raise error
    return result
