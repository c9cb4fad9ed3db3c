"""What a prepared loader publishes of its batches, and what it does where neighbours read another number of them.

    rank 0   1 2 3 4           its 4th batch is given while rank 1's epoch has ended with 3: DataError here
    rank 1   1 2 3 .           it ends while rank 0 has given a 4th: DataError here; whichever comes later

A rank that trained on without the others would wait in its next gather for ever. Neighbours are the ranks whose records lie in
this machine's memory (`ranks/board.py`): looking there costs a microsecond for each, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from ..errors import DataError
from ..ranks.activity import activity
from ..ranks.watcher import missing_batches
from .course import Course

T = TypeVar("T")


def asked(batches: Iterator[T]) -> Iterator[T]:
    """The same batches; while one is read it is published that the loader is waited for."""
    while True:
        activity.asks()
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            activity.asks(over=True)
        yield batch


class Giving:
    """The batches of one iteration over a prepared loader of rank `rank`. Counts them in the loader's course."""

    def __init__(self, course: Course, rank: int) -> None:
        self._course = course
        self._rank = rank
        self._epoch = course.begun
        self._iteration, self._before = activity.begins_iteration(course.number)

    def gives(self) -> None:
        """The next batch is given out. Raises DataError if a neighbour's epoch had fewer, and this loader trains."""
        self._course.given += 1
        activity.loads(self._iteration, self._course.given, self._before)
        self._compare(ended=False)

    def ends(self) -> None:
        """There are no more. Raises DataError if a neighbour has been given more."""
        course = self._course
        activity.loads(self._iteration, course.given, self._before, ended=True)
        self._compare(ended=True)
        if course.begun == self._epoch:
            course.begun, course.given = None, 0

    def _compare(self, *, ended: bool) -> None:
        if not self._course.trained:
            return
        given = self._course.given
        other = missing_batches(self._iteration, given, ended=ended)
        if other is None:
            return
        (fewer, few), (more, many) = sorted([(self._rank, given), other], key=lambda rank: rank[1])
        raise DataError(
            f"rank {fewer}'s data loader has ended after {few} batches, and rank {more}'s gives batch {many}: ranks that train "
            "together need equally many. Leave even_batches on; give every rank the same data set; and let a stream have the "
            "same length on every rank, or drop what is left over with drop_last=True."
        )
