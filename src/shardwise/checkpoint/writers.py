"""The threads of one save.

A script may end right behind a save: the interpreter waits for the thread that saves, and then `concurrent.futures` takes no
more tasks, from anybody. Threads can still be started. It knows nothing of files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Writers:
    """As a context manager it is left when all threads have ended, and raises the first error of one, if the block has none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, count: int, work: Callable[[], None]) -> None:
        """Have `count` more threads do `work`, each for itself."""
        for _ in range(count):
            thread = threading.Thread(target=self._run, args=(work,), name=f"{self._name}_{len(self._threads)}")
            thread.start()
            self._threads.append(thread)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.join()
        if error is None and self._errors:
            raise self._errors[0]
