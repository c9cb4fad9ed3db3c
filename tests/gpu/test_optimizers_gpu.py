"""Each installed optimizer of docs/optimizers.md on GPUs, as on CPUs: tables that move to a device, kernels of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_optimizers_are_stepped_or_refused_as_on_a_cpu(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("optimizer_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    rows = tmp_path / "rows.json"
    done = subprocess.run([*command, "--json", str(rows)], capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(rows.read_text())
    assert found
    assert not [row for row in found if row["note"]]
