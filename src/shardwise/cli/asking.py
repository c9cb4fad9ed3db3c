"""How a question comes to the user: by arrow keys in a terminal, or line by line where there is none or it is a dumb one.

Both show the same: the question and its place, what it means, in lines as wide as the terminal, and the key that it answers.
Both know `back`. What is right is asked of `wrong`, which sees the answers before this one.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..config.fields import NO, YES
from .questions import Question, as_text, size_text

Wrong = Callable[[Any], str | None]
BACK = "back"
# What the last page gives, beside the name of a line.
WRITE, LEAVE = "write", "leave"
_WIDEST = 100


class Back(Exception):  # noqa: N818 (it is an answer, not an error)
    """The user wants the question before this one."""


class EndOfInput(Exception):  # noqa: N818
    """There is no more input, where an answer was to come from a file or a pipe."""


@dataclass(frozen=True)
class Line:
    """One line of the last page. name: of a question, or the dotted key of a setting that is kept. text: its value."""

    name: str
    text: str
    note: str = ""


class Asker(Protocol):
    def say(self, text: str = "", *, indent: str = "") -> None:
        """A paragraph, wrapped at words."""

    def ask(self, question: Question, default: Any, wrong: Wrong, place: str) -> Any:
        """An answer that `wrong` has nothing against. Raises Back, KeyboardInterrupt, EndOfInput."""

    def review(self, lines: Sequence[Line], path: str, *, writable: bool) -> str:
        """WRITE, LEAVE, or the name of a line to change. Raises Back, KeyboardInterrupt."""

    def line(self, prompt: str, default: str, wrong: Wrong) -> str:
        """A line of text. Raises Back, KeyboardInterrupt, EndOfInput."""

    def agrees(self, text: str, *, default: bool) -> bool:
        """Yes or no."""


def has_terminal() -> bool:
    """Whether arrow keys can be read and menus be drawn."""
    from ..config.machine import environment_value

    return sys.stdin.isatty() and sys.stdout.isatty() and environment_value("TERM") not in ("dumb", "unknown", "", None)


def width() -> int:
    return max(40, min(_WIDEST, shutil.get_terminal_size().columns)) - 1


def wrapped(text: str, indent: str = "") -> str:
    """`text` in lines of whole words, as wide as the terminal; a word that is wider has a line to itself."""
    return textwrap.fill(
        text, width(), initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def shown(question: Question, value: Any) -> str:
    """An answer as the pages show it."""
    return size_text(value) if question.name.endswith("budget") else as_text(value)


def choices_of(question: Question, default: Any) -> dict[Any, str]:
    """Value -> text; a default that is none of the question's own is one more."""
    choices = question.words.choices
    if choices and default not in choices:
        return {**choices, default: f"{as_text(default)}  as in the file"}
    return choices


def _padded(lines: Sequence[Line]) -> list[str]:
    """A row for each, cut where the terminal ends: a row of two lines would not be a menu."""
    names = max((len(line.name) for line in lines), default=0)
    room = width() - 4
    rows = []
    for line in lines:
        row = f"{line.name:<{names}}  {line.text}" + (f"  ({line.note})" if line.note else "")
        rows.append(row if len(row) <= room else row[: room - 3] + "...")
    return rows


class _Speaker:
    """What both ways to ask say alike."""

    def say(self, text: str = "", *, indent: str = "") -> None:
        print("\n".join(wrapped(part, indent) for part in text.split("\n")), flush=True)

    def refuse(self, problem: str) -> None:
        """Say what is wrong with an answer, before the question comes again."""
        self.say(f"! {problem}", indent="   ")

    def open(self, question: Question, place: str) -> None:
        """Say a question and what it means."""
        self.say()
        self.say(f"{place}  {question.words.text}")
        self.say(question.words.help, indent="   ")


class InLines(_Speaker):
    """Questions and answers as lines of text, on any input: a dumb terminal, a pipe, a file."""

    def ask(self, question: Question, default: Any, wrong: Wrong, place: str) -> Any:
        choices = choices_of(question, default)
        self.open(question, place)
        for value, text in choices.items():
            known = text if text.startswith(as_text(value)) else f"{as_text(value)}  {text}"
            self.say(f"- {known}", indent="   ")
        hint = "" if choices or not isinstance(default, bool) else " (yes or no)"
        while True:
            reply = _read(f"{question.name}{hint} [{shown(question, default)}]: ")
            if reply.lower() == BACK:
                raise Back
            value, problem = _meant(reply, default, choices)
            problem = problem or wrong(value)
            if problem is None:
                return value
            self.refuse(problem)

    def review(self, lines: Sequence[Line], path: str, *, writable: bool) -> str:
        rows = _padded(lines)
        for number, row in enumerate(rows, 1):
            print(f"{number:>3} {row}")
        what = f"Enter writes {path}; a" if writable else "A"
        self.say(f"{what} number or name changes that line; {BACK} opens the last question; {LEAVE} writes nothing.")
        while True:
            try:
                reply = _read("change: ")
            except EndOfInput:
                if writable:
                    return WRITE
                raise
            if reply.lower() == BACK:
                raise Back
            if reply.lower() == LEAVE or (writable and reply.lower() in ("", WRITE)):
                return reply.lower() or WRITE
            found = [line.name for number, line in enumerate(lines, 1) if reply in (str(number), line.name)]
            if found:
                return found[0]
            self.refuse(f"{reply!r} is no line of this page")

    def line(self, prompt: str, default: str, wrong: Wrong) -> str:
        while True:
            reply = _read(f"{prompt} [{default}]: ") or default
            if reply.lower() == BACK:
                raise Back
            problem = wrong(reply)
            if problem is None:
                return reply
            self.refuse(problem)

    def agrees(self, text: str, *, default: bool) -> bool:
        self.say(text)
        reply = _read(f"yes or no [{'yes' if default else 'no'}]: ").lower()
        return default if not reply else reply in YES | {"y"}


def _read(prompt: str) -> str:
    print(prompt, end="", flush=True)
    try:
        text = sys.stdin.readline()
    except (OSError, ValueError) as error:  # a stdin that is closed, or may not be read
        raise EndOfInput from error
    if not text:
        print()
        raise EndOfInput
    if not sys.stdin.isatty():
        print(text.rstrip("\n"))
    return text.strip()


def _meant(reply: str, default: Any, choices: dict[Any, str]) -> tuple[Any, str | None]:
    """The value of a line, and what is wrong with it: a choice by its value or the first word of its text; yes, no, y, n."""
    if not reply:
        return default, None
    word = reply.lower()
    if choices:
        for value, text in choices.items():
            if word in (as_text(value).lower(), text.lower(), text.lower().split()[0]):
                return value, None
        if set(choices) == {True, False} and word in YES | NO:
            return word in YES, None
        return reply, f"{reply!r} is not one of {', '.join(as_text(value) for value in choices)}, back"
    if isinstance(default, bool):
        if word in YES | {"y"}:
            return True, None
        return (False, None) if word in NO | {"n"} else (reply, f"{reply!r} is not yes, no or back")
    return reply, None


class InTerminal(_Speaker):
    """Menus, by questionary. Escape goes back everywhere, the left arrow where no line is typed, and so does the word.

    What is typed takes the place of a default; after an arrow key or Backspace it changes it.
    """

    def ask(self, question: Question, default: Any, wrong: Wrong, place: str) -> Any:
        import questionary

        choices = choices_of(question, default)
        self.open(question, place)
        while True:
            if choices:
                options = [questionary.Choice(text, value=value) for value, text in choices.items()]
                first = next(option for option in options if option.value == default)
                asked = questionary.select(question.name, options, default=first, instruction="(Esc: back)")
            elif isinstance(default, bool):
                asked = questionary.confirm(question.name, default=default)
            else:
                return self.line(question.name, shown(question, default), wrong)
            value = _answered(asked, left=True)
            problem = wrong(value)
            if problem is None:
                return value
            self.refuse(problem)

    def review(self, lines: Sequence[Line], path: str, *, writable: bool) -> str:
        import questionary

        options = [questionary.Choice(f"write {path}", value=WRITE)] if writable else []
        rows = zip(lines, _padded(lines), strict=True)
        options += [questionary.Choice(row, value=line.name) for line, row in rows]
        options += [questionary.Choice("leave, and write nothing", value=LEAVE)]
        asked = questionary.select("all answers", options, instruction="(Enter on a line changes it; Esc: back)")
        return str(_answered(asked, left=True))

    def line(self, prompt: str, default: str, wrong: Wrong) -> str:
        import questionary

        def validated(text: str) -> bool | str:
            typed = text.strip()
            return typed.lower() == BACK or wrong(typed) or True

        reply = str(_answered(questionary.text(prompt, default=default, validate=validated), left=False)).strip()
        if reply.lower() == BACK:
            raise Back
        return reply

    def agrees(self, text: str, *, default: bool) -> bool:
        import questionary

        self.say(text)
        return bool(questionary.confirm("yes or no", default=default).unsafe_ask())


def _answered(asked: Any, *, left: bool) -> Any:
    """The answer to a question of questionary, to which keys for back are added. Raises Back, KeyboardInterrupt."""
    from prompt_toolkit.key_binding import KeyBindings, merge_key_bindings

    keys = KeyBindings()

    def back(event: Any) -> None:
        event.app.exit(exception=Back())

    keys.add("escape", eager=True)(back)
    application = asked.application
    if left:
        keys.add("left", eager=True)(back)
    else:
        _replace_by_typing(application.current_buffer, keys)
    application.key_bindings = merge_key_bindings([application.key_bindings or KeyBindings(), keys])
    try:
        return asked.unsafe_ask()
    except EOFError:  # Ctrl-D on an empty line
        raise KeyboardInterrupt from None


def _replace_by_typing(buffer: Any, keys: Any) -> None:
    """The first character takes the default away, or 2 typed at [1] would be 12. Another key begins to edit it."""
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.keys import Keys

    edited: list[bool] = []
    for change in (buffer.on_text_changed, buffer.on_cursor_position_changed):
        change.add_handler(lambda _: edited.append(True))

    def replace(event: Any) -> None:
        buffer.text = ""
        buffer.insert_text(event.data)

    keys.add(Keys.Any, filter=Condition(lambda: not edited))(replace)
    keys.add(Keys.BracketedPaste, filter=Condition(lambda: not edited))(replace)
