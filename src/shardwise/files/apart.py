"""Memory that several processes see is summed up and written to a file by a process of its own.

    this process    buffer (a nameless file in memory) ---- plan ---->
                          |  the same pages            <--- progress, sums or an error ----
    the other             +--> CRC-32 of each part, and the write, past the page cache, by some threads

Threads that sum up and write do without the interpreter, but they ask for it between any two calls, and each time the thread
that trains waits for it: 0.1 ms on a virtual machine, thousands of times in a save (docs/log.md). Another process has an
interpreter of its own. It imports nothing but this package's files and the standard library.

It ends with its work, or with the process that has started it, however that ends: the pipe to it closes, or, where a process
forked meanwhile holds that open, the parent is another one.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from .past_cache import PastCache

# (where it begins in the memory, where in the file, the bytes of each part that has a sum of its own)
Stretch = tuple[int, int, Sequence[int]]

_TELLS_EVERY = 0.25  # seconds
_BEGINS_WITHIN = 60.0  # seconds; a program that holds Python may be started again instead, and never speak
_HERE = {"here": True}  # said first, and waited for: it is this program that has started

# This package and no other: where a script has found it in its own way, another version may be installed. What else lies beside
# it comes behind the standard library, or not at all.
_START = """
import sys
from importlib import machinery, util
spec = machinery.PathFinder.find_spec({name!r}, [{path!r}])
sys.modules[{name!r}] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
from {module} import main
main()
"""


class NoProcessError(Exception):
    """There is no such process, or it ended without having written all. What it was to write is still in memory."""


def write_apart(
    path: Path, memory: int, stretches: Sequence[Stretch], threads: int, advance: Callable[[int], None]
) -> list[list[int]]:
    """Write stretches of a memory to the file `path`, which is there, by another process; gives the sums of their parts.

    memory: a descriptor of it. advance: called with the number of bytes that were written since the last time.
    Raises OSError as the other process met it, NoProcessError.
    """
    if not sys.executable:
        raise NoProcessError("it is not known which Python runs this")
    name, _, _ = __name__.partition(".")
    start = _START.format(name=name, path=str(Path(__file__).resolve().parents[2]), module=__name__)
    command = [sys.executable, "-P", "-c", start, str(memory)]  # -P: nothing of the directory that this is in
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(memory,),
            bufsize=0,  # else closing the pipe of one that has ended raises what its last bytes met
            start_new_session=True,  # a signal to the whole group is for those who train
        )
    except OSError as error:
        raise NoProcessError(str(error)) from error
    with process:
        try:
            plan = {"path": str(path), "threads": threads, "stretches": stretches, "parent": os.getpid()}
            return _asked(process, plan, advance)
        finally:
            process.kill()  # without effect on one that has ended


def _asked(process: subprocess.Popen[bytes], plan: dict[str, Any], advance: Callable[[int], None]) -> list[list[int]]:
    assert process.stdout is not None
    first = select.poll()  # not select, which knows no descriptors above 1023
    first.register(process.stdout, select.POLLIN)
    if not first.poll(_BEGINS_WITHIN * 1000):
        raise NoProcessError(f"it said nothing for {_BEGINS_WITHIN:g} s")
    advanced = 0
    with io.BufferedReader(process.stdout) as lines:  # type: ignore[type-var]
        line = lines.readline()
        if _read(line) == _HERE:
            _give(process, plan)
            line = lines.readline()
        while line:
            match _read(line):
                case {"written": int(nbytes)}:
                    advanced += nbytes
                    advance(nbytes)
                case {"errno": number, "words": words}:
                    raise OSError(number, words, plan["path"])
                case {"sums": sums}:
                    return cast("list[list[int]]", sums)
                case {"failed": str(words)}:
                    why = words
                    break
                case _:  # an environment may have its say in each Python that starts
                    why = f"it said {line[:80]!r}"
                    break
            line = lines.readline()
        else:
            why = f"it ended with {process.wait()}"
    advance(-advanced)  # all of it is to be written by somebody else
    raise NoProcessError(why)


def _give(process: subprocess.Popen[bytes], plan: dict[str, Any]) -> None:
    """Only to one that is there: where a script has signals of its own, writing to no one may end this process."""
    assert process.stdin is not None
    try:
        words = memoryview(json.dumps(plan).encode() + b"\n")
        while words:
            words = words[process.stdin.write(words) :]
    except OSError as error:
        raise NoProcessError(str(error)) from error


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


# In the other process.


class _Work:
    """The stretches, for some threads to take from."""

    def __init__(self, memory: memoryview, plan: dict[str, Any]) -> None:
        self.memory = memory
        self.plan = plan
        self.sums: list[list[int]] = [[] for _ in plan["stretches"]]
        self.written = 0
        self._lock = threading.Lock()
        self._left: Iterator[tuple[int, Stretch]] = enumerate(plan["stretches"])

    def run(self, past: PastCache) -> None:
        while True:
            with self._lock:
                number, stretch = next(self._left, (-1, (0, 0, ())))
            if number < 0:
                return
            begin, offset, parts = stretch
            at = begin
            for nbytes in parts:
                self.sums[number].append(zlib.crc32(self.memory[at : at + nbytes]))
                at += nbytes
            past.write(self.memory[begin:at], offset)
            with self._lock:
                self.written += at - begin

    def take_written(self) -> int:
        with self._lock:
            written, self.written = self.written, 0
        return written


def _do(work: _Work) -> None:
    path = Path(work.plan["path"])
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    past = PastCache(path, descriptor)
    try:
        with ThreadPoolExecutor(work.plan["threads"]) as threads:
            under_way = [threads.submit(work.run, past) for _ in range(work.plan["threads"])]
            while not all(one.done() for one in under_way):
                time.sleep(_TELLS_EVERY if work.written else 0.01)
                _tell({"written": work.take_written()})
        for one in under_way:
            one.result()
        past.finish()
    finally:
        past.close()
        os.close(descriptor)


def _tell(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        told, _, _ = select.select([sys.stdin], [], [], _TELLS_EVERY)
        if told and not os.read(sys.stdin.fileno(), 1):
            break
    os._exit(1)


def main() -> None:
    """Take a plan from standard input and carry it out."""
    _tell(_HERE)
    plan = json.loads(sys.stdin.readline())
    try:
        threading.Thread(target=_end_with, args=(plan["parent"],), daemon=True).start()
        memory = mmap.mmap(int(sys.argv[1]), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except Exception as error:  # not the disk's
        _tell({"failed": repr(error)})
        os._exit(1)
    work = _Work(memoryview(memory), plan)
    try:
        _do(work)
    except OSError as error:
        _tell({"errno": error.errno, "words": error.strerror or str(error)})
    except Exception as error:  # of memory, or threads: the other process may have them
        _tell({"failed": repr(error)})
    else:
        _tell({"written": work.take_written()})
        _tell({"sums": work.sums})
    sys.stdout.flush()
    os._exit(0)  # views of the memory are still about
