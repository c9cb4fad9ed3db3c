"""Trackers, where `Accelerator.log` sends numbers on the main process: `front/reporting.py` drives them.

A tracker is any object with `log(values, step=None, **kwargs)`; `store_init_configuration(config)` and `finish()` are
called if it has them, and `name` names it. `GeneralTracker` is a base class for one's own. "tensorboard" is the one
name that is known here; it needs the tensorboard package.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


class GeneralTracker:
    """A base for trackers of one's own: override `log`, and the others as needed."""

    name = "custom"
    requires_logging_directory = False
    main_process_only = True

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


class TensorBoardTracker(GeneralTracker):
    """Numbers and texts to TensorBoard files below `logging_dir`/`run_name`."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(logging_dir) / run_name), **kwargs)

    @property
    def tracker(self) -> Any:
        return self.writer

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        kept = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
        self.writer.add_hparams(kept, metric_dict={})
        self.writer.flush()

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, dict):
                self.writer.add_scalars(name, value, global_step=step, **kwargs)
            else:
                self.writer.add_scalar(name, value, global_step=step, **kwargs)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def check_trackers(log_with: Any, logging_dir: str | os.PathLike[str] | None) -> list[Any]:
    """What `log_with` names, as a list of names and tracker objects. Raises ConfigError for what cannot work."""
    if log_with is None:
        return []
    wanted = list(log_with) if isinstance(log_with, Sequence) and not isinstance(log_with, str) else [log_with]
    found: list[Any] = []
    for item in wanted:
        if not isinstance(item, str):
            if not callable(getattr(item, "log", None)):
                raise ConfigError(f"log_with: a {type(item).__name__} has no method `log`, so it is no tracker.")
            found.append(item)
            continue
        name = str(getattr(item, "value", item))  # an enum's member names itself by its value
        installed = importlib.util.find_spec("tensorboard") is not None
        if name == "all":
            found += ["tensorboard"] if installed and logging_dir is not None else []
        elif name != "tensorboard":
            raise ConfigError(
                f"log_with={name!r} is not built in. Give a tracker object: anything with "
                "log(values, step=None), such as a small subclass of shardwise.GeneralTracker."
            )
        elif not installed:
            raise ConfigError("log_with='tensorboard': the package is not installed. Run `pip install tensorboard`.")
        elif logging_dir is None:
            raise ConfigError("log_with='tensorboard' needs a directory: give Accelerator a project_dir.")
        else:
            found.append(name)
    return found


class InertTracker:
    """Stands in for a tracker on ranks that have none: every call does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
