"""`shardwise report`: a run's record as one HTML page; it loads no torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..watching.page import page_of
from ..watching.reading import read_record


def run_report(run: str, output: str | None) -> None:
    """Write the page of `run` and say where. Raises ConfigError for a record that cannot be read, or a page not written."""
    past = read_record(run)
    path = Path(output) if output is not None else past.directory / "report.html"
    text = page_of(past)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the report cannot be written: {error.strerror}") from error
    lines = f"{len(past.steps)} lines, steps {past.steps[0]} to {past.steps[-1]}"
    print(f"{path}  {lines}, {len(text.encode()) / 1000:.0f} kB")
