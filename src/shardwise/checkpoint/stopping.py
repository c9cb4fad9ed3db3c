"""A stop that is asked for from outside: SIGTERM or SIGUSR1, as schedulers send them before they end a job.

A signal reaches one process at any moment; a save needs all of them at the same step. So a process only remembers it, and
the ranks ask each other between two steps.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from ..ranks.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers whether one of SIGNALS has come since `listen`."""

    def __init__(self) -> None:
        self._heard = False
        self._listening = False

    def listen(self) -> None:
        """From now on the signals end nothing by themselves. Only a main thread can; elsewhere this does nothing."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True

    def requested(self, ranks: Ranks) -> bool:
        """Whether any rank has heard one; the same answer on every rank. Collective, about 0.1 ms."""
        self.listen()
        return ranks.any_of([self._heard])[0]
