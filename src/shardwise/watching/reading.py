"""A record read again, for its report: columns of numbers by step. Knows the files and no drawing; loads no torch.

A run that went on from a checkpoint has written some steps twice: the later lines count. A line that was cut, because the
process was killed while it wrote, can only be the last one.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.documents import opened, parse_json, read_text
from .record import ABOUT, METRICS

Column = list[float]  # nan where a line has no number

_LONGEST_LINE = 1 << 20
_LARGEST = 1e300
_PLAIN = (
    *(
        "steps",
        "epoch",
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens",
        "samples",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
    ),
    *("samples_per_s", "mfu", "wall_s", "elapsed_s", "left_s"),
)


@dataclass
class Past:
    """What a record holds.

    steps:   of its lines, growing. columns: a number for each of them by name; time/data, memory/host/now and so on for those
             that lie deeper.
    about:   run.json, empty without one.
    resumed: steps behind which the run was begun again.
    notes:   what is odd, each a sentence.
    """

    directory: Path
    steps: list[int] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def known(self, name: str) -> Column | None:
        """A column, if any of its lines has a number."""
        column = self.columns.get(name)
        return column if column is not None and any(map(math.isfinite, column)) else None

    def total(self, name: str) -> float:
        return sum(number for number in self.columns.get(name, ()) if math.isfinite(number))

    def last(self, name: str) -> float | None:
        """Its last number."""
        return next((number for number in reversed(self.columns.get(name, [])) if math.isfinite(number)), None)

    @property
    def parts(self) -> list[str]:
        """Those that time went to, in the order of the lines."""
        names = [name.removeprefix("time/") for name in self.columns if name.startswith("time/")]
        return [name for name in names if self.total(f"time/{name}") > 0]

    @property
    def tiers(self) -> list[str]:
        names = [name.split("/")[1] for name in self.columns if name.startswith("memory/") and name.endswith("/now")]
        return [name for name in names if self.known(f"memory/{name}/now")]


def read_record(run: str | os.PathLike[str]) -> Past:
    """The record of a run. run: its directory, or the metrics.jsonl in it.

    Raises ConfigError, in one sentence, where there is none, it has no lines, or a line is none of a record.
    """
    given = Path(run)
    path = given / METRICS if given.is_dir() else given
    if given.is_dir() and not path.exists():
        raise ConfigError(
            f"{given}: there is no {METRICS} in it. accelerator.watch writes one into the project_dir, and WatchCallback into "
            "the output_dir."
        )
    past = Past(path.parent)
    for number, text in _lines(path, past):
        _take(past, parse_json(text, f"{path}, line {number}", ConfigError), f"{path}, line {number}")
    if not past.steps:
        raise ConfigError(f"{path}: has no lines: the run has not finished a step yet, or was ended before it did.")
    about = path.parent / ABOUT
    if about.exists():
        found = parse_json(read_text(about, ConfigError), str(about), ConfigError)
        past.about = found if isinstance(found, dict) else {}
    else:
        past.notes.append(f"There is no {ABOUT} beside it, so nothing is known of settings and versions.")
    return past


def _lines(path: Path, past: Past) -> Iterator[tuple[int, str]]:
    """Each line with its number; notes a last one that was cut."""
    with opened(path, ConfigError) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
        number = 0
        while raw := file.readline(_LONGEST_LINE):
            number += 1
            if not raw.endswith(b"\n"):
                if len(raw) == _LONGEST_LINE:
                    raise ConfigError(f"{path}, line {number}: is longer than any line of a record.")
                past.notes.append("The last line was cut when the run was ended, and is left out.")
                return
            if raw.strip():
                try:
                    yield number, raw.decode("utf-8")
                except UnicodeDecodeError:
                    raise ConfigError(f"{path}, line {number}: is no text.") from None


def _take(past: Past, line: Any, name: str) -> None:
    if not isinstance(line, dict) or not isinstance(line.get("time_s"), dict):
        raise ConfigError(f"{name}: is no line of a record; it has no time_s.")
    if not all(type(line.get(key)) is int for key in ("step", "steps")):
        raise ConfigError(f"{name}: is no line of a record; its step or its steps is no whole number.")
    step, values = line["step"], _numbers(line)
    if past.steps and step == past.steps[-1] and line["steps"] == 0:  # a run's last line, of time behind its last step
        for key in ("wall_s", *(key for key in values if key.startswith("time/"))):
            past.columns[key][-1] += values.get(key, 0.0)
        return
    if past.steps and (line.get("resumed") is True or _began_again(past, values)):
        kept = bisect_left(past.steps, step)
        past.resumed.append(past.steps[kept - 1] if kept else 0)
        del past.steps[kept:]
        for column in past.columns.values():
            del column[kept:]
    elif past.steps and step <= past.steps[-1]:
        raise ConfigError(f"{name}: step {step} follows step {past.steps[-1]}.")
    for key in values:
        if key not in past.columns:
            past.columns[key] = [math.nan] * len(past.steps)
    past.steps.append(step)
    for key, column in past.columns.items():
        column.append(values.get(key, math.nan))


def _began_again(past: Past, values: Mapping[str, float]) -> bool:
    """Whether a line is of another process than the one before: its clock began anew. For records that do not say `resumed`."""
    earlier, now = past.columns.get("elapsed_s"), values.get("elapsed_s", math.nan)
    return bool(earlier) and now < earlier[-1]  # type: ignore[index]  # a nan is not below


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by their column; what is not finite is a gap."""
    found = {key: _number(line.get(key)) for key in _PLAIN}
    found |= {f"time/{part}": _number(seconds) for part, seconds in line["time_s"].items()}
    memory = line.get("memory_bytes")
    for tier, level in memory.items() if isinstance(memory, dict) else ():
        for which, count in level.items() if isinstance(level, dict) else ():
            found[f"memory/{tier}/{which}"] = _number(count)
    return found


def _number(value: Any) -> float:
    """What is no number is a gap, and so is one that no axis has room for: a sum of a few would not be finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > _LARGEST:
        return math.nan
    return float(value)
