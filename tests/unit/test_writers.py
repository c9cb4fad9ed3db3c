"""The threads of a save: their errors, and that they begin also behind the end of the script."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from shardwise.checkpoint.writers import Writers


def test_all_have_ended_and_the_first_error_is_raised() -> None:
    done: list[int] = []
    late = threading.Event()

    def fail() -> None:
        raise OSError("the disk's")

    def work() -> None:
        assert late.wait(10)
        done.append(1)

    def four() -> None:
        with Writers("one") as threads:
            threads.start(1, fail)
            threads.start(3, work)
            late.set()

    def own() -> None:
        with Writers("two") as threads:
            threads.start(1, fail)
            raise ValueError("own")

    with pytest.raises(OSError, match="the disk's"):
        four()
    assert len(done) == 3
    with pytest.raises(ValueError, match="own"):
        own()


LATE = """
import concurrent.futures.thread, threading, time
from shardwise.checkpoint.writers import Writers

def save():
    time.sleep(0.3)  # until the main thread has ended
    assert not threading.main_thread().is_alive()
    with Writers("late") as threads:
        threads.start(2, lambda: print("written", flush=True))

threading.Thread(target=save).start()
"""


def test_they_begin_while_the_interpreter_ends() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["written"] * 2, "")
