"""How the ranks of a save or a load end together: one error, the same words on every rank, or none.

Apart from `Ranks.together`, which raises what each rank met: behind a save or a load each rank catches one kind of error, so
that all remove what was written, or all take the next checkpoint.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import CheckpointError
from .agreeing import attempt_or_interrupt
from .ranks import Ranks

T = TypeVar("T")


def raise_first(ranks: Ranks, texts: Sequence[str | None], error: Exception | None, what: str = "") -> None:
    """CheckpointError with the words of the first rank that failed, if any did. No communication.

    texts: of every rank, from `agreed_words`. error: this rank's own. what: how the error's text begins.
    """
    for rank, text in enumerate(texts):
        if text is not None:
            who = f"rank {rank}: " if ranks.world_size > 1 else ""
            raise CheckpointError(f"{what}{who}{text}") from error


def together(ranks: Ranks, action: Callable[[], T], *, on: int | None = None, what: str = "") -> T | None:
    """What `action` gives on this rank; if it raises anywhere, a CheckpointError with the same words on every rank.

    on: the only rank that runs it; the others give None. what: how the error's text begins.
    An interrupt (Ctrl-C, an exit) stays what it is on its own rank.
    """
    result, error = attempt_or_interrupt(action) if on is None or ranks.rank == on else (None, None)
    texts = ranks.gather_objects(agreed_words(error))
    if error is not None and not isinstance(error, Exception):
        raise error
    raise_first(ranks, texts, error, what)
    return result


def on_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every rank; if it raises there, the same error on every rank."""
    result = together(ranks, action, on=0)
    found: T = ranks.broadcast_object(result)
    return found


@dataclass(frozen=True)
class Apart:
    """A rank that finds something else at a path than rank 0 does, and the hosts of both."""

    rank: int
    host: str
    host_of_0: str


def sees_another(ranks: Ranks, mark: str | int | None) -> Apart | None:
    """The first rank whose mark is not rank 0's, or that has none: a machine that reads its own disk. Collective.

    mark: what this rank has read.
    """
    seen = ranks.gather_objects((socket.gethostname(), mark))
    (host_of_0, first), *_ = seen
    for rank, (host, found) in enumerate(seen):
        if found is None or found != first:
            return Apart(rank, host, host_of_0)
    return None


def agreed_words(error: BaseException | None) -> str | None:
    """How one rank tells its error to the others."""
    if error is None:
        return None
    if not isinstance(error, Exception):
        return f"{type(error).__name__} interrupted it"
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
