"""Finds the module and the distribution `deepspeed` in this process: faces made of `faces.MODULES`, and metadata of our own.

    import deepspeed.ops.adam                    a module made from its row of the table
    importlib.util.find_spec("deepspeed")        found
    importlib.metadata.version("deepspeed")      found: a finder of modules may find distributions too

It stands before the other finders, so a DeepSpeed that is installed is not reached in this process. `Libraries`, see
`libraries.py`, wraps what transformers and accelerate do by themselves, whenever they are imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ..config.foreign import stand_aside
from ..errors import ConfigError
from . import libraries
from .faces import HOME, MODULES, UNSUPPORTED, VERSION, refusal

logger = logging.getLogger("shardwise")

NAME = "deepspeed"
# What reads at its import whether there is a DeepSpeed.
_MUST_COME_LATER = ("accelerate.accelerator", "transformers.integrations.deepspeed")


def as_deepspeed() -> None:
    """From here on, `import deepspeed` gives shardwise in this process. A second call does nothing.

    Raises ConfigError if DeepSpeed itself, or what looks for it once and for all, has been imported before.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if NAME in sys.modules:
        raise ConfigError(
            f"deepspeed {getattr(sys.modules[NAME], '__version__', '')} has been imported already. Call "
            "shardwise.compat.as_deepspeed() before it is, at the top of the script."
        )
    late = [name for name in _MUST_COME_LATER if name in sys.modules]
    if late:
        raise ConfigError(
            f"{late[0]} has been imported already, and has found no DeepSpeed for good. Call "
            "shardwise.compat.as_deepspeed() at the top of the script, before transformers, accelerate or peft are "
            "imported."
        )
    installed = _installed()
    sys.meta_path.insert(0, _Finder())
    importlib.invalidate_caches()
    stand_aside("shardwise.compat.deepspeed")
    libraries.watch()
    if installed is not None and libraries.is_first_rank():
        logger.warning("DeepSpeed %s is installed too. In this run shardwise is in force as `deepspeed`.", installed)


def _installed() -> str | None:
    """The version of a DeepSpeed that is installed, or None."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version" if importlib.util.find_spec(NAME) is not None else None


class Face(ModuleType):
    """A module of DeepSpeed's name. Its names come from `faces.MODULES`, each loaded when it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        row = MODULES[self.__name__]
        value: Any
        if name in row:
            home, _, own = row[name].partition(":")
            value = importlib.import_module(home, HOME)
            value = getattr(value, own) if own else value
        elif f"{self.__name__}.{name}" in MODULES:
            value = importlib.import_module(f"{self.__name__}.{name}")
        elif name in UNSUPPORTED.get(self.__name__, ()):
            value = _stand_in(f"{self.__name__}.{name}")
        else:
            raise AttributeError(refusal(f"{self.__name__}.{name}"), name=name, obj=self)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        below = [name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == self.__name__]
        return sorted({*super().__dir__(), *MODULES[self.__name__], *below})


def _stand_in(path: str) -> type:
    """A class that programs may import and ask isinstance of; making one is refused."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(refusal(path))

    return type(path.rpartition(".")[2], (), {"__new__": refuse, "__module__": path.rpartition(".")[0]})


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Face(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "shardwise, answering for a module of DeepSpeed; see shardwise.compat."
        if module.__name__ == NAME:
            vars(module)["__version__"] = VERSION
            libraries.say_once(f"deepspeed {VERSION}: this is shardwise, not DeepSpeed.")


class _Distribution(importlib.metadata.Distribution):
    _FILES: ClassVar[dict[str, str]] = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nSummary: shardwise, answering for DeepSpeed\n"
        "Author: The shardwise authors\nProvides-Dist: shardwise-deepspeed\n",
        "top_level.txt": f"{NAME}\n",
        "RECORD": "",
    }

    def read_text(self, filename: str) -> str | None:
        return self._FILES.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).with_name(NAME) / str(path)


class _Finder:
    """A finder of modules and of distributions."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(refusal(fullname), name=fullname)
        return ModuleSpec(fullname, _Loader(), origin="shardwise.compat.deepspeed", is_package=True)  # type: ignore[arg-type]

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        wanted = getattr(context, "name", None)
        return [_Distribution()] if wanted is None or str(wanted).lower() == NAME else []

    def invalidate_caches(self) -> None:
        pass
