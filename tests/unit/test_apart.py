"""A process of its own sums up and writes what is in memory; it says what went wrong, and outlives nobody."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import textwrap
import zlib
from itertools import pairwise
from pathlib import Path

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
    path, memory, told = tmp_path / "file", filled(), []
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
        ("/bin/true", "ended with 0|Broken pipe"),
        ("/bin/echo", "it said|Broken pipe"),
    ],
)
def test_where_there_is_no_such_process_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    memory = filled()
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(NoProcessError, match=words):
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


STARTER = """
    import os, subprocess, sys
    memory = os.memfd_create("one")
    os.ftruncate(memory, 4096)
    command = [sys.executable, "-P", "-c", "from shardwise.files.apart import main; main()", str(memory)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(memory,), start_new_session=True)
    child.stdin.write(b'{"path": "%s", "threads": 1, "stretches": [[0, 0, [4096]]]}\\n' % sys.argv[1].encode())
    child.stdin.flush()
    os.kill(os.getpid(), 9)
"""


def test_it_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    """Here it is held up by a pipe that nobody reads; what it has inherited is closed when it is gone."""
    os.mkfifo(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STARTER), str(tmp_path / "pipe")],
        stdout=subprocess.PIPE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(apart.__file__).parents[2])},
        timeout=30,
    )
    assert done.returncode == -9
    assert done.stdout == b""
