"""The front end on GPUs: the example is launched as a user would, with two processes over NCCL and with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_example_trains_and_saves_an_adapter_that_stock_peft_loads(
    tmp_path: Path, processes: int, precision: str
) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices")
    logits = tmp_path / "logits.safetensors"
    launch = [
        *(sys.executable, "-c", "from shardwise.cli.main import main; main()", "launch"),
        *("--config_file", "examples/zero3_offload_cpu.yaml", "--num_processes", str(processes)),
        *("--mixed_precision", precision, "examples/conditional_generation.py", "--num-epochs", "20"),
        *("--output-dir", str(tmp_path / "adapter"), "--save-logits", str(logits)),
    ]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = next(line for line in done.stdout.splitlines() if line.startswith("GPU Total Peak Memory"))
    assert int(peak.rsplit(":", 1)[1].split()[0]) > 0
    losses = [float(line.split("train_epoch_loss=tensor(")[1].split(",")[0].rstrip(")"))
              for line in done.stdout.splitlines() if "train_epoch_loss" in line]  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]
    if precision == "no":
        check = [sys.executable, "examples/check_adapter.py", str(tmp_path / "adapter"), str(logits)]
        checked = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr[-2000:]
