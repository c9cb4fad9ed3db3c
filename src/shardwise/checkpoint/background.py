"""A save that goes on beside the training: one at a time, waited for by the next one and by the exit, never silent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..errors import CheckpointError
from ..ranks import unfinished

log = logging.getLogger("shardwise")


class Background:
    """At most one thread that writes. Not a daemon: the interpreter waits for it before it ends."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, action: Callable[[], None]) -> None:
        """Run `action` in a thread. Whoever calls this has waited for the earlier one."""
        assert not self.busy

        def run() -> None:
            try:
                action()
            except BaseException as error:
                # Said now, for a script may end without asking; raised where the next `wait` is, or who runs the script asks.
                log.error("A save in the background failed: %s", error)
                self._error = CheckpointError(f"the last save in the background failed: {error}")
                self._error.__cause__ = error
                unfinished.owe(self._error, everywhere=True)

        self._thread = threading.Thread(target=run, name="shardwise-save")
        unfinished.follow(self._thread)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way. Raises CheckpointError, once, if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            unfinished.told(error)
            raise error
