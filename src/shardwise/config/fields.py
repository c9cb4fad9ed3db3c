"""The kinds of value that a setting can have, each with one sentence for a value that does not fit.

A kind is a pydantic annotation: it turns what YAML, JSON or a flag gives (`"2"`, `False` for an unquoted `no`,
`"AUTO"`) into the one value that the rest of the code sees, or says what it would have taken. This file knows no
setting by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

YES = {"true", "yes", "on", "1"}
NO = {"false", "no", "off", "0"}


def wrong(text: str) -> PydanticCustomError:
    """An error whose whole text is `text`: pydantic adds nothing to it, and braces in it are not a template."""
    return PydanticCustomError("shardwise", "{text}", {"text": text})


@dataclass(frozen=True, slots=True)
class Kind(BeforeValidator):
    """A kind of value. metavar: what stands for one in --help. empty: of a key that has no value."""

    metavar: str | None = None
    empty: bool = False


def whole_number(minimum: int, maximum: int | None = None) -> Kind:
    """A whole number within limits; digits in a string will do, a boolean will not, though Python calls it an int."""

    def check(value: Any) -> int:
        number: int | None = None
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, float) and value.is_integer():
            number = int(value)
        elif isinstance(value, str):
            try:
                number = int(value)
            except ValueError:
                number = None
        if number is None:
            raise wrong(f"{value!r} is not a whole number")
        if number < minimum or (maximum is not None and number > maximum):
            limits = f"from {minimum} to {maximum}" if maximum is not None else f"{minimum} or more"
            raise wrong(f"{number} is out of range: {limits}")
        return number

    return Kind(check, metavar="N")


def one_of(*choices: Any, refused: dict[Any, str] | None = None, case: Callable[[str], str] = str.lower) -> Kind:
    """One of `choices`, in any letter case. `refused` gives a reason of its own for a value that others would take."""

    def check(value: Any) -> Any:
        # YAML reads an unquoted `no` as false; the word is what was meant.
        if value is False and "no" in choices:
            return "no"
        found = case(value.strip()) if isinstance(value, str) else value
        if isinstance(found, str) and choices and isinstance(choices[0], int) and found.isdigit():
            found = int(found)
        if not isinstance(found, bool) and isinstance(found, (str, int)):
            if found in choices:
                return found
            if refused and found in refused:
                raise wrong(refused[found])
        raise wrong(f"{value!r} is not one of {', '.join(str(choice) for choice in choices)}")

    return Kind(check, metavar="|".join(str(choice) for choice in choices))


def _yes_or_no(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in YES:
        return True
    if text in NO:
        return False
    raise wrong(f"{value!r} is not true or false")


def number(minimum: float, *, above: bool = False) -> Kind:
    """A finite number, `minimum` or more (or strictly `above` it)."""

    def check(value: Any) -> float:
        try:
            found = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if not math.isfinite(found):
            raise wrong(f"{value!r} is not a number")
        if found < minimum or (above and found == minimum):
            raise wrong(f"{found:g} is out of range: {'above' if above else 'at least'} {minimum:g}")
        return found

    return Kind(check, metavar="NUMBER")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(f"{value!r} is not text; put it in quotes")
    return value


def _names(value: Any) -> list[str]:
    """A list of names; one string may hold several, with commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise wrong(f"{value!r} is not a list of names")
    return list(value)


def _paths(value: Any) -> str | list[str]:
    """One path, or several: a list, or a string with commas. A path that has a comma itself is a list of one."""
    found = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(path, str) for path in found):
        raise wrong(f"{value!r} is neither a path in quotes nor a list of such")
    if not all(path.strip() for path in found):
        raise wrong(f"{value!r} has an empty path in it")
    seen: dict[str, str] = {}
    for path in found:
        place = os.path.normpath(os.path.expanduser(path))
        if place in seen:
            raise wrong(f"{seen[place]} is there twice; name each directory once")
        seen[place] = path
    return found[0] if len(found) == 1 and "," not in found[0] else list(found)


def single_path(value: Any) -> Any:
    """What a setting that takes several paths is told by a text that can only be one, whatever commas it has."""
    return [value] if isinstance(value, str) and "," in value else value


def optional(kind: Kind, *words: Any) -> Kind:
    """`kind`, or None for null and for each of `words`."""

    def check(value: Any) -> Any:
        lowered = value.strip().lower() if isinstance(value, str) else value
        if lowered is None or any(lowered == word and type(lowered) is type(word) for word in words):
            return None
        return kind.func(value)  # type: ignore[call-arg]

    return Kind(check, metavar=kind.metavar)


def absent(why: str) -> Kind:
    """A key that other tools' files carry empty: taken when it is empty or off, else refused with `why`."""

    def check(value: Any) -> None:
        if not value or (isinstance(value, str) and value.strip().lower() in NO | {"none"}):
            return
        raise wrong(why)

    return Kind(check, empty=True)


Flag = Annotated[bool, Kind(_yes_or_no, metavar="true|false")]
Text = Annotated[str, Kind(_text)]
OptionalText = Annotated[str | None, optional(Kind(_text), "none", "")]
OptionalPaths = Annotated[str | list[str] | None, optional(Kind(_paths, metavar="DIR[,DIR]"), "none", "")]
OptionalNames = Annotated[list[str] | None, optional(Kind(_names, metavar="NAMES"), "none", "auto", "")]
OptionalCount = Annotated[int | None, optional(whole_number(1), "auto", "none", "")]


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?I?B?)")


def budget(value: Any) -> int | str:
    """Bytes, from a number or a text such as 24GB (10^9) or 24GiB (2^30); or auto."""
    text = str(value).strip().upper()
    if text == "AUTO":
        return "auto"
    match = _SIZE.fullmatch(text)
    if isinstance(value, bool) or match is None:
        raise wrong(f"{value!r} is not auto or a size such as 24GB")
    unit = match[2].removesuffix("B")
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit.removesuffix("I") or " "))


def none_or_all(value: Any) -> Any:
    """YAML's false and true are none and all."""
    return {False: "none", True: "all"}[value] if isinstance(value, bool) else "none" if value is None else value


def auto_or_flag(value: Any) -> bool | str:
    """auto, or yes or no."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text == "auto":
        return "auto"
    if text in YES | NO:
        return text in YES
    raise wrong(f"{value!r} is not one of auto, true, false")


def described(value: Any) -> dict[str, Any]:
    """A section {"type", "params"} of a DeepSpeed JSON; what the type takes is known where the object is built."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise wrong(f"{value!r} is not an object with the key type")
    if set(value) - {"type", "params"} or not isinstance(value.get("params") or {}, dict):
        raise wrong(f"{value!r} is not an object with the keys type and params")
    return {"type": value["type"], "params": dict(value.get("params") or {})}


def group_of_ranks(value: Any) -> int | str:
    """world, machine, or so many ranks."""
    text = value.strip().lower() if isinstance(value, str) else value
    if text in ("world", "machine"):
        return str(text)
    number = int(text) if isinstance(text, str) and text.isdecimal() else text
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
        return number
    raise wrong(f"{value!r} is not world, machine or a number of ranks")
