"""shardwise trains models that do not fit: ZeRO-1/2/3 and offload on torch.distributed.

`from shardwise import Accelerator` replaces the import from accelerate. Names are loaded when first used, so that the
commands start without torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .config.foreign import watch
from .version import __version__

_HOMES = {
    "front.accelerator": ("Accelerator",),
    "run.accumulation": ("GradientAccumulationPlugin", "GradientState"),
    "run.accelerator_state": ("AcceleratorState",),
    "run.process": (
        "DistributedType",
        "PartialState",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "pad_across_processes",
        "reduce",
        "set_seed",
        "synchronize_rng_states",
        "wait_for_everyone",
    ),
    "ranks.batches": ("send_to_device",),
    "data.prepare": ("DataLoaderConfiguration", "skip_first_batches"),
    "run.plugins": (
        "AutocastKwargs",
        "DeepSpeedPlugin",
        "DistributedDataParallelKwargs",
        "GradScalerKwargs",
        "InitProcessGroupKwargs",
        "ProfileKwargs",
        "ProjectConfiguration",
    ),
    "run.tracking": ("GeneralTracker",),
    "errors": ("ShardwiseError",),
    "run.memory": ("MemoryTracker",),
    "zero.access": ("gathered", "gradient"),
    "step.full": ("full", "set_full"),
    "step.averaging": ("ShardedEMA",),
    "run.memory_fit": ("find_executable_batch_size", "release_memory"),
}
# Modules that programs import by a path of their own; where the files are.
_MODULES = {
    "shardwise.logging": ".run.logging",
    "shardwise.losses": ".tuning.losses",
    "shardwise.memory": ".run.memory",
    "shardwise.plugins": ".run.plugins",
    "shardwise.tracking": ".run.tracking",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604 - the names are texts

watch()


class _Modules(MetaPathFinder, Loader):
    """Finds _MODULES under their public paths: the very modules, not copies."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(_MODULES[module.__name__], __name__)


sys.meta_path.append(_Modules())


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
