"""Runs over several machines, which are network namespaces: the same weights as on one, and one sentence for what goes wrong.

A machine's own name is at 127.0.1.1 in its hosts file, as Debian has it, unless a test says otherwise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rig import networks
from rig.networks import Machines

ENTRY = "from shardwise.cli.main import main; main()"
# Waits that are minutes for a user are seconds here.
SOON = (
    "from shardwise.cli import machines as m; m.SAY_WHO_IS_MISSING_AFTER_S = 1.0; m.CONNECT_WITHIN_S = {}; "
    "m.GONE_AFTER_FAILURE_S = 4.0; "
)
TRAIN = """
    import os, sys, time
    import torch
    from torch import nn
    from shardwise import Accelerator, DeepSpeedPlugin
    from shardwise.zero.sharded import find_sharded

    def train(accelerator, folder):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        first = 0
        if os.path.isdir(folder + "/state"):
            accelerator.load_state(folder + "/state")
            first = 3
        for step in range(first, 6):
            if step == 3:
                if first == 0:
                    accelerator.save_state(folder + "/state")
                if "wait" in sys.argv and first == 0:
                    print("at the step", os.getpid(), flush=True)
                    time.sleep(600)
            generator = torch.Generator().manual_seed(10 * step + accelerator.process_index)
            loss = model(torch.randn(4, 8, generator=generator)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        weights = accelerator.get_state_dict(model)
        print("a copy is on {} of {}".format(find_sharded(model).ranks.shards.size, accelerator.num_processes), flush=True)
        if accelerator.is_main_process:
            os.makedirs(folder, exist_ok=True)
            torch.save(weights, folder + "/weights.pt")
        accelerator.end_training()

    train(Accelerator(), sys.argv[1])
    if "groups" in sys.argv:  # each machine holds a copy; from the beginning, and once more from the checkpoint
        from shardwise.run.joined import forget_run

        for _ in range(2):
            forget_run()
            everything = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
            plugin = DeepSpeedPlugin(zero_stage=3, shard_group="machine", **everything)
            train(Accelerator(deepspeed_plugin=plugin), sys.argv[1] + "/groups")
"""
ZERO_3 = ("--zero_stage", "3", "--offload_optimizer_device", "cpu", "--offload_param_device", "cpu")

pytestmark = pytest.mark.skipif(networks.why_not() is not None, reason=str(networks.why_not()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    killed = "test_a_machine_that" in os.environ.get("PYTEST_CURRENT_TEST", "")
    assert killed or not list((tmp_path / "tmp").glob("shardwise-*")), "a launcher left its directory behind"


def command(machine: int, *arguments: str, count: int = 2, connect_within_s: float = 120, **place: Any) -> list[str]:
    """One machine's launcher. place: address, port."""
    address, port = place.get("address", "10.77.0.1"), str(place.get("port", 29500))
    machines = ["--num_machines", str(count), "--machine_rank", str(machine)]
    where = ["--main_process_ip", address, "--main_process_port", port]
    processes = [] if "--num_processes" in arguments else ["--num_processes", str(count)]
    entry = SOON.format(connect_within_s) + ENTRY
    return [sys.executable, "-c", entry, "launch", "--use_cpu", *machines, *where, *processes, *arguments]


def ended(runs: Sequence[subprocess.Popen[str]], within_s: float = 200) -> list[tuple[int, str, str]]:
    """Code, output and errors of each."""
    try:
        outputs = [run.communicate(timeout=within_s) for run in runs]
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    return [(run.returncode, *output) for run, output in zip(runs, outputs, strict=True)]


def trained_on_one_machine(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    (folder / "one").mkdir()
    flags = ["--use_cpu", "--num_processes", str(processes), "--zero_stage", "3"]
    subprocess.run([sys.executable, "-c", ENTRY, "launch", *flags, "train.py", "one"], check=True, timeout=200)
    return torch.load(folder / "one" / "weights.pt")


def trained_by_plain_torch(ranks: int) -> dict[str, torch.Tensor]:
    """What train.py trains, in this process: the mean loss of all ranks' batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(6):
        seeds = [10 * step + rank for rank in range(ranks)]
        batch = torch.cat([torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch.load(folder / "weights.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("count", "each"), [(2, 2), pytest.param(3, 2, marks=pytest.mark.full)])
def test_machines_train_as_one_process_does_and_go_on_from_their_checkpoint(folder, count, each):
    """All ranks of all machines hold one copy together; then, in the same processes, each machine one of its own."""
    expected = trained_by_plain_torch(count * each)
    (folder / "many").mkdir()
    flags = ("--num_processes", str(count * each), *ZERO_3, "train.py", "many", "groups")
    with Machines(count, folder) as machines:
        for _ in range(1 if count == 2 else 2):  # at the second time from the checkpoint
            runs = [machines.start(machine, command(machine, *flags, count=count)) for machine in range(count)]
            found = ended(runs)
            assert [code for code, _, _ in found] == [0] * count, found
            same(folder / "many", expected)
            same(folder / "many" / "groups", expected)
            assert found[1][1].count(f"a copy is on {count * each} of {count * each}") == each, found[1][1]
            assert found[1][1].count(f"a copy is on {each} of {count * each}") == 2 * each, found[1][1]
            assert found[1][2].startswith("shardwise launch: machine 1 waits for machine 0 at 10.77.0.1:29500\n")
            assert "[W" not in found[0][2] + found[1][2]


# What differs on machine 1, or is missing, and what every machine then says. The line that carries it is tested without
# processes in test_machines_meet.py.
LATE, SILENT = "machine 1 did not come within 8 s", "machine 0 does not answer at 10.77.0."
ERRORS: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "zero_stage": (["--zero_stage", "2"], {}, ["zero_stage is 0 on machine 0 (m0) and 2 on machine 1 (m1)"] * 2),
    "rdzv_backend": (["--rdzv_backend", "c10d"], {}, ["is static on machine 0 (m0) and c10d on machine 1 (m1)"] * 2),
    "num_processes": (["--num_processes", "4"], {}, ["is 2 on machine 0 (m0) and 4 on machine 1 (m1)"] * 2),
    "port": ([], {"port": 29501}, [LATE, f"{SILENT}1:29501: nothing listens there"]),
    "address": ([], {"address": "10.77.0.9"}, [LATE, f"{SILENT}9:29500"]),
    "script": (["other.py"], {}, ["the script is train.py with SHA-256 "] * 2),
    "machine_rank": ([], {"machine": 0}, ["machine_rank 0 was given to two machines: "] * 2),
}


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("fault", ERRORS)
def test_what_differs_is_one_sentence_on_every_machine(folder, fault):
    flags, place, expected = ERRORS[fault]
    (folder / "other.py").write_text("print('another script')\n")
    where = {name: value for name, value in place.items() if name != "machine"}
    script = [] if "other.py" in flags else ["train.py", "."]
    with Machines(2, folder) as machines:
        runs = [
            machines.start(0, command(0, "train.py", ".", connect_within_s=8)),
            machines.start(1, command(place.get("machine", 1), *flags, *script, connect_within_s=8, **where)),
        ]
        found = ended(runs)
    assert [code for code, _, _ in found] == [2, 2], found
    for (_, _, text), sentence in zip(found, expected, strict=True):
        assert sentence in text
        assert text.count("error:") == 1
        assert "Traceback" not in text


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hosts", ["127.0.0.1 localhost\n", None], ids=["no name", "127.0.1.1"])
def test_the_own_name_need_not_lead_anywhere(folder, hosts):
    """Also for ranks that no launcher of shardwise has started."""
    (folder / "many").mkdir()
    with Machines(2, folder, hosts) as machines:
        runs = []
        for rank in range(2):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            where = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
            script = "import sys, runpy; sys.argv = ['train.py', 'many']; runpy.run_path('train.py')"
            runs.append(machines.start(rank, [sys.executable, "-c", script], env={**os.environ, **place, **where}))
        found = ended(runs)
    assert [code for code, _, _ in found] == [0, 0], found


def _at_the_step(run: subprocess.Popen[str]) -> int:
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("at the step"):
            return int(line.split()[-1])
    raise AssertionError("the run ended before its step")


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("backend", ["static", "c10d"])
@pytest.mark.parametrize("killed", [1, 0])
def test_a_machine_that_was_killed_and_comes_back_ends_with_the_weights_of_an_undisturbed_run(folder, backend, killed):
    expected = trained_on_one_machine(folder, 2)
    (folder / "many").mkdir()
    flags = [*ZERO_3, "--rdzv_backend", backend, "--max_restarts", "2", "train.py", "many", "wait"]
    with Machines(2, folder) as machines:
        runs = [machines.start(machine, command(machine, *flags)) for machine in range(2)]
        pids = [_at_the_step(run) for run in runs]
        os.killpg(runs[killed].pid, signal.SIGKILL)
        runs[killed].communicate()
        time.sleep(5)
        runs[killed] = machines.start(killed, command(killed, *flags))
        found = ended(runs)
    assert [code for code, _, _ in found] == [0, 0], found
    same(folder / "many", expected)
    assert f"machine {killed} " in found[1 - killed][2]
    assert "is gone: nothing was heard of its launcher" in found[1 - killed][2]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["killed", "cut"])
def test_a_machine_that_does_not_come_back_is_named_and_nobody_stays(folder, how):
    (folder / "many").mkdir()
    flags = [*ZERO_3, "train.py", "many", "wait"]
    with Machines(2, folder) as machines:
        runs = [machines.start(machine, command(machine, *flags)) for machine in range(2)]
        pids = [_at_the_step(run) for run in runs]
        os.killpg(runs[1].pid, signal.SIGKILL)
        if how == "cut":
            machines.cut(1)
        ((code, _, text),) = ended(runs[:1])
        runs[1].communicate()
    assert code == 1
    assert "machine 1 (m1) is gone: nothing was heard of its launcher." in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
