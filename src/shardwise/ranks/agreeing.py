"""How an error of one rank becomes every rank's, and what is compared between ranks: the forms, without a process group.

What is done decides which form is taken:

    together     do it without communication, agree, raise everywhere              Ranks.together(action), Ranks.agreeing()
    in steps     go through collectives with the others, remember the first error  FirstError, agreed upon behind the last step
    by itself    one rank's outcome as a value, for what follows                   attempt, attempt_or_interrupt
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from ..config.agreement import Difference, differences
from ..errors import RankError
from .blame import led_by, named
from .meeting import missed
from .words import exchanges, go_on_from

T = TypeVar("T")

_MOST_COMPARED = 256  # facts of a rank that differ from rank 0's and go around


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `action` gave, or what it raised."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def attempt_or_interrupt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """As `attempt`, for an action whose outcome the ranks agree on next: Ctrl-C or an exit inside is an outcome too."""
    try:
        return action(), None
    except BaseException as error:
        return None, error


class FirstError:
    """What first went wrong on this rank in work between collectives, which it goes through with the others all the same.

    error: what the ranks then agree on; None while all went well.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def attempt(self, action: Callable[[], T]) -> T | None:
        """What `action` gives; None, without running it, once something has failed. It is without communication."""
        if self.error is not None:
            return None
        result, self.error = attempt_or_interrupt(action)
        return result


def words_of(error: BaseException | None) -> str | None:
    """How a rank tells its error to the others."""
    if error is None:
        return None
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def raise_first(error: BaseException | None, words: Sequence[str | None]) -> None:
    """Raise this rank's own error, or RankError for the first rank that met one. words: of every rank, from `words_of`."""
    if error is not None:
        raise error
    for rank, text in enumerate(words):
        if text is not None:
            raise RankError(f"rank {rank} failed: {text}")


class Messages(Protocol):
    """The ranks, as far as objects go between them."""

    def gather_objects(self, value: Any) -> list[Any]: ...

    def broadcast_object(self, value: Any) -> Any: ...


def compared(
    ranks: Messages, facts: Callable[[], Mapping[str, Any]], where: str, timeout: timedelta, *, counted: bool
) -> list[Difference]:
    """See `Ranks.compare`. counted: whether the exchanges of `ranks` are counted, see words.py."""
    found, error = attempt(facts)
    text = json.dumps(found, sort_keys=True)
    try:
        said = ranks.gather_objects((hashlib.sha256(text.encode()).hexdigest(), words_of(error), exchanges()))
    except RuntimeError as lost:  # a rank that is gone, or did not come in time
        late = missed(where, timeout, lost.__cause__ or lost)
        raise RankError(led_by(named(str(lost)), str(late))) from lost
    if counted:
        go_on_from([count for *_, count in said])
    raise_first(error, [words for _, words, _ in said])
    if len({digest for digest, *_ in said}) == 1:
        return []
    # A model has thousands of facts: only those that differ from rank 0's go around.
    mine = dict(found or {})
    first = ranks.broadcast_object(mine)
    absent = object()
    own = [key for key in {**first, **mine} if first.get(key, absent) != mine.get(key, absent)]
    rows = ranks.gather_objects({key: [mine[key]] if key in mine else [] for key in own[:_MOST_COMPARED]})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    theirs = {key: [first[key]] if key in first else [] for key in keys}
    return differences([{key: entry[0] for key in keys if (entry := row.get(key, theirs[key]))} for row in rows])
