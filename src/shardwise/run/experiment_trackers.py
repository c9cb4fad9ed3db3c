"""Adapters, as in `trackers.py`, to the libraries whose runs belong to an experiment or a task of a server: MLflow, ClearML."""

from __future__ import annotations

import importlib
import os
from typing import Any

from ..config.machine import environment_value
from ..errors import ConfigError
from ..files.documents import parse_json
from .general_tracker import on_main_process
from .trackers import Adapter, Table, plain


class MLflowTracker(Adapter):
    """MLflow's run of an experiment.

    experiment_name: the project; made if there is none of this name. logging_dir: where a new one keeps artifacts.
    run_id:          a run to go on with. run_name: of a new one. nested_run: it lies inside of the run that is active.
    tags:            a dictionary, or one as JSON. description: of the run.
    The variables MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID, MLFLOW_TAGS and MLFLOW_NESTED_RUN come first.
    Raises ConfigError for tags that are no dictionary.
    """

    name = "mlflow"

    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | str | None = None,
        nested_run: bool | None = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__(run_name or "")
        self.experiment_name = environment_value("MLFLOW_EXPERIMENT_NAME") or experiment_name
        self.logging_dir = logging_dir
        self.run_id = environment_value("MLFLOW_RUN_ID") or run_id
        self.tags = _tags(environment_value("MLFLOW_TAGS") or tags)
        nested = environment_value("MLFLOW_NESTED_RUN")
        self.nested_run = bool(nested_run) if nested is None else nested.strip().lower() in ("1", "true", "yes", "on")
        self.description = description

    @property
    def _library(self) -> Any:
        return importlib.import_module("mlflow")

    @on_main_process
    def start(self) -> None:
        library = self._library
        found = library.get_experiment_by_name(self.experiment_name) if self.experiment_name else None
        experiment = None if found is None else found.experiment_id
        if experiment is None and self.experiment_name:
            place = None if self.logging_dir is None else str(self.logging_dir)
            experiment = library.create_experiment(self.experiment_name, artifact_location=place, tags=self.tags)
        self.active_run = library.start_run(
            run_id=self.run_id,
            experiment_id=experiment,
            run_name=self.run_name or None,
            nested=self.nested_run,
            tags=self.tags,
            description=self.description,
        )

    @property
    def tracker(self) -> Any:
        return self.active_run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As parameters of the run, which are texts of a limited length: what is longer is left out, which is said."""
        limits = importlib.import_module("mlflow.utils.validation")
        longest, at_once = limits.MAX_PARAM_VAL_LENGTH, limits.MAX_PARAMS_TAGS_PER_BATCH
        kept = []
        for name, value in values.items():
            if len(str(value)) > longest:
                self._left_out(name, value, f"parameters of at most {longest} characters")
            else:
                kept.append((name, value))
        for begin in range(0, len(kept), at_once):
            self._library.log_params(dict(kept[begin : begin + at_once]))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers. kwargs: of mlflow.log_metrics."""
        self._library.log_metrics(self._numbers(values), step=step, **kwargs)

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """A figure, into the file of this name among the run's artifacts. save_kwargs: of mlflow.log_figure."""
        self._library.log_figure(figure=figure, artifact_file=artifact_file, **save_kwargs)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """All files of a directory, into the directory `artifact_path` of the run's artifacts."""
        self._library.log_artifacts(local_dir=local_dir, artifact_path=artifact_path)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """A file, into the directory `artifact_path` of the run's artifacts."""
        self._library.log_artifact(local_path=local_path, artifact_path=artifact_path)

    @on_main_process
    def finish(self) -> None:
        self._library.end_run()


def _tags(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if not isinstance(given, str):
        return given
    found = parse_json(given, "the tags for mlflow", ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(f"the tags for mlflow are {given!r}; they can be a dictionary, or one as JSON.")
    return found


class ClearMLTracker(Adapter):
    """ClearML's task: the one that is current, or a new one. kwargs: of clearml.Task.init.

    run_name: the project and the task, where CLEARML_PROJECT, CLEARML_TASK and kwargs say nothing.
    """

    name = "clearml"

    def __init__(self, run_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(run_name or "", **kwargs)
        self.user_provided_run_name = run_name
        self._is_ours = False

    @on_main_process
    def start(self) -> None:
        kind: Any = importlib.import_module("clearml").Task
        self.task = kind.current_task()
        if self.task is None:
            given = {
                "project_name": environment_value("CLEARML_PROJECT") or self.user_provided_run_name,
                "task_name": environment_value("CLEARML_TASK") or self.user_provided_run_name,
            }
            self.task = kind.init(**{**given, **self.init_kwargs})
            self._is_ours = True

    @property
    def tracker(self) -> Any:
        return self.task

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.task.connect_configuration(plain(values))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers: with a step as scalars, without as single values. A prefix eval_, test_ or train_ names the series.

        kwargs: of ClearML's report_scalar or report_single_value.
        """
        reports = self.task.get_logger()
        for name, number in self._numbers(values).items():
            if step is None:
                reports.report_single_value(name=name, value=number, **kwargs)
            else:
                title, series = _place(name)
                reports.report_scalar(title=title, series=series, value=number, iteration=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """values: images (arrays, or PIL's) by name. kwargs: of ClearML's report_image."""
        for name, image in values.items():
            title, series = _place(name)
            self.task.get_logger().report_image(title=title, series=series, iteration=step, image=image, **kwargs)

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
        """A table, of a data frame, or of `columns` and rows in `data`, whose first names the columns where nothing else does.

        kwargs: of ClearML's report_table. Raises ConfigError without data.
        """
        rows = dataframe
        if rows is None:
            if data is None:
                raise ConfigError("log_table of clearml needs `data`, or a `dataframe`.")
            rows = [columns, *data] if columns else data
        title, series = _place(table_name)
        self.task.get_logger().report_table(title=title, series=series, table_plot=rows, iteration=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Close the task, if it was begun here."""
        if self._is_ours:
            self.task.close()


def _place(name: str) -> tuple[str, str]:
    """(title, series) of a value: "eval_loss" is "loss" of the series "eval"; what has no such prefix is of "train"."""
    series, _, title = name.partition("_")
    return (title, series) if title and series in ("eval", "test", "train") else (name, "train")
