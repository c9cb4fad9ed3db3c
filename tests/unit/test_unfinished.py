"""What fails behind a script's last line is the exit code of its process, and changes nothing else of how the process ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# A script with work that goes on behind it and fails there, and functions of others that are registered for the end.
SCRIPT = """
    import atexit, os, signal, sys, threading
    from shardwise.ranks import unfinished

    def work():
        threading.main_thread().join()
        error = OSError("the disk is full")
        unfinished.owe(error)

    before = threading.Thread(target=work)
    unfinished.follow(before)
    atexit.register(lambda: print("another's end", flush=True))
    atexit.register(lambda: getattr(sys.stderr, "write", len)("and its stderr\\n"))
    before.start()
"""
ENDS = {
    "": (120, ""),
    "sys.exit()": (120, ""),
    "sys.exit(0)": (120, ""),
    "sys.exit(3)": (120, ""),
    "unfinished.keep_exit_code(); sys.exit(3)": (3, ""),
    "sys.exit('words')": (120, "words\n"),
    "raise SystemExit(3)": (120, ""),
    "raise SystemExit": (120, ""),
    "raise ValueError('its own')": (1, "Traceback"),
    "raise KeyboardInterrupt": (-2, "Traceback"),
    "sys.stderr = None": (120, None),
    "sys.stderr.close()": (120, None),
}


def _ended(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("end", ENDS)
def test_only_the_exit_code_tells_of_it_and_only_where_the_script_has_none(end):
    code, words = ENDS[end]
    done = _ended(f"{textwrap.dedent(SCRIPT)}\n{end}\n")
    assert done.returncode == code, done.stderr
    assert done.stdout == "another's end\n"
    if words == "Traceback":
        assert done.stderr.startswith(words)
        assert done.stderr.endswith("and its stderr\n")
    elif words is not None:
        assert done.stderr == f"{words}and its stderr\n"


def _exit_code(rest: str) -> int:
    script = textwrap.dedent(SCRIPT).replace("    threading.main_thread().join()\n", "")
    return _ended(f"{script}\nbefore.join()\n{textwrap.dedent(rest)}").returncode


def test_an_error_that_was_told_is_none_of_the_end():
    assert _exit_code("unfinished.told(*unfinished.owed())") == 0


def test_a_forked_process_ends_with_its_own_exit_code():
    assert _exit_code("pid = os.fork()\nif pid: os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) + 7)") == 7


def test_who_runs_a_script_has_the_error_raised_and_the_end_is_as_always():
    rest = """
        def last():
            raise ConnectionError("nobody takes numbers")
        unfinished.AtEnd("the last line", last)
        unfinished.AtEnd("nothing", last).cancel()
        try:
            unfinished.settle()
        except OSError:
            unfinished.settle()
        else:
            sys.exit(1)
    """
    assert _exit_code(rest) == 0


def test_what_is_called_at_the_end_and_fails_is_the_exit_code_too():
    rest = """
        unfinished.told(*unfinished.owed())
        def last():
            print("last", flush=True)
            raise ConnectionError("nobody takes numbers")
        unfinished.AtEnd("The last line", last)
    """
    script = textwrap.dedent(SCRIPT).replace("    threading.main_thread().join()\n", "")
    done = _ended(f"{script}\nbefore.join()\n{textwrap.dedent(rest)}")
    assert done.returncode == 120
    assert done.stdout == "last\nanother's end\n"
    assert "The last line: ConnectionError: nobody takes numbers\n" in done.stderr


def test_an_interrupt_of_the_wait_for_what_goes_on_is_told():
    text = """
        import os, signal, threading, time
        from shardwise.ranks import unfinished

        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it

        def interrupt():
            threading.main_thread().join()
            time.sleep(0.5)  # until it waits: a signal just before that is seen behind the wait
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=time.sleep, args=(5,))
        unfinished.follow(thread)
        thread.start()
        threading.Thread(target=interrupt, daemon=True).start()
    """
    done = _ended(textwrap.dedent(text))
    assert done.returncode == 120, done.stderr
    assert "it is not complete" in done.stderr


@pytest.mark.parametrize(
    ("owed", "everywhere"),
    [
        ("unfinished.owe(OSError('full'), everywhere=True)", True),
        ("unfinished.owe(OSError('a tracker of this rank'))", False),
        (
            "error = OSError('full'); error.__cause__ = RankError('one is gone'); unfinished.owe(error, everywhere=True)",
            False,
        ),
        ("sys.last_value = ValueError('its own'); unfinished.owe(OSError('full'), everywhere=True)", False),
    ],
)
def test_the_ranks_wait_for_each_other_only_where_each_has_the_error(owed, everywhere):
    found = "from shardwise.errors import RankError\nunfinished.told(*unfinished.owed())\n{}\nos._exit({} + 7)"
    assert _exit_code(found.format(owed, "unfinished.failed_everywhere()")) == 7 + everywhere
