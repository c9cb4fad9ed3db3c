"""What an Accelerator tells of a run: numbers to trackers (`run/tracking.py`), on the main process; profiles of each rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ConfigError
from ..ranks.agreeing import attempt
from ..ranks.by_first import by_first
from ..run.plugins import ProfileKwargs
from ..run.tracking import InertTracker, make_tracker
from .run import Run

logger = logging.getLogger("shardwise")


def init_trackers(
    run: Run, project_name: str, config: dict[str, Any] | None = None, init_kwargs: dict[str, Any] | None = None
) -> None:
    """Make the trackers of `log_with` and start them, on the main process. init_kwargs: keywords per tracker name.

    config: the run's settings, for all of them.
    An error there is an error of every rank that calls it; the main process may call it alone.
    """
    by_first(run.ranks, "init_trackers", lambda: _start_trackers(run, project_name, config, init_kwargs))


def _start_trackers(
    run: Run, project_name: str, config: dict[str, Any] | None, init_kwargs: dict[str, Any] | None
) -> None:
    place = run.project_configuration.logging_dir
    made = [make_tracker(item, project_name, place, init_kwargs or {}) for item in run.log_with]
    run.trackers += made
    for tracker in made:
        if callable(getattr(tracker, "start", None)):
            tracker.start()
    for tracker in made if config is not None else ():
        if callable(getattr(tracker, "store_init_configuration", None)):
            tracker.store_init_configuration(config)


def get_tracker(run: Run, name: str, unwrap: bool = False) -> Any:
    """The tracker of this name on the main process; an inert GeneralTracker elsewhere. Raises ConfigError."""
    for tracker in run.trackers:
        if getattr(tracker, "name", type(tracker).__name__) == name:
            return getattr(tracker, "tracker", tracker) if unwrap else tracker
    if not run.is_main_process:
        return InertTracker()
    known = [getattr(tracker, "name", type(tracker).__name__) for tracker in run.trackers]
    raise ConfigError(f"get_tracker: no tracker named {name!r}; started are {known}.")


def log(
    run: Run, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, dict[str, Any]] | None = None
) -> None:
    """Give `values` to every tracker, on the main process. log_kwargs: keywords per tracker name."""
    for tracker in run.trackers:
        name = getattr(tracker, "name", type(tracker).__name__)
        tracker.log(values, step=step, **(log_kwargs or {}).get(name, {}))


def finish(run: Run) -> Exception | None:
    """Write the last line of the record, which the trackers get too, and close them. Gives the first error that is no disk's.

    A disk that takes nothing more is a warning: the training is finished. Collective where the run is watched.
    """
    error = None
    if run.watch is not None:
        _, missing = attempt(run.watch.ends_pass)  # a loop that was left before its end has steps without a line
        error = attempt(run.watch.close)[1] or missing
    for tracker in run.trackers:
        _, broken = attempt(getattr(tracker, "finish", lambda: None))
        if isinstance(broken, OSError):
            logger.warning("The tracker %s could not be closed: %s.", getattr(tracker, "name", tracker), broken)
        else:
            error = error or broken
    return error


@contextmanager
def profile(run: Run, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
    """Profile the block on this rank; see ProfileKwargs."""
    handler = profile_handler or run.profile_handler or ProfileKwargs()
    with handler.build(run.ranks.rank) as profiler:
        yield profiler
    if handler.output_trace_dir is not None and handler.schedule_option is None:
        handler.writer(run.ranks.rank)(profiler)
