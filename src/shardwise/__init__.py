"""shardwise trains models that do not fit: ZeRO-1/2/3 and offload on torch.distributed.

`from shardwise import Accelerator` replaces the import from accelerate, and so it is with accelerate's other modules that
scripts import from: `names/table.py` has them all. Names are loaded when first used, so that the commands start without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .config.foreign import watch
from .names.modules import Finder, public_modules, resolve
from .names.table import NAMES
from .version import __version__

_HOMES = {
    "front.accelerator": ("Accelerator",),
    "run.accumulation": ("GradientAccumulationPlugin", "GradientState"),
    "run.process": (
        "AcceleratorState",
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
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted({*_HOME_OF, *NAMES[""]})]  # noqa: PLE0604 - the names are texts

watch()


sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    if name in NAMES[""]:
        return resolve(name)
    if name in public_modules():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'shardwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *public_modules()})
