"""The launcher's promises, with real processes: exit codes, the first failing rank first, and nothing left behind.

The scripts are tiny; most of each test's time is torch's import in the launcher.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ENTRY = "from shardwise.cli.main import main; main()"

SCRIPTS = {
    "show.py": """
        import json, os, sys
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "SHARDWISE_CONFIG")
        shown = {name: os.environ[name] for name in names}
        shown.update(argv=sys.argv, name=__name__, path=sys.path[0], spec=__spec__ is None)
        print(json.dumps(shown), flush=True)
    """,
    "exits.py": "import sys\nsys.exit(int(sys.argv[1]))",
    "raises.py": """
        import torch
        import torch.distributed as dist

        def train():
            raise ValueError("the loss of rank 1 is lost")

        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            train()
        dist.all_reduce(torch.zeros(1))
    """,
    "killed.py": """
        import os, signal
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.zeros(1))
    """,
    "waits.py": """
        import os, subprocess, time
        child = subprocess.Popen(["sleep", "60"])
        print(os.getpid(), child.pid, flush=True)
        time.sleep(60)
    """,
    "deaf.py": """
        import os, signal, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), os.getpid(), flush=True)
        time.sleep(60)
    """,
    "stays.py": """
        import os, threading, time
        if os.environ["RANK"] == "0":
            threading.Thread(target=time.sleep, args=(60,)).start()
            raise RuntimeError("main thread is gone, another one stays")
        time.sleep(60)
    """,
    "retries.py": """
        import os
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise OSError("only at first")
        print("done", flush=True)
    """,
    "loses.py": """
        import atexit, sys, time
        from pathlib import Path
        import torch
        from shardwise import Accelerator
        from shardwise.files import disk

        def full(operation, path):
            if operation == "write" and path.suffix == ".safetensors":
                raise OSError(28, "the disk is full")

        def last(rank):
            time.sleep(2 * (rank == 0))
            Path(f"last-{rank}").write_text("")

        accelerator = Accelerator()
        rank = accelerator.process_index
        atexit.register(last, rank)
        model = torch.nn.Linear(2, 2)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        filled = disk.watched(full)
        if rank == accelerator.num_processes - 1:
            filled.__enter__()
        accelerator.save_state("state", async_=True)
        sys.exit(int(sys.argv[1]))
    """,
    "sums.py": """
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        print(f"rank {dist.get_rank()} sum {total.item():.0f}", flush=True)
        dist.destroy_process_group()
    """,
    "foreign.py": """
        import torch
        from accelerate import Accelerator, init_empty_weights
        from accelerate.utils import set_seed
        from transformers import Trainer, TrainingArguments

        set_seed(1)
        with init_empty_weights():
            model = torch.nn.Linear(2, 2)
        arguments = TrainingArguments(output_dir="out", use_cpu=True, report_to=[])
        try:
            Accelerator(cpu=True)
        except ValueError as error:
            print(error, flush=True)
        Trainer(model=model, args=arguments)
    """,
    "spawns.py": """
        import multiprocessing

        def double(number):
            return 2 * number

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [21]), flush=True)
    """,
}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(textwrap.dedent(text).strip() + "\n", encoding="utf-8")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("OMP_NUM_THREADS", "SHARDWISE_CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if "sigkill_of_the_launcher" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        assert not list((tmp_path / "tmp").glob("shardwise-*")), "the launcher left its directory behind"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", ENTRY, "launch", "--use_cpu", *arguments]


def launch(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)


# Says what kind of run it is: of two processes that nobody says it of, a note tells that each has the whole model.
SAID = ("--zero_stage", "0")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments: str, processes: int) -> tuple[subprocess.Popen[str], list[int]]:
    """A launch whose ranks have each printed their pid and their child's."""
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that: these must hear it all the same.
    run = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_ctrl_c,  # noqa: PLW1509 - this process has no threads of its own
    )
    assert run.stdout is not None
    pids = [int(word) for _ in range(processes) for word in run.stdout.readline().split()]
    return run, pids


def none_left(pids: list[int], within_s: float = 3) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.timeout(90)
def test_the_script_sees_itself_as_under_python(scripts: Path) -> None:
    odd = ["--lr", "1e-3", "a b", "$$HOME ${local_rank}", "--", "--use_cpu"]
    done = launch("--num_processes", "2", "--zero_stage", "3", "show.py", *odd)
    assert done.returncode == 0, done.stderr
    shown = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda row: row["RANK"])
    assert [row["RANK"] for row in shown] == ["0", "1"]
    for row in shown:
        assert row["argv"] == ["show.py", *odd]
        assert (row["name"], row["path"], row["spec"], row["WORLD_SIZE"]) == ("__main__", str(scripts), True, "2")
        assert json.loads(row["SHARDWISE_CONFIG"])["deepspeed_config"]["zero_stage"] == 3
        assert int(row["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.stderr == ""


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("processes", "code"), [(1, 3), (2, 7)])
def test_the_scripts_exit_code_is_passed_on(scripts: Path, processes: int, code: int) -> None:
    done = launch(*SAID, "--num_processes", str(processes), "exits.py", str(code))
    assert done.returncode == code
    assert done.stderr.count("\n") <= processes
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(90)
def test_the_first_failing_ranks_traceback_comes_first(scripts: Path) -> None:
    done = launch(*SAID, "--num_processes", "2", "raises.py")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "shardwise launch: rank 1 failed first:"
    assert lines[1] == "Traceback (most recent call last):"
    assert 'raises.py", line 9, in <module>' in lines[2]
    assert "ValueError: the loss of rank 1 is lost" in lines
    assert done.stderr.count("Traceback") == 1
    assert "torchelastic" not in done.stderr.lower()
    assert "worker.py" not in done.stderr


@pytest.mark.timeout(180)
def test_a_save_that_fails_behind_the_script_fails_the_run_and_each_rank_comes_to_its_end(scripts: Path) -> None:
    assert launch(*SAID, "--num_processes", "1", "loses.py", "3").returncode == 3
    done = launch(*SAID, "--num_processes", "2", "loses.py", "0", timeout_s=150)
    assert done.returncode == 1
    text = "CheckpointError: the last save in the background failed: "
    assert [line for line in done.stderr.splitlines() if text in line and "the disk is full" in line]
    assert " failed too, with the same error\n" in done.stderr
    assert "worker.py" not in done.stderr
    assert sorted(path.name for path in scripts.glob("last-*")) == ["last-0", "last-1"]


@pytest.mark.timeout(90)
def test_a_killed_rank_ends_the_run_and_is_named(scripts: Path) -> None:
    done = launch(*SAID, "--num_processes", "2", "killed.py")
    assert done.returncode == 128 + signal.SIGKILL
    lines = done.stderr.splitlines()
    assert lines[0] == "shardwise launch: rank 1 failed first: it was ended by signal 9 (SIGKILL)"
    assert "memory" in lines[1]
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_leaves_no_process(scripts: Path, number: signal.Signals) -> None:
    run, pids = started("--num_processes", "2", "waits.py", processes=2)
    assert len(pids) == 4
    began = time.monotonic()
    run.send_signal(number)
    _, err = run.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert run.returncode == 128 + number
    assert none_left(pids)
    assert "Traceback" not in err


@pytest.mark.timeout(120)
def test_a_second_ctrl_c_kills_ranks_that_ignore_the_first(scripts: Path) -> None:
    run, pids = started("--num_processes", "1", "deaf.py", processes=1)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert alive(pids[0])
    run.send_signal(signal.SIGINT)
    began = time.monotonic()
    run.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert none_left(pids)


@pytest.mark.timeout(120)
def test_ranks_do_not_survive_a_sigkill_of_the_launcher(scripts: Path) -> None:
    run, pids = started("--num_processes", "2", "deaf.py", processes=2)
    run.kill()
    run.communicate(timeout=30)
    assert none_left(pids)


@pytest.mark.timeout(120)
def test_a_failed_rank_that_cannot_leave_is_ended(scripts: Path) -> None:
    began = time.monotonic()
    done = launch("--num_processes", "2", "stays.py")
    assert time.monotonic() - began < 30
    assert done.returncode == 1
    assert "RuntimeError: main thread is gone, another one stays" in done.stderr


@pytest.mark.timeout(90)
def test_a_restart_shows_why_and_goes_on(scripts: Path) -> None:
    done = launch("--max_restarts", "1", "retries.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert "OSError: only at first" in done.stderr


@pytest.mark.timeout(90)
@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.full)])
def test_two_launchers_make_one_run(scripts: Path, backend: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = ["--num_machines", "2", "--num_processes", "2", "--rdzv_backend", backend]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    runs = [
        subprocess.Popen(
            command(*machines, *address, "--machine_rank", rank, "sums.py"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["rank 0 sum 2\n", "rank 1 sum 2\n"]


@pytest.mark.timeout(90)
def test_a_busy_port_is_replaced_with_a_note(scripts: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch(*SAID, "--num_processes", "2", "--main_process_port", str(port), "exits.py", "0")
        assert done.returncode == 0, done.stderr
        assert done.stderr == f"note: main_process_port: {port} is in use; a free port is taken instead.\n"


@pytest.mark.timeout(90)
def test_a_module_and_spawned_workers_find_the_main_module(scripts: Path) -> None:
    for arguments in (["spawns.py"], ["-m", "spawns"]):
        done = launch(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "[42]\n"


@pytest.mark.timeout(120)
def test_other_libraries_train_on_no_rank_of_a_run_that_asked_for_zero(scripts: Path) -> None:
    """Their helpers and arguments stay as they were: the script gets as far as its Trainer."""
    done = launch("--num_processes", "2", "--zero_stage", "3", "foreign.py", timeout_s=100)
    assert done.returncode == 1
    assert done.stdout.count("this run asked for zero_stage 3, but accelerate's Accelerator was made, ") == 2
    assert (
        "ConfigError: this run asked for zero_stage 3, but accelerate's Accelerator was made by transformers' Trainer"
        in (done.stderr)
    )
    assert "from shardwise import Accelerator" in done.stdout


SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a,b"}
EACH = {"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
MACHINES = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29999")


def test_a_launcher_for_each_machine_finds_its_rank_under_srun(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    many = ("--num_processes", "4", "--dry_run")
    found = launch(*many, *MACHINES, "exits.py").stdout
    assert "machine_rank" in found
    assert "rank 2  cpu" in found
    assert "as srun says" in found
    assert "rank 0  cpu" in launch(*many, *MACHINES, "--machine_rank", "0", "exits.py").stdout
    for name, value in EACH.items():
        monkeypatch.setenv(name, value)
    found = launch("--dry_run", "exits.py").stdout  # nobody has told it of machines
    assert "rank 1  cpu  MASTER_ADDR=a MASTER_PORT=" in found
    alone = ("--num_machines", "1", "--dry_run", "exits.py")
    assert "srun starts 2 launchers" not in launch(*alone).stderr  # said by the first
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert (
        "note: srun starts 2 launchers, and --num_machines is 1: each makes a run of its own" in launch(*alone).stderr
    )


def test_a_launcher_for_each_rank_becomes_the_rank(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {
        **SRUN,
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "7",
    }
    for name, value in (step | {"SLURM_LOCALID": "1"}).items():
        monkeypatch.setenv(name, value)
    done = launch("--zero_stage", "2", "show.py", "a $HOME")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["RANK"], shown["LOCAL_RANK"], shown["WORLD_SIZE"], shown["argv"]) == (
        "1",
        "1",
        "2",
        ["show.py", "a $HOME"],
    )
    assert json.loads(shown["SHARDWISE_CONFIG"])["num_processes"] == 2
    refused = launch("--max_restarts", "1", "show.py")
    assert refused.returncode == 2
    assert "max_restarts: has no effect where srun starts a launcher for each rank" in refused.stderr


def test_a_machine_that_is_not_machine_0_is_told_so(scripts: Path) -> None:
    elsewhere = ("--num_machines", "2", "--main_process_ip", "192.0.2.1", "--main_process_port", "29999")
    done = launch("--num_processes", "4", "--dry_run", *elsewhere, "exits.py")
    assert "note: machine_rank is 0, but main_process_ip 192.0.2.1 is no address of this machine." in done.stderr
    assert "machine_rank" not in launch("--num_processes", "4", "--dry_run", *MACHINES, "exits.py").stderr


AS_DEEPSPEED = """
import json, os, sys
import deepspeed
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from accelerate import Accelerator
names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_GRADIENT_CLIPPING")
accelerator = Accelerator()
plugin = accelerator.state.deepspeed_plugin
print(json.dumps([deepspeed.__version__, is_deepspeed_available(), plugin.zero_stage, plugin.gradient_clipping,
    accelerator.num_processes, str(accelerator.distributed_type), *(os.environ[name] for name in names)]), flush=True)
"""


@pytest.mark.timeout(120)
def test_as_deepspeed_gives_accelerate_the_launchers_settings(scripts: Path) -> None:
    (scripts / "zero.py").write_text(AS_DEEPSPEED)
    flags = ["--num_processes", "2", "--zero_stage", "2", "--gradient_clipping", "0.5"]
    done = launch("--as-deepspeed", *flags, "zero.py")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    version = rows[0][0]
    assert version.endswith("+shardwise")
    assert rows == 2 * [[version, True, 2, 0.5, 2, "DistributedType.DEEPSPEED", "true", "2", "0.5"]]
    assert done.stderr.count("this is shardwise, not DeepSpeed") == 1
    assert "gave no model to deepspeed.initialize" in done.stderr


def test_what_ranks_print_is_written_to_files_too(scripts, tmp_path):
    flags = ["--num_processes", "2", "--tee", "3", "--log_dir", str(tmp_path / "logs")]
    ended = launch(*flags, "--monitor_interval", "0.5", str(scripts / "show.py"))
    assert ended.returncode == 0, ended.stderr
    assert "[rank0]:{" in ended.stdout
    written = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")}
    assert {rank: json.loads(text)["RANK"] for rank, text in written.items()} == {"0": "0", "1": "1"}


def test_a_program_runs_without_python(tmp_path):
    program = tmp_path / "program.sh"
    program.write_text('#!/bin/sh\necho "rank $RANK of $WORLD_SIZE: $1"\nexit $2\n')
    program.chmod(0o755)
    flags = ["--num_processes", "2", "--no_python", "--quiet"]
    ended = launch(*flags, str(program), "a $1", "0")
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["rank 0 of 2: a $1", "rank 1 of 2: a $1"]
    failed = launch(*flags, str(program), "a", "3")
    assert failed.returncode == 3
    assert "it ended with exit code 3, without a Python exception" in failed.stderr
