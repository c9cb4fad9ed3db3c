"""A run that asked for ZeRO and trains with another library's object is two or more trainings that know nothing of each other.

So in such a run the object that another library trains with cannot be made: the first one is an error on every rank. Importing
those libraries and using their helpers stays as it was. `worker.py` loads this file by its path, before the script, when only
the standard library is there: nothing else may be imported here at module level.
"""

from __future__ import annotations

import functools
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

# The module that defines what a library trains with: the class, and what a script takes in its place.
TRAINERS: dict[str, tuple[str, str]] = {
    "accelerate.accelerator": ("Accelerator", "from shardwise import Accelerator"),
    "lightning.fabric.fabric": ("Fabric", "from shardwise import Accelerator"),
    "lightning_fabric.fabric": ("Fabric", "from shardwise import Accelerator"),
    "lightning.pytorch.trainer.trainer": ("Trainer", "a loop with shardwise's Accelerator"),
    "pytorch_lightning.trainer.trainer": ("Trainer", "a loop with shardwise's Accelerator"),
    "deepspeed.runtime.engine": ("DeepSpeedEngine", "from shardwise import Accelerator"),
}
# Libraries that reach shardwise under DeepSpeed's name; Trainer does so through accelerate.
SPEAK_DEEPSPEED = ("accelerate", "deepspeed")
_AS_DEEPSPEED = "start it by `shardwise launch --as-deepspeed`, which changes nothing in the script"
_prepared: list[str] = []
_answering: list[str] = []


def stage_asked_for(environ: Mapping[str, str] | None = None) -> int:
    """The ZeRO stage that the launcher's configuration asks for; 0 for none, also where it cannot be read: others say so."""
    text = (os.environ if environ is None else environ).get("SHARDWISE_CONFIG")
    try:
        values = json.loads(text) if text else {}
        if str(values.get("distributed_type")).upper() != "DEEPSPEED":
            return 0
        return int((values.get("deepspeed_config") or {}).get("zero_stage", 2))
    except (ValueError, TypeError, AttributeError):
        return 0


def watch() -> None:
    """If this run asked for ZeRO, refuse what trains without it, in modules that are loaded from now on or were before."""
    if stage_asked_for() and not _answering and _trainers not in sys.meta_path:
        _trainers.begin(0)


def stand_aside(name: str) -> None:
    """Refuse nothing from now on: `name` answers for the libraries that would train, and they know of the run through it."""
    _answering.append(name)


def answers() -> bool:
    """Whether something answers for those libraries: then they are rightly in charge, and know of the run."""
    return bool(_answering)


def note_prepared(name: str) -> None:
    """A model of this class went to the engine."""
    _prepared.append(name)


def unused() -> str | None:
    """At the end of a script: what to tell if it asked for ZeRO and no model came to it; None if there is nothing to tell.

    A script that never imported torch trained nothing, and one that was asked for its help does not train.
    """
    stage = stage_asked_for()
    if stage == 0 or _prepared or "torch" not in sys.modules or {"-h", "--help", "--version"} & set(sys.argv):
        return None
    if _answering:
        return (
            f"this run asked for zero_stage {stage}, but the script gave no model to deepspeed.initialize, by itself or "
            "through accelerate or Trainer: nothing was sharded."
        )
    return (
        f"this run asked for zero_stage {stage}, but the script never prepared a model with shardwise: nothing was sharded. "
        f"Use `from shardwise import Accelerator` and its prepare(); for a script of DeepSpeed's, {_AS_DEEPSPEED}; or train "
        "without ZeRO, by --zero_stage 0."
    )


class ModuleWatch:
    """A finder that finds some modules through the other finders, and changes each once it is loaded.

    changes: what to do to a module, by its name.
    Not of importlib.abc's classes: importing those takes longer than all that is done here.
    """

    def __init__(self, changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def begin(self, place: int) -> None:
        """Change those that are loaded already, and be the finder at `place` for those to come."""
        sys.meta_path.insert(place, cast(Any, self))
        for name, change in self._changes.items():
            if name in sys.modules:
                change(sys.modules[name])

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._changes:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast(Any, _Loader(spec.loader, self._changes[fullname]))
                return spec
        return None


class _Loader:
    """Loads through the module's own loader, which it then leaves in its place."""

    def __init__(self, own: Any, change: Callable[[ModuleType], None]) -> None:
        self._own = own
        self._change = change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._own.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        self._change(module)


def _refuse_in(module: ModuleType) -> None:
    """Make the class that trains raise when one is made. Its signature stays: others ask for it."""
    name, instead = TRAINERS[module.__name__]
    kind = getattr(module, name, None)
    if isinstance(kind, type):
        kind.__init__ = _refusing(kind.__init__, module.__name__.split(".")[0], name, instead)  # type: ignore[misc]


def _refusing(original: Callable[..., None], library: str, name: str, instead: str) -> Callable[..., None]:
    @functools.wraps(original)
    def refuse(*args: Any, **kwargs: Any) -> None:
        if _answering:
            original(*args, **kwargs)
            return
        from shardwise.errors import ConfigError

        caller = str(sys._getframe(1).f_globals.get("__name__"))
        by = " by transformers' Trainer" if caller.startswith("transformers.") else ""
        remedies = [] if by else [f"use `{instead}`" if instead.startswith("from") else f"write {instead}"]
        remedies += [_AS_DEEPSPEED] if library in SPEAK_DEEPSPEED else []
        remedy = "; or ".join([*remedies, "train without ZeRO, by --zero_stage 0"])
        raise ConfigError(
            f"this run asked for zero_stage {stage_asked_for()}, but {library}'s {name} was made{by}, which does not know of "
            f"it: every process would train by itself, or as without ZeRO. {remedy[0].upper()}{remedy[1:]}."
        )

    return refuse


_trainers: Any = ModuleWatch(dict.fromkeys(TRAINERS, _refuse_in))
