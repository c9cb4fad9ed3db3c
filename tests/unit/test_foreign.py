"""A run that asked for ZeRO does not train without it in silence. Libraries are made up here; test_launch has real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shardwise
from shardwise.cli import worker
from shardwise.config.foreign import SPEAK_DEEPSPEED, TRAINERS, stage_asked_for

SOURCE = Path(shardwise.__file__).parents[1]
ZERO = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}


def run(
    tmp_path: Path, script: str, config: dict[str, Any] | None, *, by_worker: bool = True, **more: str
) -> subprocess.CompletedProcess[str]:
    """The script, as the launcher's worker or plain Python runs it, with the packages of tmp_path."""
    path = tmp_path / "script.py"
    path.write_text(script)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHARDWISE", "RANK"))}
    environment = {**kept, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)]), **more}
    if config is not None:
        environment["SHARDWISE_CONFIG"] = json.dumps(config)
    start = [worker.__file__, str(path)] if by_worker else [str(path)]
    return subprocess.run(
        [sys.executable, *start], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def make_packages(tmp_path: Path) -> None:
    """Every module of TRAINERS, with its class and a helper, in packages that hold nothing else."""
    for module, (name, _) in TRAINERS.items():
        folder = tmp_path.joinpath(*module.split(".")[:-1])
        folder.mkdir(parents=True, exist_ok=True)
        made = f"class {name}:\n    def __init__(self, one, two=2):\n        self.made = True\n"
        body = f"{made}\ndef helper():\n    return 'helped'\n"
        (folder / f"{module.split('.')[-1]}.py").write_text(body)
        while folder != tmp_path:
            (folder / "__init__.py").touch()
            folder = folder.parent


TRY_ALL = """
import importlib, inspect, sys
FIRST
found = []
for module, (name, _) in TRAINERS.items():
    loaded = importlib.import_module(module)
    assert loaded.helper() == "helped"
    assert type(loaded.__spec__.loader).__name__ == type(loaded.__loader__).__name__ == "SourceFileLoader"
    kind = getattr(loaded, name)
    assert list(inspect.signature(kind.__init__).parameters) == ["self", "one", "two"]
    try:
        kind(1)
        found.append("made")
    except ValueError as error:
        found.append(type(error).__name__ + ": " + str(error))
print("\\n".join(found))
"""


def try_all(first: str) -> str:
    return TRY_ALL.replace("FIRST", first).replace("TRAINERS", repr(TRAINERS))


@pytest.mark.parametrize("by_worker", [True, False], ids=["launched", "SHARDWISE_CONFIG alone"])
def test_what_trains_without_zero_cannot_be_made_in_a_run_that_asked_for_it(tmp_path, by_worker):
    make_packages(tmp_path)
    script = try_all("" if by_worker else "import shardwise")
    done = run(tmp_path, script, ZERO, by_worker=by_worker)
    assert done.returncode == 0, done.stderr
    for line, (module, (name, instead)) in zip(done.stdout.splitlines(), TRAINERS.items(), strict=True):
        package = module.split(".")[0]
        assert line.startswith(f"ConfigError: this run asked for zero_stage 3, but {package}'s {name} was made")
        assert instead in line
        assert ("--as-deepspeed" in line) == (package in SPEAK_DEEPSPEED)


def test_a_trainer_is_sent_to_deepspeeds_name_and_to_no_other_import(tmp_path):
    make_packages(tmp_path)
    trainer = tmp_path / "transformers" / "trainer.py"
    trainer.parent.mkdir()
    (trainer.parent / "__init__.py").touch()
    trainer.write_text("from accelerate.accelerator import Accelerator\ndef train():\n    Accelerator(1)\n")
    done = run(tmp_path, "from transformers.trainer import train\ntrain()", ZERO)
    assert "made by transformers' Trainer" in done.stderr
    assert "Start it by `shardwise launch --as-deepspeed`" in done.stderr
    assert "from shardwise import" not in done.stderr


def test_what_was_loaded_before_is_refused_too(tmp_path):
    make_packages(tmp_path)
    first = "import " + ", ".join(TRAINERS) + "\nimport shardwise"
    done = run(tmp_path, try_all(first), ZERO, by_worker=False)
    assert done.stdout.count("ConfigError") == len(TRAINERS), done.stderr


@pytest.mark.parametrize(
    "config", [None, {}, {"distributed_type": "MULTI_CPU"}, {**ZERO, "deepspeed_config": {"zero_stage": 0}}]
)
def test_other_runs_are_left_alone(tmp_path, config):
    make_packages(tmp_path)
    done = run(tmp_path, try_all(""), config)
    assert done.stdout.split() == ["made"] * len(TRAINERS), done.stderr


TORCH = "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n"


@pytest.mark.parametrize(
    ("script", "more", "told"),
    [
        (TORCH, {}, True),
        (TORCH + "sys.exit(0)", {}, True),
        (TORCH, {"RANK": "1"}, False),
        (TORCH + "sys.exit(3)", {}, False),
        (TORCH + "raise OSError", {}, False),
        (TORCH + "sys.argv.append('--help')", {}, False),
        (TORCH + "from shardwise.config.foreign import note_prepared\nnote_prepared('Net')", {}, False),
        ("print('no training at all')", {}, False),
    ],
    ids=["trained by itself", "exit 0", "another rank", "exit 3", "an error", "--help", "prepared", "no torch"],
)
def test_a_script_that_never_prepared_a_model_is_told_at_its_end(tmp_path, script, more, told):
    done = run(tmp_path, script, ZERO, **more)
    assert ("the script never prepared a model with shardwise" in done.stderr) == told, done.stderr
    assert "zero_stage" not in run(tmp_path, script, None, **more).stderr


def test_the_stage_that_is_asked_for():
    def asked(values: Any) -> int:
        return stage_asked_for({"SHARDWISE_CONFIG": values if isinstance(values, str) else json.dumps(values)})

    assert asked(ZERO) == 3
    assert asked({"distributed_type": "deepspeed"}) == 2
    assert asked({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "1"}}) == 1
    assert [asked(text) for text in ("", "not JSON", "[]", {"distributed_type": "NO"})] == [0] * 4
    assert stage_asked_for({}) == 0
