"""torch.compile by accelerate's names: for each repeated block of a model, in place, as `tuning/compiling.py` has it."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn

from ..config.compiling import CompileConfig
from ..errors import ConfigError
from ..tuning.compiling import CompiledBlocks, blocks_to_compile
from ..zero.sharded import find_sharded
from .models import is_compiled_module

_compiled: WeakSet[nn.Module] = WeakSet()
_SETTINGS = {
    "backend": "dynamo_backend",
    "mode": "dynamo_mode",
    "fullgraph": "dynamo_use_fullgraph",
    "dynamic": "dynamo_use_dynamic",
}


def is_repeated_blocks(module: nn.Module) -> bool:
    """Whether it is a ModuleList, not empty, of modules of one class."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(isinstance(m, type(module[0])) for m in module)


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether there is such a ModuleList in it."""
    return any(is_repeated_blocks(inner) for inner in module.modules())


def has_compiled_regions(module: nn.Module) -> bool:
    """Whether a module in it is compiled: by `compile_regions`, or by torch's `compile`."""
    return any(
        inner in _compiled or is_compiled_module(inner) or getattr(inner, "_compiled_call_impl", None) is not None
        for inner in module.modules()
    )


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """`module` with its repeated blocks compiled, in place: blocks of one class share one artefact.

    compile_kwargs: backend ("inductor"), mode, fullgraph, dynamic. Blocks run compiled where gradients are recorded. Raises
    ConfigError for others and for a prepared model, whose `dynamo_backend` does it; PrepareError without repeated blocks.
    """
    unknown = sorted(set(compile_kwargs) - set(_SETTINGS))
    if unknown:
        raise ConfigError(f"compile_regions: {', '.join(unknown)} cannot be given; {', '.join(_SETTINGS)} can.")
    if find_sharded(module) is not None:
        raise ConfigError(
            "compile_regions: this model is prepared. Use Accelerator(dynamo_backend=...), or compile it before `prepare`."
        )
    said = {_SETTINGS[name]: value for name, value in compile_kwargs.items() if value is not None}
    blocks = blocks_to_compile(module)
    CompiledBlocks(blocks, CompileConfig.model_validate({"dynamo_backend": "inductor", **said}))
    _compiled.update(blocks)
    return module
