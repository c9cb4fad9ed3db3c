"""Small files of text, read with limits: nothing is read before its kind and its size are known.

In the place of a manifest, an index or a file of settings may lie a device that never ends, a pipe that nobody writes to,
gigabytes, or nesting that no parser survives. Every file of text that the library reads comes through here, and each of these
is one sentence.

    opened        a descriptor of a regular file, links followed, which never waits for a writer
    read_text     its UTF-8, up to a size
    parse_json    JSON of limited depth and number of values, without doubtful numbers and keys
    check_json    the same limits for a text that is to be written, so that what is saved can be read

The caller says which error they raise: a damaged manifest is a CheckpointError, a wrong setting a ConfigError.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import ShardwiseError

T = TypeVar("T")

SETTINGS_NBYTES = 256 << 10  # what a person writes by hand
RECORD_NBYTES = 64 << 20  # what a program writes: an index of some 300,000 tensors
# Such a text takes 0.4 GB while it is parsed, at the worst.
_VALUES = 4_000_000
_DEPTH = 127  # safetensors' own
_DIGITS = 300  # what fits into a float, and so into any reader

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# A text in quotes, also one that never ends; possessive, so that no text makes it look twice.
_QUOTED = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_LONG_NUMBER = re.compile(rf"(?<![0-9])[0-9]{{{_DIGITS + 1}}}")
_BRACKETS = re.compile(r"[^\[\]{}]+")

_LONGEST_NAME = 4096  # of a path
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100
_short.maxlevel = 2


def shown(value: Any) -> str:
    """`value` as an error shows it: its repr, in one line of bounded length."""
    return _short.repr(value)


def printed(text: object) -> str:
    """A path or a name as an error prints it: as it is, but in quotes where it has characters that no terminal should get."""
    plain = str(text)
    return plain if plain.isprintable() and len(plain) < _LONGEST_NAME else shown(plain)


@contextmanager
def opened(path: str | os.PathLike[str], raises: type[ShardwiseError]) -> Iterator[tuple[int, int]]:
    """A descriptor for reading the regular file `path`, and its size in bytes. Links are followed; closed at the end."""
    # Opening a device may already act on it, so its kind is asked for before, and again of what was opened.
    _refuse_kind(path, _ask(path, raises, lambda: os.stat(path)).st_mode, raises)
    descriptor = _ask(path, raises, lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    try:
        found = os.fstat(descriptor)
        _refuse_kind(path, found.st_mode, raises)
        yield descriptor, found.st_size
    finally:
        os.close(descriptor)


def _refuse_kind(path: str | os.PathLike[str], mode: int, raises: type[ShardwiseError]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "of an unknown kind")
        raise raises(f"{printed(path)}: is {kind}, not a file")


def _ask(path: str | os.PathLike[str], raises: type[ShardwiseError], question: Callable[[], T]) -> T:
    try:
        return question()
    except FileNotFoundError:
        raise raises(f"{printed(path)}: there is no such file") from None
    except (OSError, ValueError) as error:  # a ValueError where the path is none
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise raises(f"{printed(path)}: cannot be read: {reason}") from error


def read_text(path: str | os.PathLike[str], raises: type[ShardwiseError], limit: int = RECORD_NBYTES) -> str:
    """The text of a regular file of at most `limit` bytes."""
    name = printed(path)
    with opened(path, raises) as (descriptor, size):
        if size > limit:
            raise raises(f"{name}: has {size} bytes; such a file has at most {limit}")
        data = bytearray()
        # Some files of the kernel have no size; none may bring more than the limit.
        while len(data) <= limit and (block := _ask(path, raises, lambda: os.read(descriptor, 1 << 20))):
            data += block
    if len(data) > limit:
        raise raises(f"{name}: has more than {limit} bytes, which is the most that such a file has")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise raises(f"{name}: is not a text file in UTF-8") from None


def check_json(text: str, name: str, raises: type[ShardwiseError], limit: int = RECORD_NBYTES) -> None:
    """Raise if the JSON `text` is larger, deeper or of more values than `parse_json` and `read_text` take."""
    if len(text) > limit:
        raise raises(f"{name}: has {len(text)} bytes; such a file has at most {limit}")
    bare = _QUOTED.sub("", text)
    opening = bare.count("[") + bare.count("{")
    if opening + bare.count(",") > _VALUES:
        raise raises(f"{name}: holds more than {_VALUES} values")
    if opening > _DEPTH:
        depth = 0
        for bracket in _BRACKETS.sub("", bare):
            depth += 1 if bracket in "[{" else -1
            if depth > _DEPTH:
                raise raises(f"{name}: is nested more than {_DEPTH} levels deep")
    if _LONG_NUMBER.search(bare):
        raise raises(f"{name}: holds a number of more than {_DIGITS} digits")


def parse_json(
    text: str,
    name: str,
    raises: type[ShardwiseError],
    *,
    limit: int = RECORD_NBYTES,
    infinities: bool = False,
    repeated_keys: bool = False,
    whole_number: Callable[[str], Any] | None = None,
) -> Any:
    """The value of a JSON text. name: what errors call it.

    infinities:    NaN, Infinity and numbers that no float can hold are taken, as Python and other libraries write them.
    repeated_keys: of two equal keys the last one counts, as other libraries read their files; else they are an error.
    whole_number:  makes a value of a number without point and exponent; None makes an int.
    """
    check_json(text, name, raises, limit)
    try:
        return json.loads(
            text,
            object_pairs_hook=None if repeated_keys else _each_key_once,
            parse_constant=None if infinities else _no_number,
            parse_float=None if infinities else _finite,
            parse_int=whole_number,
        )
    except json.JSONDecodeError as error:
        raise raises(f"{name}:{error.lineno}: is not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise raises(f"{name}: {error}") from None


def read_json(path: str | os.PathLike[str], raises: type[ShardwiseError], **options: Any) -> Any:
    """The value of a file of JSON. options: see `parse_json`; the limit is the file's too."""
    text = read_text(path, raises, options.get("limit", RECORD_NBYTES))
    return parse_json(text, printed(path), raises, **options)


def read_json_object(path: str | os.PathLike[str], raises: type[ShardwiseError], **options: Any) -> dict[str, Any]:
    """`read_json` of a file that has to hold an object."""
    value = read_json(path, raises, **options)
    if not isinstance(value, dict):
        raise raises(f"{printed(path)}: is not a JSON object")
    return value


def read_configuration(path: str | os.PathLike[str], raises: type[ShardwiseError]) -> dict[str, Any]:
    """A config.json of transformers, read as they read it: Mamba's has an Infinity."""
    return read_json_object(path, raises, infinities=True, repeated_keys=True)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"has the key {shown(name)} twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"holds {text}, which is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds a number that is out of range: {shown(text)}")
    return value
