"""Memory that does not suffice: finding a batch size that fits, by trying, and giving memory back."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError, RankError
from .joined import join_run

logger = logging.getLogger("shardwise")

# What allocators and libraries say in a plain RuntimeError when memory does not suffice, in small letters.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's, HIP's, XPU's and NPU's own
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",  # the same on Windows
    "cudnn error: cudnn_status_not_supported",  # cuDNN finds no algorithm whose workspace fits
    "cublas_status_alloc_failed",
    "pt_devmem allocation failed",  # of HPUs
)


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Whether `exception` says that memory has run out, or was raised because of one that does: on a device or the host."""
    seen: set[int] = set()
    current: BaseException | None = exception
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(current, RuntimeError) and any(text in str(current).lower() for text in _OUT_OF_MEMORY):
            return True
        current = current.__cause__
    return False


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give memory back that torch keeps of the device for later. garbage_collection: collect garbage before."""
    if garbage_collection:
        gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Collect garbage and give cached GPU memory back. Gives a None for each argument, for the caller to assign."""
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[..., int] | None = None,
) -> Any:
    """Decorator: call `function(batch_size, ...)` with ever smaller sizes until one does not run out of memory.

    reduce_batch_size_fn: the next size after one that failed, as `f()` or, if it has a parameter, as `f(size)`; by default
                          0.9 of it. What counts as out of memory: `should_reduce_batch_size`.
    All ranks try the smaller size if one ran out of memory; another error of one rank is a RankError on the others. A rank
    that runs out of memory while the others wait for it in a collective leaves them there until their timeout. A later call
    begins with the size that fitted last. Raises TypeError for arguments that the function cannot take beside a batch size,
    RuntimeError when the size reaches 0.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    following = _following(reduce_batch_size_fn)
    if not inspect.signature(function).parameters:
        raise ConfigError("find_executable_batch_size: the function needs batch_size as its first parameter.")
    size = starting_batch_size

    @functools.wraps(function)
    def search(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        _check_arguments(function, args)
        while size > 0:
            clear_device_cache(garbage_collection=True)
            result, failure, error = _attempt(function, size, args, kwargs)
            told = join_run().gather_objects((failure, None if error is None else f"{type(error).__name__}: {error}"))
            if error is not None:
                raise error
            for rank, (_, text) in enumerate(told):
                if text is not None:
                    raise RankError(f"rank {rank} failed: {text}")
            if not any(why for why, _ in told):
                return result
            if failure is not None:
                logger.warning("batch size %d does not fit: %s", size, failure)
            del result
            size = following(size)
        raise RuntimeError(
            "No executable batch size found, reached zero. find_executable_batch_size began with "
            f"{starting_batch_size}; what runs out of memory is not what the batch size changes."
        )

    return search


def _attempt(
    function: Callable[..., Any], size: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, str | None, Exception | None]:
    """(its result, why memory did not suffice, another error).

    An error for want of memory does not leave here: its traceback holds the frames, and so the tensors, that are to go.
    """
    try:
        return function(size, *args, **kwargs), None, None
    except Exception as error:
        if should_reduce_batch_size(error):
            return None, f"{type(error).__name__}: {error}", None
        return None, None, error


def _following(reduce: Callable[..., int] | None) -> Callable[[int], int]:
    if reduce is None:
        return lambda size: int(size * 0.9)
    try:
        inspect.signature(reduce).bind()
    except TypeError:
        return reduce
    except ValueError:  # of a function in C without a signature
        return reduce
    return lambda _: reduce()


def _check_arguments(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        return
    if len(parameters) < len(args) + 1:
        name = getattr(function, "__name__", type(function).__name__)
        shown = ", ".join(f"{p}={value!r}" for p, value in zip(list(parameters)[1:], args[1:], strict=False))
        raise TypeError(
            f"Batch size was passed into `{name}` as the first argument when called. The decorator passes it already; call "
            f"`{name}({shown})`."
        )
