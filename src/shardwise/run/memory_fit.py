"""Finding a batch size that fits, by trying."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError
from .joined import join_run

logger = logging.getLogger("shardwise")


def release_memory(*objects: Any) -> list[None]:
    """Collect garbage and give cached GPU memory back. Gives a None for each argument, for the caller to assign."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [None] * len(objects)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[int], int] | None = None,
) -> Any:
    """Decorator: call `function(batch_size, ...)` with ever smaller sizes until one does not run out of memory.

    reduce_batch_size_fn: the next size after one that failed; by default 0.9 of it.
    All ranks try the smaller size if one ran out of memory. A rank that does so while the others wait for it in a
    collective leaves them there until their timeout. Raises RuntimeError when the size reaches 0.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    following = reduce_batch_size_fn or (lambda size: int(size * 0.9))
    names = list(inspect.signature(function).parameters)
    if not names:
        raise ConfigError("find_executable_batch_size: the function needs batch_size as its first parameter.")

    @functools.wraps(function)
    def search(*args: Any, **kwargs: Any) -> Any:
        size = starting_batch_size
        while size > 0:
            release_memory()
            failed, result = False, None
            try:
                result = function(size, *args, **kwargs)
            except (torch.OutOfMemoryError, MemoryError) as error:
                failed = True
                logger.warning("batch size %d does not fit: %s", size, error)
            if not any(join_run().gather_objects(failed)):
                return result
            size = following(size)
        raise RuntimeError(f"find_executable_batch_size: no batch size from {starting_batch_size} down to 1 fits.")

    return search
