"""A model's name that leads nowhere is one sentence, and at once: without torch for a path, without retries for the hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.cli.main import run

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def no_hub(monkeypatch):
    for name in (*PROXIES, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens


@pytest.mark.parametrize("command", [["estimate", "some/model"], ["config", "--default", "--model", "some/model"]])
def test_a_hub_that_cannot_be_reached_is_one_line(command, no_hub, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command) == 2
    told = capsys.readouterr()
    before = "--model: " if command[0] == "config" else ""
    assert told.err == (
        f"error: {before}some/model: there is no such directory here, 127.0.0.1 cannot be reached from here (Connection "
        "refused), and nothing of that name is in its cache\n"
    )
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_wrong_is_told_before_torch_is_imported():
    code = "import sys; from shardwise.cli.main import run; run(['estimate', './mdoel']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
    assert done.stderr == "error: ./mdoel: there is no such file or directory\n"


def test_an_estimate_without_a_gpu_says_how_to_count_for_another_machine(capsys, monkeypatch):
    monkeypatch.setattr("shardwise.cli.model_run.visible_gpus", lambda ids: 0)
    model = str(Path(__file__).resolve().parents[2] / "examples" / "base_model" / "causal_lm")
    assert run(["estimate", model, "--num_processes", "4"]) == 0
    assert f"shardwise plan {model} --gpus 4 --gpu H100" in capsys.readouterr().out
