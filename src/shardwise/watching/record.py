"""A run's record on a disk: `run.json` says what the run is, `metrics.jsonl` has a line for each logged step.

A disk that takes nothing more ends the record with a warning, and not the training. This file knows no tensors.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError

logger = logging.getLogger("shardwise")

METRICS = "metrics.jsonl"
ABOUT = "run.json"
_line = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_LONGEST_LINE = 1 << 16
Line = dict[str, Any]


def plain(value: Any) -> Any:
    """`value` as JSON has it: numbers that are not finite as their names, what it does not know as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


class Record:
    """The files of one run.

    directory: where they lie; made if it is not there.
    goes_on:   the run was resumed: lines are appended. Otherwise an earlier file is kept as metrics.1.jsonl, and so on.
    Raises ConfigError if nothing can be written there.
    """

    def __init__(self, directory: str | os.PathLike[str], *, goes_on: bool) -> None:
        self.directory = Path(directory)
        self._about = self.directory / ABOUT
        path = self.directory / METRICS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if path.exists() and not goes_on:
                path.rename(_unused(path))
            if path.exists():
                _drop_cut_line(path)
            self._resumes = path.exists()  # which the first line says: clocks of two processes cannot be compared
            self._file: IO[str] | None = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: the run's record cannot be written: {error.strerror}.") from error

    def about(self, facts: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        text = json.dumps(plain({**facts, "written_at": time.time()}), indent=1)
        self._tried(lambda: self._about.write_text(text + "\n", encoding="utf-8"))

    def write(self, line: Line) -> None:
        """Append a line. It is in the file when this returns."""
        if self._resumes:
            line, self._resumes = {**line, "resumed": True}, False
        try:
            text = _line(line)
        except (TypeError, ValueError):  # a number that is not finite, which is rare: most lines are plain already
            text = _line(plain(line))

        file = self._file
        if file is not None:
            self._tried(lambda: (file.write(text + "\n"), file.flush()))

    def close(self) -> None:
        if self._file is not None:
            self._tried(self._file.close)
        self._file = None

    def _tried(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            logger.warning("%s: the run's record ends here: %s.", self.directory, error.strerror or error)
            file, self._file = self._file, None
            with suppress(OSError):
                if file is not None:
                    file.close()


def _unused(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return found


def _drop_cut_line(path: Path) -> None:
    """Take away what stands behind the last whole line: the process that wrote it was killed."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_LINE))
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
