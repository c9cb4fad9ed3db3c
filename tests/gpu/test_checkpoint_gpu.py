"""A resumed run is the straight run bit for bit on GPUs too: fused states on the device, pinned slabs, CUDA's generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rig.gpu_rows import rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path) -> None:
    found = rows_of(Path(__file__).with_name("checkpoint_worker.py"), tmp_path, 550)
    assert len(found) == 10 + 8 + 6 + 1 + 2
    assert not [row for row in found if row["note"]]
