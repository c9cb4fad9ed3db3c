"""The tables of docs/howto/plans.md are what the planner gives today: one model here, all in `make test-full`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shardwise.cli.main import run
from shardwise.estimate.meta_model import build_meta_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "site"))

import plan_table  # noqa: E402

AGAIN = "the page is old: python tools/site/plan_table.py"


def committed() -> dict[str, dict[str, list[list[str]]]]:
    return plan_table.committed(plan_table.PAGE.read_text(encoding="utf-8"))


def test_every_training_model_and_machine_has_a_row() -> None:
    found = committed()
    assert list(found) == list(plan_table.TRAININGS)
    for training, models in found.items():
        assert list(models) == list(plan_table.MODELS), training
        for rows in models.values():
            assert [cells[0] for cells in rows] == list(plan_table.MACHINES)
            assert all(cells[4] or cells[1].startswith("does not fit: ") for cells in rows)


def test_the_page_has_what_the_planner_gives() -> None:
    """Of the smallest model, on the smallest machine and on the largest: offloaded and divided."""
    few = {name: plan_table.MACHINES[name] for name in ("RTX 4090", "8 x H100")}
    now = [row.cells for row in plan_table.rows("Llama-3.2-1B", "full", few)]
    assert now == [cells for cells in committed()["full"]["Llama-3.2-1B"] if cells[0] in few], AGAIN


def test_a_row_is_what_the_command_prints_first(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    shape = plan_table.MODELS["Llama-3.2-1B"][0]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape), encoding="utf-8")
    asked = ["--gpus", "1", "--gpu", "4090", "--host_memory", "64GB", "--gradient_accumulation_steps", "32"]
    assert run(["plan", str(path), *asked, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["plans"][0]
    cells = committed()["full"]["Llama-3.2-1B"][0]
    assert cells[0] == "RTX 4090"
    assert cells[4] == plan_table.rounded(first["tokens_per_s"]), AGAIN
    assert cells[1].startswith(f"stage {first['zero_stage']}, optimizer on {first['offload_optimizer_device']}"), AGAIN
    for word, name in (("recompute", "recompute"), ("compile", "compile"), ("budget", "budget_keeps")):
        assert (word in cells[1]) == bool(first[name])


@pytest.mark.parametrize("model", list(plan_table.MODELS))
def test_models_have_the_parameters_that_their_publishers_count(model: str, tmp_path: Path) -> None:
    shape, billions = plan_table.MODELS[model]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape), encoding="utf-8")
    counted = sum(p.numel() for p in build_meta_model(str(path)).parameters())
    assert counted / 1e9 == pytest.approx(billions, abs=0.05 if billions > 10 else 0.005)


@pytest.mark.full
@pytest.mark.parametrize("training", list(plan_table.TRAININGS))
@pytest.mark.parametrize("model", list(plan_table.MODELS))
def test_the_whole_page_has_what_the_planner_gives(model: str, training: str) -> None:
    assert [row.cells for row in plan_table.rows(model, training)] == committed()[training][model], AGAIN
