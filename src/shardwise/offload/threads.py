"""Threads that transfers run on, each with the store's device current."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from ..errors import StoreError
from ..ranks.lanes import whole_device

R = TypeVar("R")


def _nothing() -> None:
    pass


class DeviceThreads:
    """`count` threads named `name`, begun when they are first needed, for work on `device`.

    Each makes the device current before its first task: a thread that never did works on device 0, where a rank of another
    device would make a context of some hundred MB. A pool's own initializer would do the same, but where it fails every task
    says BrokenThreadPool and none says why; here each task has the one error, and the next one tries again.

    device: without an index it is the device that is current on the thread that makes this, not on those that work.
    """

    def __init__(self, count: int, name: str, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._device = whole_device(device)
        self._taken = threading.local()

    def submit(self, task: Callable[[], R], lastly: Callable[[], None] = _nothing) -> Future[R]:
        """Run `task` on one of the threads, and then `lastly`, whatever became of the task.

        lastly: gives back what was taken for the task. It runs before the Future is done, and also where the task could not
        begin because its thread could not use the device; the Future then has a StoreError. After `close` it does not run.
        """
        return self._pool.submit(self._run, task, lastly)

    def _run(self, task: Callable[[], R], lastly: Callable[[], None]) -> R:
        try:
            self._take_device()
            return task()
        finally:
            lastly()

    def _take_device(self) -> None:
        """Make the device current on the calling thread. Raises StoreError if that cannot be."""
        if self._device.type != "cuda" or getattr(self._taken, "done", False):
            return
        try:
            torch.cuda.set_device(self._device)
        except (RuntimeError, ValueError) as error:
            thread = threading.current_thread().name
            raise StoreError(f"the thread {thread} could not use {self._device}: {error}") from error
        self._taken.done = True

    def close(self) -> None:
        """Drop what has not begun, and return when the threads have ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)
