"""What a run takes on a drive: no more after a hundred loads, less when states move to the device, nothing after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from rig.engine import Tower, inputs, loss_of, mine, prepare
from shardwise import Accelerator
from shardwise.run.process import forget_run


def _nvme(folder, **engine):
    zero = {"zero_stage": 3, "offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": str(folder)}
    zero |= {"offload_param_device": "nvme", "offload_param_nvme_path": str(folder)}
    os.environ["SHARDWISE_CONFIG"] = json.dumps(
        {"distributed_type": "DEEPSPEED", "use_cpu": True, "deepspeed_config": zero, "shardwise_config": engine}
    )
    forget_run()
    try:
        return Accelerator(cpu=True)
    finally:
        del os.environ["SHARDWISE_CONFIG"]


def _taken(model):
    """(open files of the drives, bytes on them, descriptors of this process)"""
    from shardwise.zero.sharded import find_sharded

    drives = find_sharded(model).engine.stores.drives
    files, nbytes = sum(d.open_files for d in drives), sum(d.nbytes for d in drives)
    return files, nbytes, len(os.listdir("/proc/self/fd"))


def _loads(ranks, folder, count):
    accelerator = _nvme(folder / "drive")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.randn(2, 64)).sum())
    optimizer.step()
    optimizer.zero_grad()
    accelerator.save_state(folder / "state")
    before, weights = _taken(model), None
    seen = set()
    for _ in range(count):
        accelerator.load_state(folder / "state")
        seen.add(_taken(model))
    state = accelerator.get_state_dict(model)
    weights = None if ranks.rank else {name: value.sum().item() for name, value in state.items()}
    accelerator.free_memory()
    return before, seen, weights, list((folder / "drive").iterdir())


@pytest.mark.parametrize("n", [1, 2])
def test_loads_take_no_more_files_descriptors_or_bytes(world, tmp_path, n):
    for before, seen, _, left in world(n).run(_loads, tmp_path, 8):
        assert seen == {before}
        assert before[0] > 0
        assert left == []


@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2])
def test_a_hundred_loads_take_no_more_files_descriptors_or_bytes(world, tmp_path, n):
    for before, seen, _, left in world(n).run(_loads, tmp_path, 100):
        assert seen == {before}
        assert left == []


def _moved(ranks, folder):
    """Bytes and files on the drive after each step, with a budget that takes everything in after the second."""
    model = Tower(depth=2)
    paths = dict.fromkeys(("param", "optimizer"), str(folder))
    sharded, _, stepping = prepare(ranks, model, "3-disk", nvme_paths=paths, gpu_memory_budget=1 << 30)
    drives = sharded.engine.stores.drives
    found = []
    for batch in inputs(4):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
        found.append((sum(d.open_files for d in drives), sum(d.nbytes for d in drives)))
    sharded.release()
    return found


@pytest.mark.filterwarnings("ignore")
def test_what_moves_to_the_device_gives_its_files_back(world, tmp_path):
    for found in world(2).run(_moved, tmp_path):
        assert found[0][0] > 0
        assert found[-1] == (0, 0)


SCRIPT = """
    import os, signal, sys
    import torch
    from shardwise import Accelerator

    def gloos():
        names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
        return sum("gloo" in name for name in names)

    drive, tries = sys.argv[1], int(sys.argv[2])
    count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    accelerator = Accelerator()
    if accelerator.is_main_process:
        left = os.listdir(drive) if os.path.isdir(drive) else []
        print("start", count, "finds", left, flush=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.randn(2, 64)).sum())
    optimizer.step()
    if count < tries and accelerator.process_index == count % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    accelerator.wait_for_everyone()
    if count == tries:
        before = gloos()
        accelerator.end_training()
        print("threads of gloo", before > 0, gloos(), flush=True)
"""


def launched(tmp_path, tries):
    script, drive, temporary = tmp_path / "train.py", tmp_path / "drive", tmp_path / "tmp"
    second = tmp_path / "second"
    for folder in (drive, second):
        folder.mkdir()
    script.write_text(textwrap.dedent(SCRIPT))
    temporary.mkdir()
    start = ["launch", "--use_cpu", "--num_processes", "2", "--zero_stage", "3", "--max_restarts", str(tries)]
    for what in ("optimizer", "param"):
        start += [f"--offload_{what}_device", "nvme", f"--offload_{what}_nvme_path", f"{drive},{second}"]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("SHARDWISE_CONFIG", "RANK", "WORLD_SIZE")
    }
    environment |= {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", "from shardwise.cli.main import main; main()", *start, str(script), str(drive), str(tries)],
        env=environment, capture_output=True, text=True, timeout=60 * (tries + 1), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line for line in said if line.startswith("start")] == [f"start {n} finds []" for n in range(tries + 1)]
    threads = [line for line in said if line.startswith("threads")]
    assert threads == ["threads of gloo True 0"] * 2, "end_training ends the threads of every group"
    assert [*drive.iterdir(), *second.iterdir()] == []
    assert [name for name in os.listdir(temporary) if not name.startswith("torchinductor_")] == []


@pytest.mark.timeout(150)
def test_a_killed_rank_leaves_nothing_on_the_drive_and_starts_again(tmp_path):
    launched(tmp_path, 1)


@pytest.mark.full
@pytest.mark.timeout(1300)
def test_twenty_kills_leave_nothing_on_the_drive(tmp_path):
    launched(tmp_path, 20)
