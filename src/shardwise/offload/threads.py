"""Threads that transfers run on, each with the store's device current."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from ..errors import StoreError

P = ParamSpec("P")
R = TypeVar("R")


class DeviceThreads:
    """`count` threads named `name`, begun when they are first needed, for work on `device`.

    A task calls `take_device` first. A pool's own initializer would do the same, but where it fails every task says
    BrokenThreadPool and none says why.
    """

    def __init__(self, count: int, name: str, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._device = device
        self._taken = threading.local()

    def submit(self, task: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run task(*args, **kwargs) on one of the threads."""
        return self._pool.submit(task, *args, **kwargs)

    def take_device(self) -> None:
        """Make the device current on the calling thread. Raises StoreError if that cannot be.

        A thread that never did works on device 0, where a rank of another device would make a context of some hundred MB.
        """
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
