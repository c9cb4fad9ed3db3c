"""shardwise trains models that do not fit: ZeRO-1/2/3 and offload on torch.distributed.

`from shardwise import Accelerator` replaces the import from accelerate, and so it is with accelerate's other modules that
scripts import from: `names/table.py` has them all. Names are loaded when first used, so that the commands start without torch.
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
    "run.launchers": ("debug_launcher", "notebook_launcher"),
    "errors": ("ShardwiseError",),
    "run.memory": ("MemoryTracker",),
    "watching.callback": ("WatchCallback",),
    "zero.access": ("gathered", "gradient"),
    "step.full": ("full", "set_full"),
    "step.averaging": ("ShardedEMA",),
    "run.memory_fit": ("find_executable_batch_size", "release_memory"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# What accelerate has at its top beside these, most of it refused; `names/table.py` says which.
_TABLED = (
    *(
        "DDPCommunicationHookType",
        "FullyShardedDataParallelPlugin",
        "ParallelismConfig",
        "cpu_offload",
        "cpu_offload_with_hook",
    ),
    *(
        "debug_launcher",
        "disk_offload",
        "dispatch_model",
        "infer_auto_device_map",
        "init_empty_weights",
        "init_on_device",
    ),
    *(
        "is_rich_available",
        "load_checkpoint_and_dispatch",
        "load_checkpoint_in_model",
        "notebook_launcher",
        "prepare_pippy",
    ),
)

__all__ = ["__version__", *sorted({*_HOME_OF, *_TABLED})]  # noqa: PLE0604 - the names are texts

watch()


class _Modules(MetaPathFinder, Loader):
    """Finds the modules that are no files: `names/modules.py` makes them, and is loaded with the first of them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        root, _, inner = name.partition(".")
        # What is not in the package itself; nothing of it loads this way, for its files are found before.
        if root != __name__ or not inner or inner.startswith("names"):
            return None
        from .names import modules

        return ModuleSpec(name, self, is_package=modules.is_made(inner)) if modules.is_public(inner) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        from .names import modules

        return modules.made(spec.name.partition(".")[2])

    def exec_module(self, module: ModuleType) -> None:
        from .names import modules

        if not modules.is_made(module.__name__.partition(".")[2]):
            sys.modules[module.__name__] = modules.aliased(module.__name__.partition(".")[2])


sys.meta_path.append(_Modules())


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    from .names import modules

    if name in _TABLED:
        return modules.resolve(name)
    if modules.is_public(name):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'shardwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    from .names import modules

    return sorted({*__all__, *modules.public_modules()})
