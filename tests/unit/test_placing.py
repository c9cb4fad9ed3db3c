"""Which machine a launcher is on, as schedulers say it; and the batch script for one of them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from shardwise.cli.main import run
from shardwise.config.environment import RankEnvironment
from shardwise.config.launchers import port_of
from shardwise.config.machine import interface_towards
from shardwise.config.placing import Machine, machine_of
from shardwise.errors import ConfigError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
POD = {
    "PET_NNODES": "4",
    "PET_NODE_RANK": "3",
    "PET_NPROC_PER_NODE": "8",
    "MASTER_ADDR": "job-master-0",
    "MASTER_PORT": "23456",
}
SAGEMAKER = {"SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "8"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (SRUN, Machine("srun", 1, 2, "gpu07", port_of("4711", "0"))),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, None),
        (POD, Machine("the PyTorchJob", 3, 4, "job-master-0", 23456, 8)),
        (POD | {"PET_NPROC_PER_NODE": "auto"}, Machine("the PyTorchJob", 3, 4, "job-master-0", 23456)),
        (POD | {"PET_NNODES": "1"}, None),
        (SAGEMAKER, Machine("SageMaker", 1, 2, "algo-1", port_of("algo-1", "algo-2"))),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}, None),
    ],
)
def test_each_scheduler_says_which_machine_this_is(env, expected):
    assert machine_of(env) == expected


@pytest.mark.parametrize(
    ("env", "error"),
    [
        (POD | {"PET_NNODES": "1:4"}, "elastic PyTorchJob"),
        ({"PET_NNODES": "2"}, "neither PET_NODE_RANK nor RANK"),
        (SAGEMAKER | {"SM_CURRENT_HOST": "algo-9"}, "no list with SM_CURRENT_HOST"),
        (SAGEMAKER | {"SM_HOSTS": "algo-1"}, "no list with SM_CURRENT_HOST"),
    ],
)
def test_a_scheduler_that_contradicts_itself_is_an_error(env, error):
    with pytest.raises(ConfigError, match=error):
        machine_of(env)


def test_a_script_on_each_machine_of_sagemaker_is_a_rank():
    found = RankEnvironment.read(SAGEMAKER)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (1, 2, 0, 1)
    assert found.address == "algo-1"


def test_the_interface_is_none_for_loopback_and_for_nothing():
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("localhost") is None
    assert interface_towards("::1") is None


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PET_", "SM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 0)
    folder = tmp_path / "it's; rm -r $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "a `b`.py").write_text("")
    return folder


def test_the_batch_script_starts_what_was_typed_and_runs_nothing_else(script, capsys):
    odd = ["a b", "$(touch injected)", "`touch injected`", "'; touch injected; '", "--nodes\n#SBATCH --x"]
    flags = ["--num_machines", "2", "--num_processes", "16", "--zero_stage", "3"]
    assert run(["launch", *flags, "--slurm_script", "-", "a `b`.py", *odd]) == 0
    text = capsys.readouterr().out
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert header[:4] == [
        "#SBATCH --job-name=a__b_",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
    ]
    played = (
        'srun() { shift; printf "%s\\0" "$@"; }; scontrol() { echo gpu07; echo gpu08; }; '
        "SLURM_JOB_ID=4711; SLURM_JOB_NODELIST=x; "
    )
    done = subprocess.run(["bash", "-c", played + text], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert words[1:4] == ["-m", "shardwise", "launch"]
    place = "--num_processes 16 --num_machines 2 --main_process_ip gpu07 --main_process_port 19711"
    assert words[4:12] == place.split()
    assert words[12:] == ["--zero_stage", "3", "a `b`.py", *odd]
    assert not (script / "injected").exists()


def test_the_batch_script_is_written_to_a_new_file_only(script, capsys):
    flags = ["launch", "--use_cpu", "--num_processes", "2", "--slurm_script"]
    assert run([*flags, "job", "a `b`.py"]) == 0
    assert "gpus-per-node" not in Path("job").read_text()
    assert f"sbatch {shlex.quote('job')} starts it" in capsys.readouterr().err
    assert run([*flags, "job", "a `b`.py"]) == 2
    assert "--slurm_script: job: cannot be written: File exists" in capsys.readouterr().err
    assert run(["launch", "--slurm_script", "-", "a `b`.py"]) == 2
    assert "needs --num_processes" in capsys.readouterr().err
