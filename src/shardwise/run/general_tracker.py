"""What a tracker is: a base class for those of other libraries (`trackers.py`) and for a script's own.

Any object with `log(values, step=None, **kwargs)` is a tracker; what it has of the rest is used. `start` comes first, in
`Accelerator.init_trackers` on the main process, so that making a tracker joins no run and opens no file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from .joined import join_run

F = TypeVar("F", bound=Callable[..., Any])


def on_main_process(function: F) -> F:
    """Decorator for a tracker's methods: on the other processes they do nothing, if the tracker is `main_process_only`."""

    @functools.wraps(function)
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", False) and join_run().rank > 0:
            return None
        return function(self, *args, **kwargs)

    return cast(F, method)


class GeneralTracker:
    """A base for trackers of one's own: override `log`, and the others as needed.

    name:                       by which `get_tracker`, `init_kwargs` and `log_kwargs` find it.
    requires_logging_directory: whether the constructor takes a directory behind the project's name, where it is made by name.
    main_process_only:          what `on_main_process` asks. An Accelerator speaks to trackers on the main process alone.
    """

    name = "custom"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, _blank: bool = False) -> None:
        """_blank: accelerate checks the attributes above unless it is set; here they have values."""

    @property
    def tracker(self) -> Any:
        """The library's own object, as `get_tracker(name, unwrap=True)` gives it."""
        return self

    def start(self) -> None:
        """Called on the main process by `init_trackers`."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the run's settings."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep `values`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Flush and close."""


class InertTracker:
    """Stands in for a tracker on ranks that have none: every call does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
