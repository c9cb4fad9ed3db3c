"""What each launched process runs: the user's script as `__main__`, and a record of how it failed.

The launcher starts `python worker.py script.py args...`, by path, so that nothing of shardwise is imported before the
script. The script sees itself exactly as under `python script.py`: `__main__`, `sys.argv`, `sys.path[0]`. What is
added:
  - the process dies with the launcher, even when that is killed with SIGKILL;
  - an exception is written to a record instead of the terminal, with the time in nanoseconds, so that the launcher can
    show the first failing rank's traceback and not every rank's at once;
  - in a run that asked for ZeRO, other libraries' training objects are refused (`config/foreign.py`);
  - a process that cannot leave after a failure (a thread that waits for a dead peer) is ended after a while.
This file imports the standard library only until then, and reads the environment that the launcher wrote for it. What is to
be done in the process before the script is handed to `main`: by `compat/worker.py`, which is started in its place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import runpy
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

REPORTS = "SHARDWISE_REPORTS"  # the directory for records
LAUNCHER = "SHARDWISE_LAUNCHER"  # the launcher's process id
BIND = "SHARDWISE_BIND_CORES"  # set: each process keeps to cores of its own
AS_DEEPSPEED = "SHARDWISE_AS_DEEPSPEED"  # set where compat/worker.py runs in this file's place, for a script that asks
RESTART = "SHARDWISE_RESTART"  # how often all ranks were started again before, where the launcher itself does that
LEAVE_WITHIN_S = 10  # after a failure was recorded
_PR_SET_PDEATHSIG = 1


def main(before: Callable[[], None] | None = None) -> None:
    """`worker.py [-m] script args...`. before: what is done first; its error is recorded like the script's."""
    del sys.argv[0]
    # The names of the file that was started would be cleared when the script takes its place.
    sys.modules["__shardwise_worker__"] = sys.modules["__main__"]
    _die_with_launcher()
    _keep_to_own_cores()
    if RESTART in os.environ:
        # Scripts know the count under torch's name for it.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ[RESTART]
    # The warning before the end of a job: a script that does not listen for it is not ended by it.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, wait_to_be_heard)
    if before is None:
        os.environ.pop(AS_DEEPSPEED, None)  # of a launcher around this one
    reports = os.environ.get(REPORTS, "")
    _write(reports, f"pid-{os.getpid()}", {"rank": _rank()})
    foreign = _watch_foreign_trainers()
    try:
        if before is not None:
            before()
        if sys.argv[0] == "-m":
            del sys.argv[0]
            _run_module(sys.argv[0])
        else:
            _run_script(sys.argv[0])
        _end_well(foreign)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code != 0:
            message = end.code if isinstance(end.code, str) else f"sys.exit({code})"
            _record(reports, kind="exit", message=message, text="", code=code, within_s=LEAVE_WITHIN_S)
            unfinished = _unfinished()
            if unfinished is not None:
                unfinished.keep_exit_code()
            raise
        _end_well(foreign, end.__traceback__)
    except KeyboardInterrupt as error:
        _interrupted(error)
    except BaseException as error:
        _show_at_exit(error)
        _fail(reports, error, within_s=LEAVE_WITHIN_S)
    _settle(reports)


def _settle(reports: str) -> None:
    """Finish what the script has left to its end, a save in the background. An error of it is recorded as one of the script is.

    The rest of the end takes as long as it takes: the script was well, and others have their functions in it.
    """
    unfinished = _unfinished()
    try:
        if unfinished is not None:
            unfinished.settle()
    except KeyboardInterrupt as error:
        _interrupted(error)
    except BaseException as error:
        _fail(reports, error, within_s=0)


def _unfinished() -> types.ModuleType | None:
    """The module that knows what the script has left to its end, where there is any."""
    return sys.modules.get("shardwise.ranks.unfinished")


def _interrupted(error: KeyboardInterrupt) -> NoReturn:
    _show_at_exit(error)
    signal.alarm(LEAVE_WITHIN_S)
    sys.exit(128 + signal.SIGINT)


def _fail(reports: str, error: BaseException, *, within_s: int) -> NoReturn:
    """End with this error, for the launcher to show. within_s: see `_record`."""
    kind = type(error)
    # The frames of this file, and of the one that started it, are not the user's.
    own = {__file__, sys.modules["__shardwise_worker__"].__file__, runpy.__file__, "<frozen runpy>"}
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(kind, error, trace))
    # A hook of the user's (rich, a tracker) is called; torch.distributed's only puts the rank before each line.
    module = getattr(sys.excepthook, "__module__", None) or ""
    own_hook = sys.excepthook is not sys.__excepthook__ and not module.startswith("torch.")
    text = "" if own_hook else text
    _record(reports, kind=kind.__name__, message=str(error), text=text, code=1, within_s=within_s)
    if own_hook:
        with contextlib.suppress(Exception):
            sys.excepthook(kind, error, trace)
    elif not reports:
        sys.stderr.write(text)
    sys.exit(1)


def _watch_foreign_trainers() -> types.ModuleType:
    """`config/foreign.py`, watching. Loaded by its path, under the name by which shardwise will find this very one."""
    name = "shardwise.config.foreign"
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "config", "foreign.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    module.watch()
    return module


def _tell_if_unused(foreign: types.ModuleType) -> None:
    text = foreign.unused() if _rank() == 0 else None
    if text is not None:
        sys.stderr.write(f"shardwise: warning: {text}\n")


def wait_to_be_heard(number: int, frame: types.FrameType | None) -> None:
    """SIGUSR1 is for scripts that listen, and SIGUSR2 for a rank that has joined its run: elsewhere they do nothing."""


def _end_well(foreign: types.ModuleType, trace: types.TracebackType | None = None) -> None:
    """The script is over. trace: of a SystemExit without a code."""
    _tell_if_unused(foreign)
    _tell_others(0, "", trace)


def _tell_others(code: int, words: str, trace: types.TracebackType | None = None) -> None:
    """Let the other ranks know how this one ends, if it is one."""
    watcher = sys.modules.get("shardwise.ranks.watcher")
    if watcher is not None:
        watcher.script_ended(code, words, trace)


def _show_at_exit(error: BaseException) -> None:
    """What the interpreter does with an error that nobody catches: whoever tidies up at the exit sees it."""
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _run_script(path: str) -> None:
    """As `python path`: in a fresh `__main__` that stays until the interpreter ends."""
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    with _working_directory_last(), open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None, __cached__=None)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _run_module(name: str) -> None:
    """As `python -m name`."""
    sys.path[0] = os.getcwd()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def _working_directory_last() -> Iterator[None]:
    """Let a script import what lies in the working directory, but shadow no installed package with it."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    yield


def _die_with_launcher() -> None:
    """Ask the kernel for SIGKILL when the launcher ends: nobody else would stop this process then."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    try:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != int(launcher):  # it ended before the kernel was asked
        os._exit(128 + signal.SIGKILL)


def _keep_to_own_cores() -> None:
    """Bind this process to its share of the cores: neighbours share caches and, mostly, a memory controller."""
    if not os.environ.get(BIND) or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = len(cores) // count
    if share:  # with fewer cores than processes nobody can have one for itself
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])


def _record(reports: str, *, kind: str, message: str, text: str, code: int, within_s: int) -> None:
    """Keep what happened for the launcher, and see to it that this process ends. within_s: seconds; 0 for no limit."""
    now = time.time_ns()
    _tell_others(code, f"exit code {code}" if kind == "exit" else f"{kind}: {message}")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    found = {"rank": _rank(), "kind": kind, "message": message, "traceback": text, "code": code, "time_ns": now}
    _write(reports, f"failure-{attempt}-{_rank()}", found)
    if int(attempt) < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        # The launcher goes on after this, so it is told now.
        sys.stderr.write(f"rank {_rank()} failed; all ranks start again.\n{text or f'{kind}: {message}'}\n")
    if within_s:  # SIGALRM's default action ends the process even while it waits in C++ for peers
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(within_s)


def _write(reports: str, name: str, content: dict[str, Any]) -> None:
    if not reports:
        return
    with contextlib.suppress(OSError):  # the directory is gone once the launcher has given up
        part = os.path.join(reports, f".{name}")
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(part, os.path.join(reports, name))


if __name__ == "__main__":
    main()
