"""Which entry modules are running, outermost first; and whether that is still so.

torch calls the hook behind a forward also when an Exception ends it, but not for Ctrl-C, an exit or another BaseException:

    model(x)    running: model, block 2            Ctrl-C, and nobody says that they have ended
    model(x)    running: model, block 2, model     is the model inside of itself, or is the rest left over?

The frame that called the outermost one tells: if it is on its thread's stack no more, all of them are over. That is asked only
where it is in doubt: when the model is called while it seems to run, when a backward seems to begin inside of a forward, and
by verbs that belong between passes. An inner one that is left over, because the model itself caught what ended it, is over when
the one around it ends.

This file knows neither hooks nor passes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from torch import nn

from .unit import Unit


class Running(NamedTuple):
    """An entry module in its forward. units: those that it counts as in use; recomputed: it runs inside of a backward."""

    module: nn.Module
    units: Sequence[Unit]
    recomputed: bool


class Forwards:
    """The forwards of one model that are running. root: the model."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._running: list[Running] = []
        self._plain = 0  # those that are not recomputed
        self._frame: FrameType | None = None  # which called the outermost one
        self._thread = 0

    def __bool__(self) -> bool:
        return bool(self._running)

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model is running, one whose backward runs inside of it included."""
        return self._plain > 0

    def begin(self, running: Running, frame: FrameType) -> None:
        """frame: of the call of the module, which lives until the forward is over."""
        if not self._running:
            self._frame, self._thread = frame, threading.get_ident()
        self._running.append(running)
        self._plain += not running.recomputed

    def end(self, module: nn.Module) -> list[Running]:
        """What is over with the forward of `module`, innermost first; nothing if an error came before it had begun."""
        place = len(self._running) - 1
        while place >= 0 and self._running[place].module is not module:
            place -= 1
        if place < 0:
            return []
        over = self._running[place:]
        del self._running[place:]
        for running in over:
            self._plain -= not running.recomputed
        if not self._running:
            self._frame = None
        return over[::-1]

    def lend(self, unit: Unit) -> Running | None:
        """The innermost module that runs on this thread, which uses `unit` from now on; None if none runs."""
        if not self._running or threading.get_ident() != self._thread or self.are_over():
            return None
        running = self._running[-1]
        self._running[-1] = running._replace(units=[*running.units, unit])
        return running

    def doubted(self, module: nn.Module) -> bool:
        """Whether a call of `module` now means that what seems to run may be over."""
        return bool(self._running) and (module is self._root or module is self._running[0].module)

    def are_over(self) -> bool:
        """Whether the outermost forward has ended without a word. Walks over a thread's stack."""
        if not self._running:
            return False
        frame = sys._current_frames().get(self._thread)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None

    def forget(self) -> None:
        """None of them is running."""
        self._running.clear()
        self._plain = 0
        self._frame = None
