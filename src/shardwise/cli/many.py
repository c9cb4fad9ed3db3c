"""A run over several machines: each has a launcher, the launchers meet before every start, and fail or go on together.

Torch's agent starts and watches the ranks of this machine, once an attempt. What is compared before, who is waited for, which
machine failed first and whether all start again is agreed on by the launchers (`machines.py`, over `link.py`), because an agent
learns of another machine only what its own ranks meet: a connection that is closed, or nothing for ten minutes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config.agreement import settings_of
from ..errors import LaunchError
from .agent import clear, end_sessions, launch_once
from .failures import Failure, explain, failures_of, headline
from .launch_plan import LaunchPlan
from .link import Link, Seat, say
from .machines import DONE, END, FAILED, State

# Of a failure, the smaller the likelier is it the cause: see `machines.Said`.
_KILLED, _ERROR, _ECHO, _ENDED = range(4)
_TORCHS_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "connectFullMesh",
)
_KILL_AFTER_S = 10.0


def run(plan: LaunchPlan, directory: Path, kills_before: int | None) -> int:
    """Run this machine's part to the end of the run; the exit code, which is the same on every machine.

    Raises ConfigError if the machines were told different things, LaunchError if one does not come or the run cannot go on.
    """
    config = plan.config
    seat = Seat(config.machine_rank, config.num_machines, plan.address, plan.port, plan.max_restarts)
    link = Link(seat, facts_of(plan), hints_of(plan), _Ending(directory))
    _leave_agents_without_waiting()
    _leave_by_signals()
    try:
        link.open()
        while True:
            attempt = link.start()
            failures = _attempt(link, plan, directory, attempt)
            _leave_by_signals()
            state = link.settled()
            clear(directory)
            if state is None:
                _without_machine_0(link, seat, attempt, failures, plan, kills_before)
            elif state.phase == END:
                return _ended(state, seat, failures, plan, kills_before)
            else:
                left = plan.max_restarts - state.attempt
                if failures and state.at == seat.machine:
                    explain(failures, plan, kills_before)
                say(f"{state.cause}; all machines start again; {left} restart(s) left")
    finally:
        link.close()


def _attempt(link: Link, plan: LaunchPlan, directory: Path, attempt: int) -> list[Failure]:
    """Start this machine's ranks, and report how they ended."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        code = launch_once(plan, directory, attempt)
    except ChildFailedError as error:
        failures = failures_of(error, directory, attempt)
        first = failures[0]
        link.report(
            FAILED,
            cause=f"rank {first.rank} failed first: {headline(first)[:300]}",
            order=_order(first),
            code=first.exit_code,
        )
        return failures
    except LaunchError as error:
        link.report(FAILED, cause=str(error), order=_ECHO)
        return []
    if code:
        link.report(FAILED, cause=f"it was stopped by {signal.Signals(code - 128).name}", code=code, final=True)
    else:
        link.report(DONE)
    return []


def _order(failure: Failure) -> int:
    if failure.record is None:
        return _ENDED if failure.code == -signal.SIGTERM else _KILLED
    echo = failure.record["kind"] == "RankError" or any(text in headline(failure) for text in _TORCHS_ECHOES)
    return _ECHO if echo else _ERROR


def _ended(state: State, seat: Seat, failures: list[Failure], plan: LaunchPlan, kills_before: int | None) -> int:
    """Say why the run ended, the cause first."""
    if not state.code:
        return 0
    if failures and state.at == seat.machine:
        explain(failures, plan, kills_before)
    else:
        say(state.cause or state.problem)
        for failure in [] if plan.watching.quiet else failures:
            say(f"rank {failure.rank} failed after it: {headline(failure)[:160]}")
    return state.code


def _without_machine_0(
    link: Link, seat: Seat, attempt: int, failures: list[Failure], plan: LaunchPlan, kills_before: int | None
) -> None:
    """Machine 0's launcher is gone, and what it knew: wait for another one, if a restart is left."""
    gone = f"machine 0 at {seat.where} is gone: nothing was heard of its launcher"
    if seat.machine == 0 or attempt >= plan.max_restarts:
        if failures and _order(failures[0]) < _ECHO:
            explain(failures, plan, kills_before)
        raise LaunchError(f"{gone}.")
    say(f"{gone}; when it is started again, all machines go on; {plan.max_restarts - attempt - 1} restart(s) left")
    link.reopen(attempt + 1)


class _Ending:
    """Ends the ranks of this machine when it is called again and again: asks, then kills."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._asked: dict[str, float] = {}

    def __call__(self) -> None:
        now = time.monotonic()
        for path in self._directory.glob("pid-*"):
            if path.name not in self._asked:
                self._asked[path.name] = now
                with suppress(ProcessLookupError):
                    os.kill(int(path.name[4:]), signal.SIGTERM)
            elif now - self._asked[path.name] > _KILL_AFTER_S:
                end_sessions(self._directory)


def _leave_agents_without_waiting() -> None:
    """Keep torch's agents from waiting for each other when their ranks are done: for 300 s where another machine has failed.

    They do it so that the store stays while others need it; machine 0's launcher holds it.
    """
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

    if hasattr(SimpleElasticAgent, "_exit_barrier"):
        SimpleElasticAgent._exit_barrier = lambda self: None  # type: ignore[method-assign]


def _leave_by_signals() -> None:
    """While no ranks run, SIGTERM and Ctrl-C end the launcher, which tidies up; torch's agent has handlers of its own."""

    def leave(number: int, frame: object) -> None:
        say(f"stopped by {signal.Signals(number).name}")
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def facts_of(plan: LaunchPlan) -> dict[str, Any]:
    """What the machines of one run must have in common, by the name that an error gives it."""
    from ..ranks.meeting import versions

    config = plan.config
    return {
        **versions(),
        "num_machines": config.num_machines,
        "num_processes": config.num_processes,
        "rdzv_backend": config.rdzv_backend,
        "the script": _script(plan),
        **settings_of(config),
    }


def hints_of(plan: LaunchPlan) -> dict[str, Any]:
    """What differs by mistake or on purpose: a machine may have its own data."""
    return {"the script's command line": shlex.join(plan.arguments)}


def _script(plan: LaunchPlan) -> str:
    """Its name, and for a file of Python a sum of what it holds."""
    if plan.how.is_module or plan.how.without_python:
        return Path(plan.script).name
    content = Path(plan.script).read_bytes()
    return f"{Path(plan.script).name} with SHA-256 {hashlib.sha256(content).hexdigest()[:12]}"
