"""A directory that each machine has for itself is no place for a run's checkpoint: one error on every rank that says so.

One rank's own disk is played: what it reads by a path is not what rank 0 has written there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks.test_checkpoint_failures import Net
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint import run_saving, write
from shardwise.errors import CheckpointError
from shardwise.run.process import forget_run


def _made() -> Accelerator:
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    accelerator.prepare(model, torch.optim.AdamW(trained, lr=0.01))
    return accelerator


def _saves(ranks: Any, folder: str, found: str | None) -> tuple[str, bool]:
    accelerator, read = _made(), write.read_text
    if ranks.rank == 1:

        def own_disk(path: Path, kind: Any, *limits: Any) -> str:
            if found is None:
                raise kind(f"{path}: there is no such file")
            return found

        write.read_text = own_disk  # type: ignore[assignment]
    try:
        accelerator.save_state(Path(folder) / "state")
    except CheckpointError as error:
        return str(error), (Path(folder) / "state").exists()
    finally:
        write.read_text = read
        accelerator.free_memory()
        forget_run()
    return "", True


@pytest.mark.parametrize(
    "found", [None, "", "of a save that was cut short there"], ids=["nothing", "empty", "left over"]
)
def test_a_save_to_a_machines_own_disk_is_one_error(world, tmp_path, found):
    first, second = world(2).run(_saves, str(tmp_path), found)
    assert first == second
    text, is_there = first
    assert "state was not saved, earlier checkpoints are as they were: rank 1 on " in text
    assert text.endswith("Save to a directory that all machines share.")
    assert not is_there


def _loads(ranks: Any, folder: str) -> str:
    accelerator, opened = _made(), run_saving.Checkpoint
    accelerator.save_state(Path(folder) / "one")
    accelerator.save_state(Path(folder) / "two")
    if ranks.rank == 1:
        run_saving.Checkpoint = lambda path: opened(path.with_name("two"))  # type: ignore[misc, assignment]
    try:
        accelerator.load_state(Path(folder) / "one")
    except CheckpointError as error:
        return str(error)
    finally:
        run_saving.Checkpoint = opened  # type: ignore[misc]
        accelerator.free_memory()
        forget_run()
    return ""


def test_a_load_of_different_checkpoints_of_one_name_is_one_error(world, tmp_path):
    first, second = world(2).run(_loads, str(tmp_path))
    assert first == second
    assert "one could not be loaded: it is another checkpoint on " in first
    assert "Load from a directory that all machines share" in first
