"""A run under the launcher that loses a rank ends with the weights of one that did not; a run that is told to stop saves
first."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ENTRY = "from shardwise.cli.main import main; main()"

# 12 samples a step on any number of ranks; 12 steps over 3 epochs. KILL names a rank and a step of the first start.
SCRIPT = """
    import os, signal, sys, time
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from shardwise import Accelerator
    from shardwise.run.plugins import ProjectConfiguration

    folder, kill_rank, kill_step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    project = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(project_config=project)
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Dropout(0.0), torch.nn.Linear(9, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    data = TensorDataset(torch.randn(48, 7, generator=torch.Generator().manual_seed(1)))
    loader = DataLoader(data, batch_size=12 // accelerator.num_processes, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    class Steps:
        taken = 0
        def state_dict(self): return {"taken": self.taken}
        def load_state_dict(self, state): self.taken = state["taken"]

    steps = Steps()
    accelerator.register_for_checkpointing(steps)
    if accelerator.has_checkpoint():
        accelerator.load_state()

    for epoch in range(loader.iteration, 3):
        for (x,) in loader:
            if first and accelerator.process_index == kill_rank and steps.taken == kill_step:
                os.kill(os.getpid(), signal.SIGKILL)
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps.taken += 1
            if kill_rank == -2:
                accelerator.print("step", steps.taken, flush=True)
                time.sleep(0.3)
            if accelerator.stop_requested():
                accelerator.print("saved", accelerator.save_state(), flush=True)
                accelerator.end_training()
                sys.exit()
            if steps.taken % 3 == 0:
                accelerator.save_state(async_=steps.taken % 2 == 0)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(state, os.path.join(folder, "final.pt"))
    accelerator.end_training()
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT).strip() + "\n", encoding="utf-8")
    for name in ("SHARDWISE_CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return path


def command(script: Path, folder: Path, rank: int, step: int, *flags: str) -> list[str]:
    start = [sys.executable, "-c", ENTRY, "launch", "--use_cpu", "--num_processes", "2", "--zero_stage", "3", *flags]
    start += ["--scheduler_steps_per_process", "false"]
    return [*start, str(script), str(folder), str(rank), str(step)]


def run(script: Path, folder: Path, rank: int = -1, step: int = -1, *flags: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command(script, folder, rank, step, *flags), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def final(folder: Path) -> dict[str, list[float]]:
    import torch

    return {name: value.flatten().tolist() for name, value in torch.load(folder / "final.pt").items()}


@pytest.mark.timeout(300)
def test_a_run_that_lost_a_rank_ends_as_an_undisturbed_one(script, tmp_path):
    run(script, tmp_path / "calm")
    rank, step = random.randrange(2), random.randrange(4, 12)
    done = run(script, tmp_path / "killed", rank, step, "--max_restarts", "1")
    assert "all ranks start again, 2 processes" in done.stderr
    assert f"rank {rank} failed first: it was ended by signal 9" in done.stderr
    assert final(tmp_path / "killed") == final(tmp_path / "calm"), (rank, step)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_fewer_processes(script, tmp_path):
    run(script, tmp_path / "calm")
    fewer = run(script, tmp_path / "fewer", 1, 7, "--max_restarts", "2", "--restart_processes", "1")
    assert "all ranks start again, 1 process; 1 restart(s) left" in fewer.stderr
    for name, values in final(tmp_path / "calm").items():
        assert final(tmp_path / "fewer")[name] == pytest.approx(values, abs=1e-6), name


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_signal_saves_and_stops_and_the_next_start_goes_on(script, tmp_path, number):
    folder = tmp_path / "run"
    folder.mkdir()
    started = subprocess.Popen(
        command(script, folder, -2, -1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    while started.stdout.readline().split() != ["step", "4"]:
        assert started.poll() is None
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == (0 if number == signal.SIGUSR1 else 128 + number), err
    assert "saved" in out
    assert not (folder / "final.pt").exists()
    began = time.monotonic()
    run(script, folder)
    assert time.monotonic() - began < 60
    assert len(list((folder / "checkpoints").glob("checkpoint_*"))) == 2


@pytest.mark.timeout(60)
def test_restarts_that_cannot_be_are_refused(script, tmp_path):
    for flags, words in (
        (("--restart_processes", "1"), "no effect without max_restarts"),
        (("--restart_processes", "3", "--max_restarts", "1"), "3 is more than the 2"),
    ):
        done = subprocess.run(
            command(script, tmp_path, 0, 0, *flags), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert words in done.stderr
