"""A process of its own sums up and writes what is in memory; it says what went wrong, and outlives nobody."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.files import apart, disk
from shardwise.files.apart import NoProcessError, Stretch, write_apart
from shardwise.offload.pinned import SharedMemory, shared_memory

NBYTES = 1_000_003


def filled() -> SharedMemory:
    made = shared_memory(NBYTES, pinned=False)
    made.tensor.copy_(torch.randint(0, 256, (NBYTES,), dtype=torch.uint8))
    return made


def cut(memory: SharedMemory, start: int) -> list[Stretch]:
    """All of it as stretches of some parts each, out of order, for a file in which it begins at `start`."""
    draw = random.Random(1)
    cuts = [0, *sorted(draw.sample(range(1, NBYTES), 40)), NBYTES]
    parts = [b - a for a, b in pairwise(cuts)]
    found: list[Stretch] = []
    at = 0
    while parts:
        some, parts = parts[:3], parts[3:]
        found.append((memory.begin + at, start + at, some))
        at += sum(some)
    draw.shuffle(found)
    return found


def sums_of(memory: SharedMemory, stretches: list[Stretch]) -> list[list[int]]:
    data, found = memory.tensor.numpy().tobytes(), []
    for begin, _, parts in stretches:
        at, own = begin - memory.begin, []
        for nbytes in parts:
            own.append(zlib.crc32(data[at : at + nbytes]))
            at += nbytes
        found.append(own)
    return found


@pytest.mark.parametrize("start", [0, 517])
def test_the_file_has_the_bytes_and_the_sums_are_theirs(tmp_path: Path, start: int) -> None:
    path, memory = tmp_path / "file", filled()
    told: list[int] = []
    os.close(disk.create(path, start + NBYTES))
    stretches = cut(memory, start)
    assert write_apart(path, memory.descriptor, stretches, 3, told.append) == sums_of(memory, stretches)
    assert path.read_bytes()[start:] == memory.tensor.numpy().tobytes()
    assert sum(told) == NBYTES


def test_its_error_is_raised_here(tmp_path: Path) -> None:
    memory = filled()
    with pytest.raises(FileNotFoundError) as caught:
        write_apart(tmp_path / "gone", memory.descriptor, cut(memory, 0), 2, lambda nbytes: None)
    assert caught.value.filename == str(tmp_path / "gone")
    with pytest.raises(OSError, match="No space left") as full:
        write_apart(Path("/dev/full"), memory.descriptor, cut(memory, 0), 2, lambda nbytes: None)
    assert full.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/nowhere/python", "No such file"),
        ("/bin/true", "ended with 0"),
        ("/bin/echo", "it said"),
        ("", "not known which Python"),
        (None, "not known which Python"),
    ],
)
def test_where_there_is_no_such_process_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, words: str
) -> None:
    memory = filled()
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(NoProcessError, match=words):
        write_apart(tmp_path / "file", memory.descriptor, cut(memory, 0), 2, lambda nbytes: None)


def test_a_program_that_is_started_again_and_never_speaks_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python is part of another program, `sys.executable` may be that."""
    (tmp_path / "program").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))
    monkeypatch.setattr(apart, "_BEGINS_WITHIN", 0.2)
    memory = filled()
    with pytest.raises(NoProcessError, match=r"said nothing for 0\.2 s"):
        write_apart(tmp_path / "file", memory.descriptor, cut(memory, 0), 2, lambda nbytes: None)


def test_a_directory_of_scripts_gets_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's directory may have a json.py."""
    monkeypatch.chdir(tmp_path)
    for name in ("json.py", "mmap.py", "shardwise.py"):
        (tmp_path / name).write_text("raise SystemExit('taken')")
    memory = filled()
    os.close(disk.create(tmp_path / "file", NBYTES))
    stretches = cut(memory, 0)
    assert write_apart(tmp_path / "file", memory.descriptor, stretches, 1, lambda nbytes: None) == sums_of(
        memory, stretches
    )


def test_a_script_that_dies_of_a_broken_pipe_does_not_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    memory = filled()
    earlier = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with pytest.raises(NoProcessError, match="ended with 0"):
            write_apart(tmp_path / "file", memory.descriptor, cut(memory, 0), 1, lambda nbytes: None)
    finally:
        signal.signal(signal.SIGPIPE, earlier)


@pytest.mark.parametrize("words", ["5", "null", "{}", "[1]", "hello"])
def test_what_an_environment_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"print({words!r}, flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    memory = filled()
    with pytest.raises(NoProcessError, match="it said"):
        write_apart(tmp_path / "file", memory.descriptor, cut(memory, 0), 1, lambda nbytes: None)


def test_an_error_that_is_not_the_disks_is_no_error_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """This process may have the memory and the threads that the other one has not; nor does it leave a traceback."""
    (tmp_path / "sitecustomize.py").write_text("import os\ndef none(*_): raise MemoryError('none')\nos.pwrite = none")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    memory = filled()
    os.close(disk.create(tmp_path / "file", NBYTES))
    with pytest.raises(NoProcessError, match="MemoryError"):
        write_apart(tmp_path / "file", memory.descriptor, cut(memory, 0), 1, lambda nbytes: None)
    read, write = os.pipe()  # no memory to map
    with pytest.raises(NoProcessError, match="OSError"):
        write_apart(tmp_path / "file", read, cut(memory, 0), 1, lambda nbytes: None)
    os.close(read)
    os.close(write)
    assert capfd.readouterr().err == ""


def test_what_was_told_of_one_that_was_killed_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import os, time\nplain = os.pwrite\ndef pwrite(*a):\n    time.sleep(0.1)\n    return plain(*a)\nos.pwrite = pwrite"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[subprocess.Popen[bytes]] = []
    plain = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(plain(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    told: list[int] = []

    def advance(nbytes: int) -> None:
        told.append(nbytes)
        if nbytes > 0:
            os.kill(started[0].pid, 9)

    memory = filled()
    os.close(disk.create(tmp_path / "file", NBYTES))
    with pytest.raises(NoProcessError, match="ended with -9"):
        write_apart(tmp_path / "file", memory.descriptor, cut(memory, 0), 1, advance)
    assert max(told) > 0
    assert sum(told) == 0


def test_it_is_of_the_same_files_whatever_else_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may have this package from its own sys.path, and another version is where each Python finds it."""
    (tmp_path / "shardwise" / "files").mkdir(parents=True)
    for name in ("__init__.py", "files/__init__.py"):
        (tmp_path / "shardwise" / name).touch()
    (tmp_path / "shardwise" / "files" / "apart.py").write_text("def main(): print('{\"sums\": []}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    memory = filled()
    os.close(disk.create(tmp_path / "file", NBYTES))
    stretches = cut(memory, 0)
    assert write_apart(tmp_path / "file", memory.descriptor, stretches, 1, lambda nbytes: None) == sums_of(
        memory, stretches
    )


STARTER = """
    import os, subprocess, sys, time
    memory = os.memfd_create("one")
    os.ftruncate(memory, 4096)
    command = [sys.executable, "-P", "-c", "from shardwise.files.apart import main; main()", str(memory)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(memory,), start_new_session=True)
    child.stdin.write(b'{"path": "%s", "threads": 1, "stretches": [[0, 0, [4096]]], "parent": %d}\\n'
                      % (sys.argv[1].encode(), os.getpid()))
    child.stdin.flush()
    holder = os.fork() if "held" in sys.argv else 1
    if not holder:  # it has all that this one has open but for its output
        os.close(1)
        time.sleep(60)
    if "held" in sys.argv:
        print(holder, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("held", [[], ["held"]])
def test_it_ends_with_the_process_that_has_started_it(tmp_path: Path, held: list[str]) -> None:
    """Here it is held up by a pipe that nobody reads; what it has inherited is closed when it is gone.

    held: by a process that was forked meanwhile, as a loader's workers are, and lives on with the pipes of the other.
    """
    os.mkfifo(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STARTER), str(tmp_path / "pipe"), *held],
        stdout=subprocess.PIPE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(apart.__file__).parents[2])},
        timeout=30,
    )
    assert done.returncode == -9
    holders = [int(line) for line in done.stdout.splitlines() if not line.startswith(b"{")]
    assert len(holders) == len(held)
    for holder in holders:
        os.kill(holder, 9)
