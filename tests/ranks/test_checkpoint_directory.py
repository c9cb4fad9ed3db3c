"""What a directory of checkpoints promises: numbers, limits, one run, frozen weights by reference, hooks, clear refusals."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ranks.test_checkpoint_failures import Failing, Net, Run, full_disk
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint.directory import survey
from shardwise.errors import CheckpointError
from shardwise.files import disk
from shardwise.run.process import forget_run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("."))


def _limited(ranks: Any, folder: str) -> list[str]:
    run = Run(folder, total_limit=2, keep_best=1)
    for metric in (3.0, 1.0, 2.0, 4.0, 5.0):
        run.train()
        run.accelerator.save_state(metric=metric)
        ranks.barrier()
    found = names(Path(folder))
    ranks.barrier()
    run.close()
    # A later run goes on counting where this one stopped.
    again = Run(folder, total_limit=2, keep_best=1)
    again.accelerator.load_state()
    assert again.steps == 5
    again.train()
    again.accelerator.save_state()
    again.close()
    return [*found, "then", *names(Path(folder))]


def test_the_newest_and_the_best_are_kept(world, tmp_path):
    found = world(2).run(_limited, str(tmp_path))[0]
    assert found == [*(f"checkpoint_{n}" for n in (1, 3, 4)), "then", *(f"checkpoint_{n}" for n in (1, 4, 5))]


def _explicit(ranks: Any, folder: str) -> None:
    run = Run(folder)
    target = Path(folder) / "state"
    run.train()
    run.accelerator.save_state(str(target))
    run.train()
    run.accelerator.save_state(str(target))  # replaces it
    run.train(3)
    run.accelerator.load_state(target)
    assert run.steps == 2
    run.accelerator.load_state(f"{folder}/latest")
    assert run.accelerator.has_checkpoint(folder)
    assert not run.accelerator.has_checkpoint(f"{folder}/elsewhere")
    ranks.barrier()
    if ranks.rank == 0:
        Path(folder, "mine").mkdir()
        Path(folder, "mine", "notes.txt").write_text("precious")
    ranks.barrier()
    with pytest.raises(CheckpointError, match="holds files that are not a checkpoint"):
        run.accelerator.save_state(Path(folder) / "mine")
    assert Path(folder, "mine", "notes.txt").read_text() == "precious"
    run.close()


def test_a_named_directory_is_replaced_if_it_is_a_checkpoint_and_left_alone_if_not(world, tmp_path):
    world(2).run(_explicit, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    first = Run(str(tmp_path), stage=0)
    first.train()
    first.accelerator.save_state()
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ranks.test_checkpoint_failures import Run\n"
        "run = Run(sys.argv[2], stage=0); run.train(); run.accelerator.save_state()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).resolve().parents[1]), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert "is in use by another run" in done.stderr
    first.close()


# Frozen weights.


def _frozen(ranks: Any, folder: str, mode: Any, change: bool) -> tuple[str | None, list[str]]:
    run = Run(folder)
    run.train()
    before = run.weights()
    saved = run.accelerator.save_state(include_frozen=mode)
    run.train()
    run.accelerator.save_state(include_frozen=mode)
    addresses = []
    with safe_open(Path(saved) / f"rank-{ranks.rank:05d}.safetensors", "pt") as file:
        addresses = [name for name in file.keys() if "frozen" in name]  # noqa: SIM118 - not a dictionary
    run.close()
    forget_run()
    model = Net()
    if change:
        with torch.no_grad():
            model.blocks[0].weight.add_(1.0)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(run)
    try:
        accelerator.load_state(saved)
        assert torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist() == before
    except CheckpointError as error:
        return str(error), addresses
    finally:
        accelerator.free_memory()
    return None, addresses


@pytest.mark.parametrize("mode", [False, True, "shared"])
@pytest.mark.parametrize("change", [False, True])
def test_frozen_weights_are_compared_and_kept_only_where_asked_for(world, tmp_path, mode, change):
    results = world(2).run(_frozen, str(tmp_path), mode, change)
    stores = [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("frozen-")]
    assert len(stores) == (mode == "shared")
    assert any(addresses for _, addresses in results) == (mode is True)
    words = [error for error, _ in results]
    if change and mode is False:
        assert words[0] == words[1]
        assert "blocks.0.weight" in words[0]
        assert "1 frozen weight(s)" in words[0]
    else:
        assert words == [None, None]


def test_only_trained_weights_and_their_states_are_written(world, tmp_path):
    world(1).run(_frozen, str(tmp_path), False, False)
    found = tmp_path / "checkpoints" / "checkpoint_0" / "rank-00000.safetensors"
    trained = 2 * (36 + 6)
    with safe_open(found, "pt") as file:
        flat = [file.get_tensor(name).numel() for name in file.keys() if not name.startswith("state")]  # noqa: SIM118
    assert sum(flat) == 3 * trained


# What does not fit.


class Other(nn.Module):
    def __init__(self, width: int, more: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, width), nn.Linear(width, 6)])
        self.more = nn.Linear(6, 6) if more else None


def _misfit(ranks: Any, folder: str, what: str) -> str:
    run = Run(folder)
    run.train()
    saved = run.accelerator.save_state()
    run.close()
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    model = Other(5 if what == "width" else 6, what == "more")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:1]}, {"params": trained[1:]}] if what == "groups" else trained
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    accelerator.prepare(model, optimizer)
    if what != "objects":
        accelerator.register_for_checkpointing(*[run] * (2 if what == "two objects" else 1))
    with torch.no_grad():
        for block, other in zip(model.blocks, Net().blocks, strict=True):
            if what == "groups":
                block.weight.copy_(other.weight)
    try:
        accelerator.load_state(saved)
    except CheckpointError as error:
        return str(error)
    finally:
        accelerator.free_memory()
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("width", "has shape"),
        ("more", "it has no more.bias and 1 more"),
        ("two objects", "1 registered object(s), but this run has prepared 2"),
    ],
)
def test_a_checkpoint_of_another_script_is_refused_with_the_difference(world, tmp_path, what, words):
    results = world(2).run(_misfit, str(tmp_path), what)
    assert results[0] == results[1]
    assert words in results[0]


class Odd:
    def state_dict(self) -> dict[str, Any]:
        return {"handler": logging.getLogger()}

    def load_state_dict(self, state: Any) -> None: ...


def _hooks_and_failures(ranks: Any, folder: str) -> None:
    run = Run(folder)
    run.train()
    called: list[Any] = []

    def before_save(models: list[nn.Module], weights: list[Any], directory: str) -> None:
        called.append(models[0] is run.model)
        weights.pop()
        Path(directory, f"extra-{ranks.rank}").write_text("kept")

    handle = run.accelerator.register_save_state_pre_hook(before_save)
    run.accelerator.register_load_state_pre_hook(lambda models, directory: called.append(directory))
    saved = run.accelerator.save_state()
    handle.remove()
    run.accelerator.load_state(saved)
    assert called == [True, saved]
    assert Path(saved, f"extra-{ranks.rank}").read_text() == "kept"

    # A failure in the background is the next save's error, on every rank, and the one after it works.
    with disk.watched(Failing(2 if ranks.rank == 1 else None, full_disk)):
        run.accelerator.save_state(async_=True)
        run.accelerator._run.background._thread.join()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
        run.accelerator.save_state()
    assert run.accelerator.save_state() != saved

    run.accelerator.register_for_checkpointing(Odd())
    with pytest.raises(CheckpointError, match=r"objects/1/handler is a logging\.RootLogger"):
        run.accelerator.save_state()
    run.close()


def test_hooks_are_called_and_failures_surface(world, tmp_path):
    world(2).run(_hooks_and_failures, str(tmp_path))


def _evaluation(ranks: Any, folder: str) -> None:
    run = Run(folder)
    run.train(2)
    saved, weights = run.accelerator.save_state(), run.weights()
    run.close()
    forget_run()
    model, accelerator = Net(), Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=0))
    accelerator.prepare(model)
    accelerator.load_state(saved)
    assert torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist() == weights
    accelerator.free_memory()


def test_a_run_without_an_optimizer_loads_the_weights(world, tmp_path):
    world(2).run(_evaluation, str(tmp_path))


def test_a_checkpoint_is_json_and_safetensors(world, tmp_path):
    world(2).run(_evaluation, str(tmp_path))
    found = survey(tmp_path / "checkpoints").complete[0].path
    assert {path.suffix for path in found.iterdir()} == {".json", ".safetensors"}
    for path in found.glob("*.json"):
        json.loads(path.read_text())
