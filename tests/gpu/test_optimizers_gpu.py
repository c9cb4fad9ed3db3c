"""Each installed optimizer of docs/optimizers.md on GPUs, as on CPUs: tables that move to a device, kernels of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rig.gpu_rows import rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_optimizers_are_stepped_or_refused_as_on_a_cpu(tmp_path: Path) -> None:
    found = rows_of(Path(__file__).with_name("optimizer_worker.py"), tmp_path, 880)
    assert found
    assert not [row for row in found if row["note"]]
