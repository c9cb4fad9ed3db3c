"""Trackers by name: what each library's own functions are called with. The libraries are stand-ins that note their calls."""

import logging
import sys
from enum import StrEnum
from types import ModuleType

import pytest
import torch
import yaml

from shardwise import Accelerator, GeneralTracker
from shardwise.errors import ConfigError
from shardwise.run import tracking
from shardwise.run.joined import forget_run
from shardwise.run.tracking import LOGGER_TYPE_TO_CLASS, LoggerType, filter_trackers, register_tracker_class

NAMES = sorted(LOGGER_TYPE_TO_CLASS)


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()


class Notes:
    """Stands for anything of a library: every call and item that is set is noted, under its dotted name."""

    def __init__(self, calls, name=""):
        self.__dict__.update(_calls=calls, _name=name)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Notes(self._calls, f"{self._name}.{name}" if self._name else name)

    def __setattr__(self, name, value):
        self._calls.append((f"{self._name}.{name} =", value))

    def __setitem__(self, key, value):
        self._calls.append((f"{self._name}[{key}] =", value))

    def __call__(self, *args, **kwargs):
        self._calls.append((self._name, *args, kwargs) if kwargs else (self._name, *args))
        return Notes(self._calls, f"{self._name}()")


@pytest.fixture
def library(monkeypatch):
    """Gives `install(name, **attributes)`, which puts a stand-in for a package in place, and gives its list of calls."""

    def install(name, **attributes):
        calls = []
        for part in (name, *(f"{name}.{inner}" for inner in attributes if isinstance(attributes[inner], ModuleType))):
            module = ModuleType(part)
            module.__getattr__ = Notes(calls).__getattr__
            monkeypatch.setitem(sys.modules, part, module)
        for key, value in attributes.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)
            if isinstance(value, ModuleType):
                monkeypatch.setitem(sys.modules, f"{name}.{key}", value)
        return calls

    return install


def module_with(**attributes):
    found = ModuleType("part")
    found.__dict__.update(attributes)
    return found


CONFIG = {"lr": 0.1, "dtype": torch.float32, "deep": {"sizes": (1, 2)}}
PLAIN = {"lr": 0.1, "dtype": "torch.float32", "deep": {"sizes": [1, 2]}}
VALUES = {"loss": torch.tensor(0.5), "text": "words"}

# name, attributes of the package, keywords for its start, what it is called with
TABLE = [
    (
        "wandb",
        {},
        {"tags": ["a"]},
        [
            ("init", {"project": "run", "tags": ["a"]}),
            ("config.update", PLAIN, {"allow_val_change": True}),
            ("init().log", {"loss": 0.5, "text": "words"}, {"step": 3, "commit": True}),
            ("init().finish",),
        ],
    ),
    (
        "trackio",
        {},
        {"space_id": "s"},
        [
            ("init", {"project": "run", "space_id": "s"}),
            ("init().config.update", PLAIN),
            ("init().log", {"loss": 0.5, "text": "words"}, {"step": 3, "commit": True}),
            ("init().finish",),
        ],
    ),
    (
        "swanlab",
        {},
        {"tags": ["a"]},
        [
            ("init", {"project": "run", "tags": ["a"]}),
            ("config.update", PLAIN, {"allow_val_change": True}),
            ("init().log", {"loss": 0.5, "text": "words"}, {"step": 3, "commit": True}),
            ("init().finish",),
        ],
    ),
    (
        "comet_ml",
        {},
        {"online": False},
        [
            ("start", {"project_name": "run", "online": False}),
            ("start().log_parameters", PLAIN),
            ("start().set_step", 3),
            ("start().log_metric", "loss", 0.5, {"step": 3, "commit": True}),
            ("start().log_other", "text", "words", {"commit": True}),
            ("start().end",),
        ],
    ),
    (
        "aim",
        {},
        {"log_system_params": False},
        [
            ("Run", {"repo": "folder", "log_system_params": False}),
            ("Run().name =", "run"),
            ("Run()[hparams] =", PLAIN),
            ("Run().track", 0.5, {"name": "loss", "step": 3, "commit": True}),
            ("Run().track", "words", {"name": "text", "step": 3, "commit": True}),
            ("Run().close",),
        ],
    ),
    (
        "mlflow",
        {"utils.validation": (6000, 100), "get_experiment_by_name": lambda name: None},
        {"run_name": "first", "tags": '{"a": "b"}'},
        [
            ("create_experiment", "run", {"artifact_location": None, "tags": {"a": "b"}}),
            (
                "start_run",
                {
                    "run_id": None,
                    "run_name": "first",
                    "nested": False,
                    "tags": {"a": "b"},
                    "description": None,
                },
            ),
            ("log_params", CONFIG),
            ("log_metrics", {"loss": 0.5}, {"step": 3, "commit": True}),
            ("end_run",),
        ],
    ),
    (
        "clearml",
        {},
        {"tags": ["a"]},
        [
            ("Task.init", {"project_name": "run", "task_name": "run", "tags": ["a"]}),
            ("Task.init().connect_configuration", PLAIN),
            ("Task.init().get_logger",),
            (
                "Task.init().get_logger().report_scalar",
                {"title": "loss", "series": "train", "value": 0.5, "iteration": 3, "commit": True},
            ),
            ("Task.init().close",),
        ],
    ),
    (
        "dvclive",
        {"plots": module_with(Metric=module_with(could_log=lambda value: isinstance(value, (int, float, str))))},
        {"dir": "place"},
        [
            ("Live", {"dir": "place"}),
            ("Live().log_params", PLAIN),
            ("Live().step =", 3),
            ("Live().log_metric", "loss", 0.5, {"commit": True}),
            ("Live().log_metric", "text", "words", {"commit": True}),
            ("Live().next_step",),
            ("Live().end",),
        ],
    ),
]


@pytest.mark.parametrize(("name", "attributes", "keywords", "wanted"), TABLE, ids=[row[0] for row in TABLE])
def test_a_tracker_calls_its_librarys_own_functions(library, monkeypatch, name, attributes, keywords, wanted):
    if name == "mlflow":
        longest, at_once = attributes["utils.validation"]
        limits = module_with(MAX_PARAM_VAL_LENGTH=longest, MAX_PARAMS_TAGS_PER_BATCH=at_once)
        attributes = {"get_experiment_by_name": attributes["get_experiment_by_name"]}
        monkeypatch.setitem(sys.modules, "mlflow.utils.validation", limits)
    if name == "clearml":
        calls = library(name)
        task = Notes(calls, "Task")
        monkeypatch.setattr(
            sys.modules[name], "Task", module_with(current_task=lambda: None, init=task.init), raising=False
        )
    else:
        calls = library(name, **attributes)
    accelerator = Accelerator(cpu=True, log_with=name, project_dir="folder")
    assert calls == []  # nothing starts before init_trackers
    accelerator.init_trackers("run", CONFIG, {name: keywords})
    tracker = accelerator.get_tracker(name)
    assert type(tracker) is LOGGER_TYPE_TO_CLASS[name]
    assert accelerator.get_tracker(name, unwrap=True) is tracker.tracker
    accelerator.log(VALUES, step=3, log_kwargs={name: {"commit": True}})
    accelerator.end_training()
    assert [_without_experiment(call) for call in calls] == wanted


def _without_experiment(call):
    if call[0] == "start_run":
        call[1].pop("experiment_id")
    return call


def test_table_has_every_tracker_but_tensorboard():
    assert sorted([*(row[0] for row in TABLE), "tensorboard"]) == NAMES


def test_tensorboard_gets_numbers_texts_and_settings(tmp_path, caplog, monkeypatch):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run", {**CONFIG, "none": None}, {"tensorboard": {"flush_secs": 60}})
    accelerator.log({**VALUES, "odd": [1], "parts": {"a": torch.tensor(1.0)}}, step=3)
    accelerator.log({"odd": [1]}, step=4)
    shown = []  # the writer needs pillow for it
    writer = accelerator.get_tracker("tensorboard", unwrap=True)
    monkeypatch.setattr(writer, "add_images", lambda name, images, **kwargs: shown.append((name, kwargs)))
    accelerator.get_tracker("tensorboard").log_images({"image": torch.zeros(1, 3, 2, 2)}, step=3)
    accelerator.end_training()
    assert shown == [("image", {"global_step": 3})]
    assert list((tmp_path / "run").glob("events*"))
    settings = [yaml.safe_load(path.read_text()) for path in tmp_path.rglob("hparams.yml")]
    assert settings == [{**PLAIN, "none": None}]
    assert [record.getMessage() for record in caplog.records if "odd" in record.getMessage()] == [
        "tensorboard takes numbers, texts and dictionaries of numbers only: 'odd' is a list, and is left out."
    ]


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(tracking, "_is_there", lambda module: False)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_not_installed_is_a_warning(nothing_installed, caplog, name):
    other = Keeping()
    accelerator = Accelerator(cpu=True, log_with=[name, other])
    assert len(caplog.records) == 1
    assert f"`pip install {name.replace('_', '-')}`" in caplog.text
    accelerator.init_trackers("run", {"a": 1})
    accelerator.log({"loss": 1})
    accelerator.end_training()
    assert other.lines == [{"a": 1}, {"loss": 1}]


def test_a_package_that_is_not_installed_is_said_on_the_main_process_only(nothing_installed, caplog, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert filter_trackers("wandb") == []
    assert not caplog.records


def test_a_directory_of_a_librarys_name_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "swanlab_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not tracking._is_there("swanlab_of_a_run")


class Keeping(GeneralTracker):
    name = "keeping"
    requires_logging_directory = False

    def __init__(self, run_name="", **kwargs):
        super().__init__()
        self.run_name, self.kwargs, self.lines = run_name, kwargs, []

    def store_init_configuration(self, values):
        self.lines.append(values)

    def log(self, values, step=None, **kwargs):
        self.lines.append(values)


class InFolder(Keeping):
    name = "in_folder"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__(run_name)
        self.logging_dir = logging_dir


class Member(StrEnum):
    MLFLOW = "mlflow"


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", dict(LOGGER_TYPE_TO_CLASS))


def test_what_log_with_may_be(monkeypatch, caplog):
    there = {"mlflow", "wandb", "tensorboard"}
    monkeypatch.setattr(tracking, "_is_there", there.__contains__)
    own = Keeping()
    assert filter_trackers(None) == []
    assert filter_trackers("wandb") == ["wandb"]
    assert filter_trackers(LoggerType.WANDB) == ["wandb"]
    assert filter_trackers([Member.MLFLOW, "mlflow", own, own, Keeping]) == ["mlflow", own, Keeping]
    assert filter_trackers([own, "all"], "folder") == [own, "tensorboard", "wandb", "mlflow"]
    assert not caplog.records
    assert filter_trackers("all") == ["wandb", "mlflow"]
    assert "leaves tensorboard out" in caplog.text


@pytest.mark.parametrize(
    ("log_with", "text"),
    [
        ("nonsense", "none of aim, clearml, comet_ml, .*register_tracker_class"),
        (["wandb", "Wandb"], "none of aim"),
        (object(), "no method `log`"),
        (dict, "a dict has no method `log`"),
        ("tensorboard", "requires a `logging_dir`"),
        (InFolder, "requires a `logging_dir`"),
    ],
)
def test_what_no_machine_could_log_with_is_refused(monkeypatch, log_with, text):
    monkeypatch.setattr(tracking, "_is_there", lambda module: True)
    with pytest.raises(ConfigError, match=text):
        filter_trackers(log_with)


def test_a_class_is_known_by_its_name_once_it_is_registered(registry, tmp_path):
    for kind in (Keeping, InFolder):
        register_tracker_class(kind)
    accelerator = Accelerator(cpu=True, log_with=["keeping", InFolder], project_dir=tmp_path)
    accelerator.init_trackers("run", init_kwargs={"keeping": {"a": 1}})
    first, second = accelerator.trackers
    assert (first.run_name, first.kwargs) == ("run", {"a": 1})
    assert (second.run_name, second.logging_dir) == ("run", tmp_path)
    with pytest.warns(UserWarning, match="'keeping' was the name of Keeping"):
        register_tracker_class(type("Other", (Keeping,), {"name": "keeping", "requires_logging_directory": False}))


@pytest.mark.parametrize(
    "kind",
    [
        dict,
        type("Nameless", (GeneralTracker,), {"requires_logging_directory": False}),
        type("Empty", (GeneralTracker,), {"name": "", "requires_logging_directory": False}),
        type("Placeless", (GeneralTracker,), {"name": "placeless"}),
    ],
)
def test_a_class_without_name_or_place_is_not_registered(kind):
    with pytest.raises(ValueError, match="register_tracker_class"):
        register_tracker_class(kind)


def test_making_a_tracker_joins_no_run(tmp_path):
    for name, kind in LOGGER_TYPE_TO_CLASS.items():
        made = kind("run", *([tmp_path] if kind.requires_logging_directory else []))
        assert made.name == name
    assert not list(tmp_path.iterdir())


def test_config_values_that_mlflow_refuses_are_left_out(library, monkeypatch, caplog):
    calls = library("mlflow", get_experiment_by_name=lambda name: None)
    limits = module_with(MAX_PARAM_VAL_LENGTH=5, MAX_PARAMS_TAGS_PER_BATCH=2)
    monkeypatch.setitem(sys.modules, "mlflow.utils.validation", limits)
    given = {"a": 1, "long": "x" * 6, "b": 2, "c": 3}
    with caplog.at_level(logging.WARNING):
        tracking.MLflowTracker("run").store_init_configuration(given)
    assert calls == [("log_params", {"a": 1, "b": 2}), ("log_params", {"c": 3})]
    assert "'long'" in caplog.text
    assert "long" in given
