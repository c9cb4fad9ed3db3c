"""What a collective says when another rank does not come to it: a sentence, once it is known and at once from then on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from ..errors import RankError
from .activity import BARRIER, activity
from .blame import led_by
from .watcher import explained

# How a collective is told of.
_NAMES = {"all_gather_together": "all_gather", "barrier": BARRIER, "all_reduce_gradient": "all_reduce"}

T = TypeVar("T")
P = ParamSpec("P")

# What gloo and the store say when another rank is not there.
_MISSING = re.compile(r"timed? ?out|connection|pair closure|broken pipe|socket", re.IGNORECASE)


class Attendance:
    """Whether the other ranks of the run are there, as far as this rank knows.

    rank: this one, in the run. lost: what a collective said that another rank did not come to; None while all are there.
    before: what is called before a collective of this rank: it may have one to finish with the others.
    beside: they are a thread's beside the training, which publishes nothing.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.beside = False
        self.lost: str | None = None
        self.before: Callable[[], None] | None = None


class _Waits(Protocol):
    """What has collectives."""

    attendance: Attendance


def waiting(collective: Callable[P, T]) -> Callable[P, T]:
    """A collective that says in a sentence, RankError, that another rank did not come; and at once from then on.

    Of NCCL's, which only enqueue, torch's watchdog tells. It is published while it runs, and the error begins with the line
    that names the rank that did not come, where one can be named.
    """
    name = collective.__name__

    @functools.wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        waits: _Waits = args[0]  # type: ignore[assignment]
        attendance = waits.attendance
        if attendance.lost is not None:
            raise RankError(attendance.lost)
        if attendance.before is not None:
            attendance.before()
        outermost = not attendance.beside and activity.waits(_NAMES.get(name, name))
        try:
            return collective(*args, **kwargs)
        except RankError:
            raise
        except RuntimeError as error:
            if _MISSING.search(str(error)) is None:
                raise
            attendance.lost = led_by(
                explained(error),
                f"rank {attendance.rank} waited for the other ranks in {name}, and at least one did not come: "
                f"it was interrupted, has ended, or does something else. ({' '.join(str(error).split())[:200]}) Nothing that "
                "needs all ranks works any more: end this one too, and resume from a checkpoint.",
            )
            raise RankError(attendance.lost) from error
        finally:
            if outermost:
                activity.goes_on()

    return call
