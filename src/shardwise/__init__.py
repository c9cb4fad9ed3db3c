"""shardwise trains models that do not fit: ZeRO-1/2/3 and offload on torch.distributed.

`from shardwise import Accelerator` replaces the import from accelerate. Names are loaded when first used, so that the
commands start without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from .config.foreign import watch
from .version import __version__

_HOMES = {
    "accelerator": ("Accelerator",),
    "accumulation": ("GradientAccumulationPlugin", "GradientState"),
    "process": (
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
    "nested": ("send_to_device",),
    "data": ("DataLoaderConfiguration", "skip_first_batches"),
    "plugins": (
        "AutocastKwargs",
        "DeepSpeedPlugin",
        "DistributedDataParallelKwargs",
        "GradScalerKwargs",
        "InitProcessGroupKwargs",
        "ProfileKwargs",
        "ProjectConfiguration",
    ),
    "tracking": ("GeneralTracker",),
    "errors": ("ShardwiseError",),
    "memory": ("MemoryTracker",),
    "zero.access": ("gathered", "gradient"),
    "zero.full": ("full", "set_full"),
    "zero.averaging": ("ShardedEMA",),
    "memory_fit": ("find_executable_batch_size", "release_memory"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604 - the names are texts

watch()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
