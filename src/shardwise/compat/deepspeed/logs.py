"""deepspeed.utils.logger: shardwise's own, so that one level and one handler count for both."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from .comm import get_rank

logger = logging.getLogger("shardwise")


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on these ranks; None or -1 among them means every rank."""
    chosen = None if ranks is None else set(ranks)
    if chosen is None or -1 in chosen or get_rank() in chosen:
        logger.log(level, "[Rank %d] %s", get_rank(), message)


def print_rank_0(message: Any, debug: bool = False, force: bool = False) -> None:
    if get_rank() == 0 and (debug or force):
        print(message)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log the device memory that this process holds, on rank 0; without `force` nothing, as there."""
    import torch

    if force and get_rank() == 0 and torch.cuda.is_available():
        logger.info(
            "%s: %.2f GB allocated, %.2f GB at most",
            message,
            torch.cuda.memory_allocated() / 2**30,
            torch.cuda.max_memory_allocated() / 2**30,
        )
