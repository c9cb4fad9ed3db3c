"""Loggers that know the ranks: a line is said once, or by every rank in turn.

logger = get_logger(__name__)
logger.info("said by rank 0")
logger.info("said by every rank", main_process_only=False)
logger.info("said by every rank, in rank order", in_order=True)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import MutableMapping
from typing import Any

from ..config.accelerate_variables import log_level as log_level_of_environment
from .process import PartialState


class MultiProcessAdapter(logging.LoggerAdapter[logging.Logger]):
    """A logger whose calls take `main_process_only` (True) and `in_order` (False).

    in_order: every rank speaks, one after the other, whatever main_process_only says; all ranks must call.
    stacklevel counts as for any adapter of logging: what a wrapper gives, to name its caller, is right here too.
    """

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        main_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        if not self.isEnabledFor(level):
            return
        state = PartialState()
        msg, kwargs = self.process(msg, kwargs)  # type: ignore[assignment]
        kwargs.setdefault("stacklevel", 2)  # past this method: frames of logging itself do not count
        if in_order:
            for index in range(state.num_processes):
                if index == state.process_index:
                    self.logger.log(level, msg, *args, **kwargs)
                state.wait_for_everyone()
        elif not main_only or state.is_main_process:
            self.logger.log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs

    @functools.lru_cache(None)  # noqa: B019 - adapters live as long as their module
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """A warning that is said at the first call with these arguments only."""
        self.warning(*args, **kwargs)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """The logger `name`, speaking for the run. log_level: "DEBUG", ...; None takes ACCELERATE_LOG_LEVEL or leaves it."""
    logger = logging.getLogger(name)
    log_level = log_level or log_level_of_environment()
    if log_level is not None:
        logger.setLevel(log_level.upper())
        logger.root.setLevel(log_level.upper())
    return MultiProcessAdapter(logger, {})
