"""Adapters to the libraries that keep numbers of a run. Each is thin: it starts the library's run, and calls its own functions.

    name         constructor beside the run's name          the library's object, `.tracker`
    tensorboard  logging_dir, of SummaryWriter              SummaryWriter
    wandb        of wandb.init                              wandb's run
    trackio      of trackio.init                            trackio's run
    swanlab      of swanlab.init                            swanlab's run
    comet_ml     of comet_ml.start                          comet's experiment
    aim          logging_dir (the repository), of aim.Run   aim.Run
    mlflow       see MLflowTracker                          mlflow's active run
    clearml      of clearml.Task.init                       clearml.Task
    dvclive      live, of dvclive.Live                      dvclive.Live

The arguments are accelerate's, so that `init_kwargs={"wandb": {...}}` of a script reach the same function. Libraries are
imported when a tracker starts. What one cannot take of `log` is left out, which is said once for each name.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .general_tracker import GeneralTracker, on_main_process

logger = logging.getLogger("shardwise")

Table = list[list[Any]]


def plain(value: Any) -> Any:
    """`value` in numbers, texts, lists and dictionaries, which every library stores; other things as their text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    found = as_number(value)
    return found if isinstance(found, (bool, int, float)) else str(value)


def as_number(value: Any) -> Any:
    """The number in a tensor or array of one element; anything else as it is."""
    if callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None:
        count = value.numel() if callable(getattr(value, "numel", None)) else value.size
        return value.item() if count == 1 else value
    return value


class Adapter(GeneralTracker):
    """What the adapters share. run_name: the project. kwargs: for the function that begins the library's run."""

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs
        self._said: set[str] = set()

    def _left_out(self, name: str, value: Any, takes: str) -> None:
        if name not in self._said:
            self._said.add(name)
            logger.warning(
                "%s takes %s only: %r is a %s, and is left out.", self.name, takes, name, type(value).__name__
            )

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, int | float]:
        """Those of `values` that are numbers."""
        found = {}
        for name, value in values.items():
            number = as_number(value)
            if isinstance(number, (int, float)):
                found[name] = number
            else:
                self._left_out(name, value, "numbers")
        return found


class TensorBoardTracker(Adapter):
    """Numbers and texts to TensorBoard files below `logging_dir`/`run_name`. kwargs: of SummaryWriter."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self.logging_dir = os.path.join(logging_dir, run_name)

    @on_main_process
    def start(self) -> None:
        try:
            library: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError:  # tensorboardX is the same writer without tensorboard
            library = importlib.import_module("tensorboardX")
        self.writer = library.SummaryWriter(self.logging_dir, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As hyperparameters of TensorBoard, where what is no number or text is its text, and in a file hparams.yml."""
        given = {name: plain(value) for name, value in values.items()}
        kept = {name: v if isinstance(v, (int, float, str, bool)) else str(v) for name, v in given.items()}
        self.writer.add_hparams(kept, metric_dict={})
        self.writer.flush()
        folder = Path(self.logging_dir) / str(time.time())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hparams.yml").write_text(yaml.safe_dump(given), encoding="utf-8")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """kwargs: of SummaryWriter's add_scalar (numbers), add_text (texts) or add_scalars (dictionaries of numbers)."""
        for name, value in values.items():
            number = as_number(value)
            if isinstance(number, (int, float)):
                self.writer.add_scalar(name, number, global_step=step, **kwargs)
            elif isinstance(value, str):
                self.writer.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, dict):
                numbers = {key: as_number(item) for key, item in value.items()}
                self.writer.add_scalars(name, numbers, global_step=step, **kwargs)
            else:
                self._left_out(name, value, "numbers, texts and dictionaries of numbers")
        self.writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """values: arrays of images, as SummaryWriter.add_images takes them, by name."""
        for name, images in values.items():
            self.writer.add_images(name, images, global_step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.writer.close()


class _RunTracker(Adapter):
    """Of libraries that are made like wandb: `init(project=...)` gives a run with `log` and `finish`, `config` is updated."""

    main_process_only = False

    @property
    def _library(self) -> Any:
        return importlib.import_module(self.name)

    @on_main_process
    def start(self) -> None:
        self.run = self._library.init(project=self.run_name, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._library.config.update(plain(values), allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """kwargs: of the run's `log`."""
        self.run.log({name: as_number(value) for name, value in values.items()}, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.run.finish()


class _ImageTracker(_RunTracker):
    """Those of them that have a class `Image`."""

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """values: lists of images (arrays, or PIL's) by name."""
        library = self._library
        for name, images in values.items():
            self.log({name: [library.Image(image) for image in images]}, step=step, **kwargs)


class WandBTracker(_ImageTracker):
    """Weights & Biases. kwargs: of wandb.init."""

    name = "wandb"

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: Table | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A table, of `columns` and rows in `data`, or of a data frame."""
        table = self._library.Table(columns=columns, data=data, dataframe=dataframe)
        self.log({table_name: table}, step=step, **kwargs)


class TrackioTracker(_RunTracker):
    """Trackio. kwargs: of trackio.init."""

    name = "trackio"

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.run.config.update(plain(values))


class SwanLabTracker(_ImageTracker):
    """SwanLab. kwargs: of swanlab.init."""

    name = "swanlab"


class CometMLTracker(Adapter):
    """Comet. kwargs: of comet_ml.start, or of comet_ml.Experiment before 3.41."""

    name = "comet_ml"

    @on_main_process
    def start(self) -> None:
        library: Any = importlib.import_module("comet_ml")
        begin = getattr(library, "start", None) or library.Experiment
        self.writer = begin(project_name=self.run_name, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.writer.log_parameters(plain(values))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """kwargs: of the experiment's log_metric (numbers), log_other (texts) or log_metrics (dictionaries of numbers)."""
        if step is not None:
            self.writer.set_step(step)
        for name, value in values.items():
            number = as_number(value)
            if isinstance(number, (int, float)):
                self.writer.log_metric(name, number, step=step, **kwargs)
            elif isinstance(value, str):
                self.writer.log_other(name, value, **kwargs)
            elif isinstance(value, dict):
                self.writer.log_metrics(value, step=step, **kwargs)
            else:
                self._left_out(name, value, "numbers, texts and dictionaries of numbers")

    @on_main_process
    def finish(self) -> None:
        self.writer.end()


class AimTracker(Adapter):
    """Aim. logging_dir: its repository. kwargs: of aim.Run."""

    name = "aim"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str] | None = ".", **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self.aim_repo_path = logging_dir

    @on_main_process
    def start(self) -> None:
        library: Any = importlib.import_module("aim")
        self.writer = library.Run(**{"repo": self.aim_repo_path, **self.init_kwargs})
        self.writer.name = self.run_name

    @property
    def tracker(self) -> Any:
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.writer["hparams"] = plain(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """kwargs: of the run's `track`."""
        for name, value in values.items():
            self.writer.track(as_number(value), name=name, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """values: an image (an array, or PIL's), or (image, caption), by name. kwargs: of aim.Image under "aim_image", and of
        the run's `track` under "track"."""
        library: Any = importlib.import_module("aim")
        given = kwargs or {}
        for name, value in values.items():
            image, caption = value if isinstance(value, tuple) else (value, "")
            made = library.Image(image, caption=caption, **given.get("aim_image", {}))
            self.writer.track(made, name=name, step=step, **given.get("track", {}))

    @on_main_process
    def finish(self) -> None:
        self.writer.close()


class DVCLiveTracker(Adapter):
    """DVCLive. live: a Live that the script has made. kwargs: of dvclive.Live. run_name: without effect, Live has none."""

    name = "dvclive"

    def __init__(self, run_name: str | None = None, live: Any = None, **kwargs: Any) -> None:
        super().__init__(run_name or "", **kwargs)
        self.live = live

    @on_main_process
    def start(self) -> None:
        if self.live is None:
            self.live = importlib.import_module("dvclive").Live(**self.init_kwargs)

    @property
    def tracker(self) -> Any:
        return self.live

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.live.log_params(plain(values))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Each call is a step of its own, the next one where `step` does not say which. kwargs: of Live.log_metric."""
        could_log = importlib.import_module("dvclive.plots").Metric.could_log
        if step is not None:
            self.live.step = step
        for name, value in values.items():
            number = as_number(value)
            if could_log(number):
                self.live.log_metric(name, number, **kwargs)
            else:
                self._left_out(name, value, "numbers and texts")
        self.live.next_step()

    @on_main_process
    def finish(self) -> None:
        self.live.end()
