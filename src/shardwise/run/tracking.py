"""Trackers, where `Accelerator.log` sends numbers on the main process: `front/reporting.py` drives them.

A tracker is any object with `log(values, step=None, **kwargs)`; `start()`, `store_init_configuration(config)` and `finish()`
are called if it has them, and `name` names it. `GeneralTracker` is a base class for one's own. Those of LOGGER_TYPE_TO_CLASS
are known by name; `register_tracker_class` adds to them. A name whose package is not installed is a warning, and its tracker
left out, so that a script runs on a machine without it as it does with accelerate; a name that nobody knows is an error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..config.environment import RankEnvironment
from ..config.kinds import LoggerType
from ..errors import ConfigError
from .experiment_trackers import ClearMLTracker, MLflowTracker
from .general_tracker import GeneralTracker, InertTracker, on_main_process
from .trackers import (
    AimTracker,
    CometMLTracker,
    DVCLiveTracker,
    SwanLabTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "AimTracker",
    "ClearMLTracker",
    "CometMLTracker",
    "DVCLiveTracker",
    "GeneralTracker",
    "InertTracker",
    "LoggerType",
    "MLflowTracker",
    "SwanLabTracker",
    "TensorBoardTracker",
    "TrackioTracker",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
]

logger = logging.getLogger("shardwise")

Directory = str | os.PathLike[str] | None


LOGGER_TYPE_TO_CLASS: dict[str, type[Any]] = {
    str(kind.name): kind
    for kind in (
        *(AimTracker, CometMLTracker, MLflowTracker, TensorBoardTracker, WandBTracker),
        *(ClearMLTracker, DVCLiveTracker, SwanLabTracker, TrackioTracker),
    )
}
# The modules of which one must be there; `pip install` of the first, written with a hyphen. Of other names: nothing.
_MODULES = {name: (name,) for name in LOGGER_TYPE_TO_CLASS} | {"tensorboard": ("tensorboard", "tensorboardX")}


def _is_installed(name: str) -> bool:
    return name not in _MODULES or any(map(_is_there, _MODULES[name]))


def _is_there(module: str) -> bool:
    """Whether a module can be imported. A directory of its name that holds no code, as wandb writes, is none."""
    if module in sys.modules:
        return sys.modules[module] is not None
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def get_available_trackers() -> list[LoggerType]:
    """The trackers whose packages are installed."""
    return [kind for kind in LoggerType if kind is not LoggerType.ALL and _is_installed(kind)]


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Let `log_with` know a class by its `name`. Before the Accelerator is made.

    It is made by `init_trackers` with the project's name, the logging directory if it `requires_logging_directory`, and
    what `init_kwargs` has for its name. Raises ConfigError for a class that does not say both by itself.
    """
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, GeneralTracker)):
        raise ConfigError(f"register_tracker_class takes a subclass of GeneralTracker, not {tracker_class!r}.")
    said = {name for kind in tracker_class.__mro__ if kind not in GeneralTracker.__mro__ for name in vars(kind)}
    missing = [name for name in ("name", "requires_logging_directory") if name not in said]
    if missing or not tracker_class.name:
        raise ConfigError(
            f"register_tracker_class: {tracker_class.__name__} needs a class attribute {' and '.join(missing or ['name'])}: "
            "a name that is not empty, and whether its constructor takes a logging directory."
        )
    if tracker_class.name in LOGGER_TYPE_TO_CLASS:
        earlier = LOGGER_TYPE_TO_CLASS[tracker_class.name]
        warnings.warn(
            f"register_tracker_class: {tracker_class.name!r} was the name of {earlier.__name__}, and is "
            f"{tracker_class.__name__}'s from now on.",
            stacklevel=2,
        )
    LOGGER_TYPE_TO_CLASS[tracker_class.name] = tracker_class


def filter_trackers(log_with: Any, logging_dir: Directory = None) -> list[Any]:
    """What `log_with` means: names, tracker classes and trackers, each once, without those that cannot be had here.

    log_with: one of them, or a list. logging_dir: where trackers keep files that `requires_logging_directory`.
    What is left out is said on the main process. Raises ConfigError for what no machine could do.
    """
    found: list[Any] = []
    for item in _listed(log_with):
        name = getattr(item, "value", item)  # an enum's member names itself by its value
        if name == "all":
            wanted: Iterator[Any] = _all(logging_dir)
        elif isinstance(name, str):
            wanted = _named(name, logging_dir)
        else:
            _check_tracker(item, logging_dir)
            wanted = iter([item])
        found += [each for each in wanted if not any(each is known or each == known for known in found)]
    return found


def _listed(log_with: Any) -> list[Any]:
    if log_with is None:
        return []
    return list(log_with) if isinstance(log_with, Sequence) and not isinstance(log_with, str) else [log_with]


def _all(logging_dir: Directory) -> Iterator[str]:
    for kind in get_available_trackers():
        if LOGGER_TYPE_TO_CLASS[kind].requires_logging_directory and logging_dir is None:
            _say(f"log_with='all' leaves {kind} out, which needs a directory: give Accelerator a project_dir.")
        else:
            yield str(kind)


def _named(name: str, logging_dir: Directory) -> Iterator[str]:
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"log_with={name!r} is none of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, all. Register a class of your own with "
            "register_tracker_class, or give a tracker object: anything with log(values, step=None), such as a small "
            "subclass of shardwise.GeneralTracker."
        )
    if not _is_installed(name):
        package = name.replace("_", "-")
        _say(f"log_with={name!r} has no effect: the package is not installed. Run `pip install {package}`.")
        return
    _check_directory(LOGGER_TYPE_TO_CLASS[name], logging_dir)
    yield name


def _check_tracker(item: Any, logging_dir: Directory) -> None:
    if not callable(getattr(item, "log", None)):
        kind = item.__name__ if isinstance(item, type) else type(item).__name__
        raise ConfigError(f"log_with: a {kind} has no method `log`, so it is no tracker.")
    if isinstance(item, type):
        _check_directory(item, logging_dir)


def _check_directory(kind: type[Any], logging_dir: Directory) -> None:
    if getattr(kind, "requires_logging_directory", False) and logging_dir is None:
        name = getattr(kind, "name", kind.__name__)
        raise ConfigError(
            f"Logging with `{name}` requires a `logging_dir`: give Accelerator a project_dir, or a ProjectConfiguration "
            "with one."
        )


def _say(text: str) -> None:
    if RankEnvironment.read().rank == 0:
        logger.warning(text)


def make_tracker(item: Any, project_name: str, logging_dir: Directory, init_kwargs: dict[str, Any]) -> Any:
    """The tracker that `filter_trackers` has let pass: a name or a class is made for a project, an object is itself.

    init_kwargs: keywords of the constructors, by the trackers' names.
    """
    kind = LOGGER_TYPE_TO_CLASS[item] if isinstance(item, str) else item
    if not isinstance(kind, type):
        return kind
    place = [logging_dir] if getattr(kind, "requires_logging_directory", False) else []
    return kind(project_name, *place, **init_kwargs.get(getattr(kind, "name", kind.__name__), {}))
