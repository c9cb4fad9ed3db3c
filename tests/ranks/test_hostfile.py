"""`shardwise launch --hostfile`: a launcher on each host through ssh, for which a script stands in that runs the line here."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENTRY = "from shardwise.cli.main import main; main()"
SSH = """#!/bin/sh
# ssh HOST LINE, on this machine. Like ssh it knows nothing of this environment.
test "$1" = -p && shift 2
host=$1
test "$host" = unreachable && { echo "ssh: no route to $host" >&2; exit 255; }
exec env -i PATH="$PATH" HOME="$HOME" TMPDIR="$TMPDIR" HOST="$host" sh -c "$2"
"""
SCRIPT = """
import os, sys, time
words = [os.environ[name] for name in ("HOST", "RANK", "WORLD_SIZE")]
print(*words, os.environ.get("GIVEN"), sys.argv[2:], os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(7 if len(sys.argv) > 2 and sys.argv[2] == os.environ["HOST"] else 0)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a dir").mkdir()
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.chdir(tmp_path / "a dir")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHARDWISE_SSH", f"{tmp_path}/ssh -p 2222")
    Path("hosts").write_text("# our machines\nalpha slots=1\n\nbeta slots=1  # the other one\n")
    Path("show.py").write_text(SCRIPT)
    Path(".deepspeed_env").write_text("GIVEN=a value; with 'quotes'\n")
    return tmp_path


def command(*arguments: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return [sys.executable, "-c", ENTRY, "launch", "--use_cpu", "--hostfile", "hosts", *place, *arguments]


@pytest.mark.timeout(200)
def test_each_host_runs_its_part_and_its_lines_have_its_name(folder):
    done = subprocess.run(command("show.py", "0", "", "$HOME it's"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = sorted(line.rsplit(" ", 1)[0] for line in done.stdout.splitlines())
    assert lines == [
        f"{host}: {host} {rank} 2 a value; with 'quotes' ['', \"$HOME it's\"]"
        for rank, host in enumerate(("alpha", "beta"))
    ]
    assert "beta: shardwise launch: machine 1 waits for machine 0 at 127.0.0.1" in done.stderr
    assert not list(folder.glob("shardwise-*"))


@pytest.mark.full
@pytest.mark.timeout(200)
def test_the_first_host_that_fails_is_named_and_ends_all(folder):
    done = subprocess.run(command("show.py", "0", "beta"), capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "machine 1 (" in done.stderr
    assert "ended first, with exit code 7" in done.stderr
    Path("hosts").write_text("alpha slots=1\nunreachable slots=1\n")
    began = time.monotonic()
    slow = command("show.py", "0")
    slow[2] = "from shardwise.cli import ssh; ssh.ENDS_BY_ITSELF_S = 1.0; " + ENTRY
    done = subprocess.run(slow, capture_output=True, text=True, check=False)
    assert (done.returncode, time.monotonic() - began < 60) == (255, True)
    assert "unreachable: ssh: no route to unreachable" in done.stderr
    assert "unreachable ended first, with exit code 255, which is ssh's own where it has no connection" in done.stderr


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_on_the_hosts_when_this_end_is_stopped(folder, number):
    run = subprocess.Popen(command("show.py", "600"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pids = [int(run.stdout.readline().split()[-1]) for _ in range(2)]
    run.send_signal(number)
    run.communicate(timeout=60)
    assert run.returncode == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 40
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "hosts: names no host"),
        ("a slots=2\na slots=2\n", "hosts:2: a is there twice"),
        ("a slots=two\n", "hosts:1: 'a slots=two' is not `HOST slots=N`"),
        ("-oProxyCommand=x slots=1\n", "is not `HOST slots=N`"),
        ("a;b slots=1\n", "is not `HOST slots=N`"),
        ("a slots=2\nb slots=4\n", "a has slots=2 and b slots=4"),
    ],
)
def test_a_hostfile_that_is_wrong_is_one_error(folder, text, error, capsys):
    from shardwise.cli.main import run

    Path("hosts").write_text(text)
    assert run(["launch", "--use_cpu", "--hostfile", "hosts", "show.py"]) == 2
    assert error in capsys.readouterr().err
    assert capsys.readouterr().err.count("\n") <= 1


def test_hosts_that_do_not_fit_the_flags_are_one_error(folder, capsys):
    from shardwise.cli.main import run

    hosts = ["launch", "--use_cpu", "--hostfile", "hosts", "--main_process_ip", "10.0.0.1"]
    for flags, error in (
        (["--num_processes", "3"], "--num_processes 3: the hosts have 2 slots"),
        (["--env_file", "absent"], "absent"),
        (["--ssh", ""], "--ssh: is empty"),
        (["--slurm_script", "x"], "--hostfile and --slurm_script contradict each other"),
    ):
        assert run([*hosts, *flags, "show.py"]) == 2
        assert error in capsys.readouterr().err
