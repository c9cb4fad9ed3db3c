"""What a script leaves to the end of its process, and the exit code of the process where that fails.

A save in the background may go on behind the last line of the script. What it meets then can be raised nowhere, the exit code
would be 0, and a scheduler would take the run for one that has saved its last step. So such an error is owed to somebody:

    script        save_state(async_=True) . last line
    thread        writes ................................... the disk is full
    interpreter                             | joins threads ......... | functions of atexit | flushes its streams | exit code

Who runs a script (the launcher's worker, a notebook's) calls `settle` when the script is over, and has the error raised there.
Elsewhere the interpreter has to say it: what it does last is to flush its streams, and where that fails it ends with exit code
120. So behind everything else that is registered something is put before stderr of which that flush fails. `os._exit` was
refused: it leaves out what others have registered, and what C++ does at the end.

The exit code of the script's own error stays. Of a `sys.exit(3)` nobody knows behind it but who runs the script: it is 120
elsewhere.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from ..errors import RankError

log = logging.getLogger("shardwise")


@dataclass(frozen=True)
class _Owed:
    """An error that nobody was told. everywhere: each rank has one of this kind, as long as all are there."""

    error: BaseException
    everywhere: bool

    @property
    def of_all(self) -> bool:
        """Whether each rank has it indeed: none was lost."""
        error: BaseException | None = self.error if self.everywhere else RankError()
        while error is not None and not isinstance(error, RankError):
            error = error.__cause__
        return error is None


class _Left:
    """What this process knows of its end."""

    def __init__(self) -> None:
        self.threads: WeakSet[threading.Thread] = WeakSet()
        self.closers: list[AtEnd] = []
        self.owed: list[_Owed] = []
        self.everywhere = False  # whether what was owed at the end is an error of every rank
        self.has_code = False

    @property
    def failed(self) -> bool:
        """Whether the script has failed by itself."""
        return self.has_code or getattr(sys, "last_value", None) is not None


_left = _Left()


def _forget_in_child() -> None:
    """A forked process has none of the threads, and is asked for nothing."""
    global _left  # noqa: PLW0603 - there is one end of a process
    _left = _Left()


os.register_at_fork(after_in_child=_forget_in_child)


# Who has something to finish.


def follow(thread: threading.Thread) -> None:
    """`thread` goes on behind the script, and what goes wrong in it is owed. No daemon: the interpreter joins it."""
    _left.threads.add(thread)


def owe(error: BaseException, *, everywhere: bool = False) -> None:
    """An error that is to be raised once somebody asks, or is `told`; else the process ends with an exit code that is not 0.

    everywhere: the ranks have agreed on it, so that each of them ends with one.
    """
    _left.owed.append(_Owed(error, everywhere))


def owed() -> list[BaseException]:
    """Those that nobody was told."""
    return [one.error for one in _left.owed]


def told(error: BaseException) -> None:
    """It is being raised."""
    _left.owed = [one for one in _left.owed if one.error is not error]


class AtEnd:
    """Has `action` called when the script is over, unless it is cancelled. what: its subject, for the log.

    An error in it is logged and owed: a run that ends with a word of its own has it raised.
    """

    def __init__(self, what: str, action: Callable[[], None]) -> None:
        self._what, self._action, self._process = what, action, os.getpid()
        _left.closers.append(self)
        atexit.register(self.run)

    def run(self) -> None:
        if os.getpid() != self._process:
            return
        self.cancel()
        try:
            self._action()
        except Exception as error:
            log.error("%s: %s: %s", self._what, type(error).__name__, error)
            owe(error)

    def cancel(self) -> None:
        atexit.unregister(self.run)
        if self in _left.closers:
            _left.closers.remove(self)


# The end.


def finish() -> None:
    """Return when nothing goes on in the background any more. It raises nothing: an error stays owed."""
    for thread in list(_left.threads):
        thread.join()


def settle() -> None:
    """Finish what the script has left, and raise the first error that is owed. For whoever runs the script, behind it."""
    finish()
    for closer in reversed(_left.closers.copy()):
        closer.run()
    if _left.owed:
        first = _left.owed[0]
        _left.everywhere, _left.owed = first.of_all, []
        raise first.error


def keep_exit_code() -> None:
    """The script has ended with a code of its own, which is not 0. For whoever runs the script."""
    _left.has_code = True


def failed_everywhere() -> bool:
    """Whether each rank's process ends with an error that was found behind a script which had none."""
    return _left.everywhere or (not _left.failed and any(one.of_all for one in _left.owed))


@atexit.register  # before whatever is registered later, so it is called behind that
def _say() -> None:
    alive = any(thread.is_alive() for thread in _left.threads)
    if alive:  # the interpreter was interrupted while it joined them
        log.error("The process ends before a save in the background has: it is not complete.")
    if (alive or _left.owed) and not _left.failed:
        sys.stderr = _LastFlush(sys.stderr)


class _LastFlush:
    """stderr, until the interpreter itself flushes it: that is, for nothing of Python that is being called."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if self._stream is None else int(self._stream.write(text))

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(ValueError):  # closed
                self._stream.flush()
        if not _is_called():
            raise OSError("what the script has left to its end has failed")


def _is_called() -> bool:
    """Whether the function that asks was called by one of Python."""
    try:
        sys._getframe(2)
    except ValueError:
        return False
    return True
