"""A terminal for a test: a program in a pseudo-terminal, what it shows as lines of text, and keys that are typed on cue.

    code, terminal = typed(["-c", program], [("How many", "2\r"), ("Address", "\x1b")], columns=60, folder=tmp_path)
    terminal.text()

What is drawn is kept on one canvas that grows downwards, so that what has scrolled away is there too. It knows the sequences
that prompt_toolkit writes, and raises on any other.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ESCAPE, ENTER, UP, DOWN, LEFT, CTRL_C, ERASE = "\x1b", "\r", "\x1b[A", "\x1b[B", "\x1b[D", "\x03", "\x7f"
ROWS = 60
_SEQUENCE = re.compile(r"\x1b\[([?>]?)([0-9;]*)([A-Za-z])|\x1b\][^\x07]*\x07|\x1b[=>]")


class Terminal:
    """The canvas. raw: all that was written, sequences and all."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.raw = ""
        self._rows: list[list[str]] = [[]]
        self._row = self._column = 0
        self._waiting = ""

    def feed(self, text: str) -> None:
        self.raw += text
        text, self._waiting = self._waiting + text, ""
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                match = _SEQUENCE.match(text, place)
                if match is None:  # the rest has not come yet
                    assert len(text) - place < 40, f"an unknown sequence: {text[place : place + 40]!r}"
                    self._waiting = text[place:]
                    return
                if match[3]:
                    self._obey(match[1], [int(part) for part in match[2].split(";") if part], match[3])
                place = match.end()
                continue
            self._show(text[place])
            place += 1

    def _show(self, mark: str) -> None:
        if mark == "\n":
            self._row += 1
        elif mark == "\r":
            self._column = 0
        elif mark == "\b":
            self._column = max(0, self._column - 1)
        elif mark >= " ":
            if self._column == self.columns:  # a line that is full goes on in the next
                self._row, self._column = self._row + 1, 0
            row = self._at_row()
            row += [" "] * (self._column + 1 - len(row))
            row[self._column] = mark
            self._column += 1
        self._at_row()

    def _at_row(self) -> list[str]:
        while len(self._rows) <= self._row:
            self._rows.append([])
        return self._rows[self._row]

    def _obey(self, private: str, numbers: list[int], letter: str) -> None:
        if private or letter in "mhl":
            return  # colours, the cursor's look, pasting in brackets
        count = numbers[0] if numbers else 1
        if letter in "AB":
            self._row = max(0, self._row + (count if letter == "B" else -count))
        elif letter in "CD":
            self._column = max(0, self._column + (count if letter == "C" else -count))
        elif letter == "G":
            self._column = count - 1
        elif letter in "JK":
            assert not numbers or numbers[0] in (0, 2), f"erases {numbers}"
            del self._at_row()[self._column :]
            if letter == "J":
                del self._rows[self._row + 1 :]
        else:
            raise AssertionError(f"an unknown sequence: {numbers} {letter}")
        self._at_row()

    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._rows]

    def text(self) -> str:
        return "\n".join(self.lines()).rstrip("\n") + "\n"


def typed(
    arguments: Sequence[str],
    cues: Sequence[tuple[str, str]],
    *,
    columns: int = 80,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 180,
) -> tuple[int, Terminal]:
    """Run Python with `arguments` in a terminal; each cue is a text that is waited for, below the one before, and keys for it.

    A program that draws menus reads keys only while one is drawn, so the text is one of the menu's; without keys it is any.
    Raises AssertionError with the screen where a text does not come. Gives the exit code, negative for a signal.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    variables = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **(environment or {})}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        if name not in (environment or {}):
            variables.pop(name, None)
    # A session of its own, whose terminal this is: Ctrl-C is then a signal where the terminal makes it one.
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=variables,
        start_new_session=True,
        close_fds=True,
    )
    os.close(theirs)
    screen, deadline = Terminal(columns), time.monotonic() + timeout_s
    seen = 0
    try:
        for text, keys in cues:
            while (place := _plain(screen.raw).find(text, seen)) < 0:
                assert _read(ours, screen, deadline), f"{text!r} did not come:\n{screen.text()}"
            seen = place + len(text)
            if keys:
                _until_quiet(ours, screen)
                seen = len(_plain(screen.raw))
                os.write(ours, keys.encode())
        while _read(ours, screen, deadline):
            pass
        return process.wait(max(0.1, deadline - time.monotonic())), screen
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def _plain(raw: str) -> str:
    return _SEQUENCE.sub("", raw)


def _until_quiet(ours: int, screen: Terminal) -> None:
    """A menu is drawn before its keys are read: what is typed too early is echoed by the terminal."""
    while select.select([ours], [], [], 0.03)[0]:
        if not _read(ours, screen, time.monotonic() + 1):
            return


def _read(ours: int, screen: Terminal, deadline: float) -> bool:
    """Take what the program has written; False when it is over, or the time is."""
    ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        return False
    try:
        part = os.read(ours, 65536)
    except OSError:  # the other side is closed
        return False
    screen.feed(part.decode(errors="replace"))
    return bool(part)
