"""A resumed run is the straight run bit for bit on GPUs too: fused states on the device, pinned slabs, CUDA's generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("checkpoint_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    rows = tmp_path / "rows.json"
    done = subprocess.run([*command, "--json", str(rows)], capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(rows.read_text())
    assert len(found) == 10 + 8 + 6 + 1 + 2
    assert not [row for row in found if row["note"]]
