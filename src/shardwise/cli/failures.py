"""Why a run ended, told from what the agent saw and what the ranks wrote: the cause first, the others in a line each."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ..config.machine import host_memory_bytes, memory_limit_bytes, oom_kills
from ..errors import LaunchError
from ..files.documents import read_json
from .launch_plan import LaunchPlan

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Failures that the agent sees within this time of the first may be causes; later ones were stopped by the agent itself.
SAME_MOMENT_S = 3
_LONGEST_HEADLINE = 160


@dataclass(frozen=True)
class Failure:
    """How one rank ended.

    code:   the process's exit code, negative for a signal.
    record: what `worker.py` wrote, or None if the process had no time to.
    """

    rank: int
    pid: int
    code: int
    record: dict[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """As a shell would give it."""
        if self.record is not None:
            return int(self.record["code"])
        return 128 - self.code if self.code < 0 else self.code


def failures_of(error: ChildFailedError, directory: Path, attempt: int) -> list[Failure]:
    """The ranks of this machine that failed, the cause first, without those that the agent has ended."""
    seen = error.failures
    first_s = min(failure.timestamp for failure in seen.values())
    failures: list[Failure] = []
    for rank, failure in seen.items():
        record = _read_record(directory, rank, attempt)
        ended_by_agent = record is None and (
            failure.exitcode == -signal.SIGTERM or failure.timestamp - first_s > SAME_MOMENT_S
        )
        if not ended_by_agent:
            failures.append(Failure(rank, failure.pid, failure.exitcode, record))
    if not failures:  # every rank got a SIGTERM from elsewhere
        failures = [Failure(rank, failure.pid, failure.exitcode) for rank, failure in seen.items()]
    return sorted(failures, key=_cause_first)


def explain(failures: Sequence[Failure], plan: LaunchPlan, kills_before: int | None) -> int:
    """Say why the run ended, the cause first, and give its exit code."""
    cause, *others = failures
    _show(cause, kills_before, alone=plan.config.num_processes == 1)
    for text in [] if plan.watching.quiet else of_others(headline(cause), others):
        print(f"shardwise launch: {text}", file=sys.stderr)
    return cause.exit_code or 1


def of_others(cause: str, others: Sequence[Failure]) -> list[str]:
    """A line for each way in which the others failed. cause: what the first rank's says, which is not said again."""
    ranks: dict[str, list[int]] = {}
    for other in others:
        ranks.setdefault(headline(other), []).append(other.rank)
    lines = []
    for text, failed in ranks.items():
        who = f"rank{'s' if len(failed) > 1 else ''} {', '.join(map(str, sorted(failed)))} failed too"
        said = shorten(text, _LONGEST_HEADLINE, placeholder=" ...")
        lines.append(f"{who}, with the same error" if text == cause else f"{who}: {said}")
    return lines


def _cause_first(failure: Failure) -> tuple[int, int]:
    """Sort key: a rank that was killed before those that missed it, an echo of another rank's error last."""
    if failure.record is None:
        return (0, failure.rank)
    return (2 if failure.record["kind"] == "RankError" else 1, failure.record["time_ns"])


def _read_record(directory: Path, rank: int, attempt: int) -> dict[str, Any] | None:
    """The last attempt's record; an earlier one's says nothing about how the run ended."""
    for count in range(attempt, -1, -1):
        try:
            found = read_json(directory / f"failure-{count}-{rank}", LaunchError)
        except LaunchError:
            continue
        return found if isinstance(found, dict) else None
    return None


def headline(failure: Failure) -> str:
    """How a rank ended, in one line."""
    if failure.record is not None:
        message = str(failure.record["message"]).strip().split("\n")[0]
        if failure.record["kind"] == "exit":
            return f"it ended with exit code {failure.record['code']}"
        return f"{failure.record['kind']}: {message}" if message else str(failure.record["kind"])
    if failure.code < 0:
        try:
            name = signal.Signals(-failure.code).name
        except ValueError:
            name = "unknown"
        return f"it was ended by signal {-failure.code} ({name})"
    return f"it ended with exit code {failure.code}, without a Python exception"


def _show(cause: Failure, kills_before: int | None, *, alone: bool) -> None:
    sys.stdout.flush()
    who = "the script failed" if alone else f"rank {cause.rank} failed first"
    if cause.record is not None and _names_another(cause.record):
        print(f"shardwise launch: {str(cause.record['message']).splitlines()[0]}", file=sys.stderr)
        who = f"rank {cause.rank}, which waited, raised"
    if cause.record is not None and cause.record["traceback"]:
        print(f"shardwise launch: {who}:", file=sys.stderr)
        print(str(cause.record["traceback"]).rstrip("\n"), file=sys.stderr)
        return
    print(f"shardwise launch: {who}: {headline(cause)}", file=sys.stderr)
    if cause.record is None and cause.code == -signal.SIGKILL:
        print(f"shardwise launch: {_why_killed(kills_before)}", file=sys.stderr)


def _names_another(record: dict[str, Any]) -> bool:
    """Whether a rank failed because others did not come, and its error says who: see `ranks/blame.py`."""
    return record["kind"] == "RankError" and " the others waiting: " in str(record["message"]).split("\n", 1)[0]


def _why_killed(kills_before: int | None) -> str:
    kills = oom_kills()
    limit, memory = memory_limit_bytes(), host_memory_bytes()
    size = f" (limit {limit / 2**30:.1f} GiB)" if limit else f" ({memory / 2**30:.1f} GiB)" if memory else ""
    if kills is not None and kills_before is not None and kills > kills_before:
        return (
            f"the kernel killed it because host memory{size} ran out; offload less to the cpu or start fewer processes."
        )
    return (
        f"SIGKILL comes from a person, a scheduler, or the kernel when host memory{size} runs out; the kernel's log "
        "(dmesg) tells which."
    )
