"""The modules that accelerate has and scripts import from, below `shardwise`, made from `table.py` when they are asked for.

A module loads nothing by itself: a name's home is imported when the name is first read, so `from shardwise.utils import
patch_environment` loads no torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from .refused import refused
from .table import ALIASES, NAMES, ROWS

ROOT = __package__.partition(".")[0]
_made: dict[str, Any] = {}


def resolve(name: str) -> Any:
    """What stands for accelerate's `name`: an object of its home, or what refuses it. The same object at every call."""
    row = ROWS[name]
    if row.home is None:
        if name not in _made:
            _made[name] = refused(name, row.why)
        return _made[name]
    home, _, inner = row.home.partition(":")
    return getattr(importlib.import_module(f"{ROOT}.{home}"), inner)


class NamesModule(ModuleType):
    """A module of the table."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, f"The names of accelerate's `{path}`; see `names/table.py`.")
        self.__path__: list[str] = []  # it may have modules below it, which the finder makes too
        self.__all__ = list(NAMES[path])

    def __getattr__(self, name: str) -> Any:
        if name in NAMES[self.__name__.partition(".")[2]]:
            return resolve(name)
        child = f"{self.__name__}.{name}"
        if child.partition(".")[2] in NAMES:
            return importlib.import_module(child)
        if name in ROWS:  # accelerate's modules import one another's names, and scripts take them from any of them
            return resolve(name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # `utils.tqdm` is a module and the function in it; importing the module must not hide the function.
        if isinstance(value, ModuleType) and name in self.__dict__.get("__all__", ()):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


def is_made(path: str) -> bool:
    """Whether `shardwise.<path>` is made of the table."""
    return path in NAMES and path != ""


def is_public(path: str) -> bool:
    """Whether `shardwise.<path>` is one of these modules, or another name of a module of shardwise."""
    return is_made(path) or path in ALIASES


def made(path: str) -> ModuleType | None:
    """The module of the table, or None where it is another name of a module."""
    return NamesModule(f"{ROOT}.{path}", path) if is_made(path) else None


def aliased(path: str) -> ModuleType:
    """The very module that `path` is another name of."""
    return importlib.import_module(f"{ROOT}.{ALIASES[path]}")


def public_modules() -> list[str]:
    """Their names below `shardwise`, those without a dot in them."""
    return sorted(path for path in (*NAMES, *ALIASES) if path and "." not in path)
