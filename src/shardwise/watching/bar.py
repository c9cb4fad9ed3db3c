"""The newest line of a record as one line of text: drawn over itself on a terminal, elsewhere said now and then."""

from __future__ import annotations

import os
import sys
import time
from typing import IO

from .record import Line

_REDRAWN_EVERY_S = 0.1
_SAID_EVERY_S = 30.0  # where it is no terminal: a log file shall not be full of it
_CELLS = 12


def duration(seconds: float) -> str:
    """ "1:02:03", "2:03"; of many days "12 d 3 h"."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days > 3:
        return f"{days} d {hours} h"
    hours += 24 * days
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


def count(number: float) -> str:
    """ "950", "12.3k", "4.56M"."""
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if number < limit:
            return f"{number / divisor:.3g}{unit}"
    return f"{number / 1e12:.3g}T"


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes < 1e10 else f"{nbytes / 1e9:.1f} GB"


def text_of(line: Line, total: int | None, epochs: float | None) -> str:
    """What the bar says: what is not known is left out. total: steps of the run. epochs: of the run."""
    parts = []
    if total:
        share = min(1.0, line["step"] / total)
        filled = int(share * _CELLS)
        parts.append(f"{'█' * filled}{'░' * (_CELLS - filled)} {share:.0%}")
    parts.append(f"step {line['step']}" + (f"/{total}" if total else ""))
    if line.get("epoch") is not None:
        parts.append(f"epoch {line['epoch']:.2f}" + (f"/{epochs:g}" if epochs else ""))
    for key, word, form in (("loss", "loss", ".4g"), ("learning_rate", "lr", ".3g"), ("gradient_norm", "norm", ".3g")):
        if line.get(key) is not None:
            parts.append(f"{word} {line[key]:{form}}")
    if line.get("tokens_per_s") is not None:
        each = line["tokens_per_s_per_gpu"]
        alone = each is None or each == line["tokens_per_s"]
        parts.append(f"{count(line['tokens_per_s'])} tok/s" + ("" if alone else f" ({count(each)} each)"))
    elif line.get("samples_per_s") is not None:
        parts.append(f"{count(line['samples_per_s'])} samples/s")
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    memory = line["memory_bytes"]
    parts += [f"{tier} {gigabytes(level['now'])}" for tier, level in memory.items() if level is not None]
    wall, waited = line["wall_s"], line["time_s"].get("data", 0.0)
    if wall > 0:
        parts.append(f"data {waited / wall:.0%}")
    if line.get("left_s") is not None:
        parts.append(f"left {duration(line['left_s'])}")
    return " · ".join(parts)


class Bar:
    """One line on `stream` (stderr), of the newest line of the record. total, epochs: of the run, or None."""

    def __init__(self, total: int | None, epochs: float | None, stream: IO[str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._epochs = total, epochs
        self._drawn = False
        self._at = -_SAID_EVERY_S
        self._waits: Line | None = None

    def show(self, line: Line) -> None:
        """Show this line, or keep it for `rest` if one was shown just now."""
        now = time.monotonic()
        if now - self._at < (_REDRAWN_EVERY_S if self._stream.isatty() else _SAID_EVERY_S):
            self._waits = line
            return
        self._at, self._waits = now, None
        text = text_of(line, self._total, self._epochs)
        if self._stream.isatty():
            width = _columns(self._stream)
            self._write(f"\r\x1b[2K{text[: width - 1]}")
            self._drawn = True
        else:
            self._write(text + "\n")

    def rest(self) -> None:
        """The script goes on with other things: show what waits, and leave the line."""
        if self._waits is not None:
            self._at = -_SAID_EVERY_S
            self.show(self._waits)
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except UnicodeEncodeError:
            self._stream.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError):  # the terminal is gone, or its stream is closed
            pass


def _columns(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
