"""How a backward ends: by itself, or by an error.

Autograd calls what is queued at the end of a backward only where it came through. After an error it just lets go of it, before
the script sees the error; that is how the engine hears of it.

This file knows neither hooks nor passes.
"""

from __future__ import annotations

from collections.abc import Callable


class EndOfBackward:
    """To be queued in a backward; one of both is called when that is over.

    ended: it came through.
    left:  an error or an interrupt has ended it. It may neither raise nor wait for other ranks: nobody would hear of it.
    """

    def __init__(self, *, ended: Callable[[], None], left: Callable[[], None]) -> None:
        self._ended = ended
        self._left: Callable[[], None] | None = left

    def __call__(self) -> None:
        self._left = None
        self._ended()

    def __del__(self) -> None:
        if self._left is not None:
            self._left()
