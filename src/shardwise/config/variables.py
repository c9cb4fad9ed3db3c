"""Environment variables for scripts: words that mean yes or no, and variables that are changed for a while and put back.

Their names are those that scripts written for accelerate import from `utils.environment`. Nothing of shardwise reads its own
settings through them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_YES = frozenset({"y", "yes", "t", "true", "on", "1"})
_NO = frozenset({"n", "no", "f", "false", "off", "0"})


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """1 or 0 for a word that means yes or no; True or False with `to_bool`. Raises ValueError for any other word."""
    word = value.lower()
    if word not in _YES | _NO:
        raise ValueError(f"invalid truth value {word}")
    return word in _YES if to_bool else int(word in _YES)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Whether the variable `key` says yes; `default` where it is not set. Raises ValueError for a word that is neither."""
    return bool(str_to_bool(os.environ.get(key, str(default))))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """The text of the variable `key`, or `default`."""
    return os.environ.get(key, str(default))


def get_int_from_env(env_keys: Sequence[str], default: int) -> int:
    """The first of these variables that is set to a number which is not negative, or `default`."""
    numbers = (int(os.environ.get(key, "-1")) for key in env_keys)
    return next((number for number in numbers if number >= 0), default)


def _put_back(kept: Mapping[str, str], keys: Sequence[str]) -> None:
    for key in keys:
        if key in kept:
            os.environ[key] = kept[key]
        else:
            os.environ.pop(key, None)


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Inside, the variables named by the keywords, in capitals, have these values as text; afterwards their old ones."""
    values = {key.upper(): str(value) for key, value in kwargs.items()}
    kept = {key: os.environ[key] for key in values if key in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        _put_back(kept, list(values))


@contextmanager
def clear_environment() -> Iterator[None]:
    """Inside, the environment is empty; afterwards it is what it was, without what was set inside."""
    kept = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@contextmanager
def _purged() -> Iterator[None]:
    def ours() -> list[str]:
        return [key for key in os.environ if key.startswith("ACCELERATE_")]

    kept = {key: os.environ[key] for key in ours()}
    try:
        yield
    finally:
        _put_back(kept, [*kept, *ours()])


def purge_accelerate_environment(func_or_cls: Any) -> Any:
    """Decorator: variables ACCELERATE_... that a function, or each test method of a class, sets are put back after it.

    They are what transformers' TrainingArguments sets, too. Of a class, methods whose names begin with "test" are meant,
    those of its subclasses included.
    """
    if not isinstance(func_or_cls, type):
        return _purging(func_or_cls)
    _purge_tests(func_or_cls)
    func_or_cls.__init_subclass__ = classmethod(lambda cls, **_: _purge_tests(cls))  # type: ignore[assignment]
    return func_or_cls


def _purging(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _purged():
            return function(*args, **kwargs)

    wrapper._purges = True  # type: ignore[attr-defined]
    return wrapper


def _purge_tests(cls: type) -> None:
    for name in dir(cls):
        method = getattr(cls, name)
        if name.startswith("test") and callable(method) and not hasattr(method, "_purges"):
            setattr(cls, name, _purging(method))
