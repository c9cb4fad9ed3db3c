"""Copies of an optimizer's states to the host, one piece at a time, until somebody cannot wait for them.

    down      |weights|piece|piece|piece|piece| ...      the save's thread enqueues one when the one before is there
    compute   | forward, backward     ^ a number for the host goes between two pieces

A copy engine serves a stream as long as that has something to copy. What another stream wants of it, as a step's verdict or a
model's own `.item()`, waits for all that is enqueued, and so does that stream: 74 ms for 4.7 GB, and 1 ms where they come one
by one (`benchmarks/copy_order.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ranks.lanes import Lanes

PIECE_NBYTES = 64 << 20  # 1.2 ms at 54 GB/s, of which some 20 us are lost between two
Pair = tuple[Tensor, Tensor]  # into, from: of equal dtype and size, 1-d


class CopiesInTurn:
    """`pairs`, on the lane `down` behind `behind`. note: called with the event of the last copy enqueued.

    Any thread may call any of this; where the device is a CPU, a call that enqueues has copied when it returns.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        lanes: Lanes,
        behind: torch.Event | None,
        note: Callable[[torch.Event | None], None],
    ) -> None:
        self._lanes, self._note = lanes, note
        self._left = deque(_pieces(pairs))
        self._last = behind
        self._dropped = False
        self._lock = threading.Lock()

    def copy(self) -> None:
        """Return when all of it is there. Raises CheckpointError where some of it was dropped: it never will be."""
        self._go_on()
        if self._dropped:
            raise CheckpointError("the save was given up before all of its tensors were copied.")

    def _go_on(self) -> None:
        while True:
            with self._lock:
                last = self._last
            if last is not None:
                last.synchronize()
            with self._lock:
                if self._left:
                    self._enqueue(1)
                elif self._last is last:
                    return

    def hurry(self) -> torch.Event | None:
        """Enqueue all that is left; gives the event that is done when it is there."""
        with self._lock:
            self._enqueue(len(self._left))
            return self._last

    def drop(self) -> None:
        """Copy nothing more; what is under way stays until it is there."""
        with self._lock:
            self._dropped = self._dropped or bool(self._left)
            self._left.clear()
        self._go_on()

    @torch.no_grad()
    def _enqueue(self, count: int) -> None:
        """The next `count` pieces. What fails is still left: who asks again must not find that all is there."""
        pairs = [pair for piece in islice(self._left, count) for pair in piece]
        if pairs:
            with self._lanes.down.on():
                torch._foreach_copy_([into for into, _ in pairs], [source for _, source in pairs], non_blocking=True)
                self._last = self._lanes.down.mark() or self._lanes.mark_compute()
            self._note(self._last)
            for _ in range(count):
                self._left.popleft()


def _pieces(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Pairs of PIECE_NBYTES together, at most: large ones are cut, small ones go together."""
    piece: list[Pair] = []
    room = PIECE_NBYTES
    for into, source in pairs:
        done = 0
        while done < source.numel():
            count = min(room // source.element_size(), source.numel() - done)
            if not count:
                yield piece
                piece, room = [], PIECE_NBYTES
                continue
            piece.append((into[done : done + count], source[done : done + count]))
            done, room = done + count, room - count * source.element_size()
    if piece:
        yield piece
