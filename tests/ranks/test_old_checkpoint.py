"""A checkpoint that was written before the folders of src were moved is read, and on as many ranks it goes on as it did.

`rig/old_run.py` is the run, and the command that wrote tests/data/checkpoint_before_moves and the numbers beside it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rig.old_run import NAME, STEPS, OldRun, drawn

DATA = Path(__file__).resolve().parents[1] / "data"
HELD = json.loads((DATA / f"{NAME}.json").read_text())


def _loaded(ranks: Any, place: str, stage: int) -> dict[str, Any]:
    """What a run with other weights, which has trained, holds once it has loaded it, and how it goes on."""
    run = OldRun(seed=9, stage=stage)
    run.train(2)
    run.accelerator.load_state(place)
    numbers, facts, tensors = drawn(), run.facts(), run.tensors()
    run.accelerator.load_state(place)
    after = run.train(STEPS)
    found = {"drawn": numbers, "facts": facts, "tensors": tensors, "samples": [samples for samples, _ in after]}
    found["losses"] = [loss for _, loss in after]
    found["ends"] = {f"ends/{name}": t for name, t in run.tensors().items() if name.startswith("weights/")}
    run.accelerator.free_memory()
    return found


def _of(kinds: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in load_file(DATA / f"{NAME}.safetensors").items() if name.startswith(kinds)}


@pytest.mark.parametrize(("size", "stage"), [(2, 3), (1, 3), (1, 0), (2, 2)])
def test_a_checkpoint_from_before_the_moves_is_read(world, tmp_path, size, stage):
    shutil.copytree(DATA / NAME, tmp_path / "old")
    for rank, found in enumerate(world(size).run(_loaded, str(tmp_path / "old"), stage, timeout_s=60)):
        assert found["facts"] == HELD["facts"]
        wanted = _of(("weights", "average", "states"))
        assert found["tensors"].keys() == wanted.keys()
        assert all(torch.equal(found["tensors"][name], value) for name, value in wanted.items())
        assert found["samples"] == HELD["samples"]
        if size != 2:
            continue
        assert found["drawn"] == HELD["ranks"][rank]["drawn"]
        assert found["losses"] == pytest.approx(HELD["ranks"][rank]["losses"], rel=1e-6)
        for name, value in _of(("ends",)).items():
            # To the bit on the CPU that wrote it. A bias in front of a batch norm has no gradient but rounding, which AdamW
            # makes steps of: another CPU ends 1e-6 away in it. Training moves the others by 1e-3 and more.
            torch.testing.assert_close(found["ends"][name], value, rtol=1e-6, atol=5e-6, msg=name)


def test_the_checkpoint_is_small():
    files = [path for path in DATA.rglob("*") if NAME in str(path) and path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
