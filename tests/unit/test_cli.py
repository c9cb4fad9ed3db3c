"""The command's promises: a mistake is one line and exit code 2, told before torch is imported, within a second."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.cli.flags import FLAGS
from shardwise.cli.main import run
from shardwise.config.schema import key_of

ENTRY = "from shardwise.cli.main import main; main()"


@pytest.fixture(autouse=True)
def no_gpu_and_no_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit(0)\n", encoding="utf-8")


def shardwise(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_every_flag_is_a_setting() -> None:
    assert all(key_of(flag.name)[-1] == flag.name for flag in FLAGS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num_proceses", "2", "train.py"], "--num_proceses: unknown flag; did you mean --num_processes?"),
        (["--zero_stage", "5", "--use_cpu", "train.py"], "--zero_stage: '5' is not one of 0, 1, 2, 3"),
        (["--zero-stage", "two", "--cpu", "train.py"], "--zero_stage: 'two' is not one of"),
        (["--use_cpu", "trian.py"], "trian.py: there is no such script; did you mean train.py?"),
        (["--use_cpu", "-m", "no_such_module"], "no_such_module: there is no such module"),
        (["--use_cpu", "."], ".: is a directory, not a script"),
        (["--config_file", "no.yaml", "train.py"], "no.yaml: there is no such file"),
        (["train.py"], "no CUDA device was found on this machine; add --use_cpu"),
        (["--use_cpu", "--max_restarts", "-1", "train.py"], "--max_restarts: -1 is out of range"),
        (["--multi_gpu", "--use_deepspeed", "train.py"], "contradict"),
        (["--use_cpu"], "missing argument 'SCRIPT'"),
        (["--zero_stage", "2", "--offload_param_device", "cpu", "--use_cpu", "train.py"], "needs zero_stage 3"),
        (["--use_cpu", "--num_machines", "2", "--num_processes", "2", "train.py"], "main_process_ip"),
    ],
)
def test_a_mistake_is_an_error_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    code, out, err = shardwise(capsys, "launch", *arguments)
    assert code == 2
    assert out == ""
    assert any(text in line for line in err), err
    assert all(line.startswith("error: ") for line in err)


def test_the_command_of_a_package_is_found_and_no_other_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"tune": "#!/usr/bin/python3\nimport tuner\n", "tool": "#!/bin/bash\ntrue\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    _, _, err = shardwise(capsys, "launch", "--use_cpu", "tune", "train", "x.yaml")
    assert err == [f"error: tune: there is no such script; did you mean {folder / 'tune'}?"]
    _, _, err = shardwise(capsys, "launch", "--use_cpu", "tool")
    assert err == ["error: tool: there is no such script"]
    with monkeypatch.context() as patch:  # one that may be run and not be read, as sudo
        patch.setattr("os.access", lambda path, mode: mode != os.R_OK)
        _, _, err = shardwise(capsys, "launch", "--use_cpu", "tune")
        assert err == ["error: tune: there is no such script"]
    assert shardwise(capsys, "launch", "--use_cpu", "--dry-run", str(folder / "tune"), "train")[0] == 0


def test_mistakes_in_settings_and_script_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = shardwise(capsys, "launch", "--zero_stage", "5", "--num_processes", "x", "no.py")
    assert len(err) == 3


def test_more_processes_than_gpus_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardwise.cli.launch_plan.visible_gpus", lambda ids: 2)
    code, _, err = shardwise(capsys, "launch", "--num_processes", "8", "train.py")
    assert code == 2
    assert err == [
        "error: --num_processes: 8 processes need as many GPUs, but there are 2; ask for 2, or add --use_cpu"
    ]
    code, out, _ = shardwise(capsys, "launch", "--dry-run", "train.py")
    assert code == 0
    assert "rank 1  cuda:1" in out
    assert "MULTI_GPU" in out


def test_dry_run_shows_each_value_with_its_origin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n", encoding="utf-8")
    arguments = ["--config_file", str(file), "--use_cpu", "--num-processes", "2", "--reduce_dtype", "bf16", "--dry-run"]
    code, out, _ = shardwise(capsys, "launch", *arguments, "train.py", "--lr", "1e-3", "--", "-x")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 2}
    assert rows["deepspeed_config.zero_stage"] == ["2", f"{file}:3"]
    assert rows["num_processes"] == ["2", "--num_processes"]
    assert rows["shardwise_config.reduce_dtype"] == ["bf16", "--reduce_dtype"]
    assert rows["machine_rank"] == ["0", "default"]
    assert "OMP_NUM_THREADS=" in out
    assert "SHARDWISE_CONFIG={" in out
    assert "train.py --lr 1e-3 -- -x" in out


def test_the_users_default_file_is_read_and_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert shardwise(capsys, "config", "--default", "--zero_stage", "1", "--use_cpu")[0] == 0
    path = tmp_path / "cache" / "shardwise" / "default_config.yaml"
    assert path.is_file()
    _, out, err = shardwise(capsys, "launch", "--dry-run", "train.py")
    assert f"{path}:" in out
    assert err == [f"shardwise launch: settings of {path}"]


def test_threads_are_never_torchruns_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.cli.launch_plan.usable_cores", lambda: 32)
    for processes, threads in (("1", 32), ("8", 4), ("64", 1)):
        _, out, _ = shardwise(capsys, "launch", "--use_cpu", "--num_processes", processes, "--dry-run", "train.py")
        assert f"OMP_NUM_THREADS={threads}\n" in out
    _, out, _ = shardwise(capsys, "launch", "--use_cpu", "--threads_per_rank", "3", "--dry-run", "train.py")
    assert "OMP_NUM_THREADS=3\n" in out
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _, out, _ = shardwise(capsys, "launch", "--use_cpu", "--dry-run", "train.py")
    assert "OMP_NUM_THREADS=7  (as set outside)" in out


def test_env_prints_versions_and_the_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("distributed_type: NO  # mine\n", encoding="utf-8")
    code, out, _ = shardwise(capsys, "env", "--config_file", str(file))
    assert code == 0
    for word in ("shardwise", "python", "torch", "transformers", "cpu cores", "memory", "gpus", "# mine"):
        assert word in out
    assert shardwise(capsys, "env", "--config_file", "no.yaml")[0] == 2


def test_a_wrong_command_names_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = shardwise(capsys, "lunch")
    assert code == 2
    assert "launch" in err[0]


def test_nothing_heavy_is_imported_before_the_checks_pass(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom shardwise.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        "assert run(['launch', '--use_cpu', '--zero_stage', '3', '--dry-run', 'train.py']) == 0\n"
        "assert run(['launch', '--zero_stage', '5', 'none.py']) == 2\n"
        "assert run(['env']) == 0\n"
        "assert run(['estimate', 'config.json', '--zero_stage', '5']) == 2\n"
        "assert run(['config', '--default', '--config_file', 'x.yaml']) == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'accelerate', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_mistake_is_told_within_a_second(tmp_path: Path) -> None:
    for arguments, expected in ((["launch", "--zero_stage", "5", "none.py"], 2), (["--help"], 0)):
        seconds = []
        for _ in range(3):
            # Processor time: other processes share this machine, and their work is not this command's.
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-c", ENTRY, *arguments]
            done = subprocess.run(command, capture_output=True, timeout=60, cwd=tmp_path, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == expected, done.stderr
        assert min(seconds) < 1.0, seconds
