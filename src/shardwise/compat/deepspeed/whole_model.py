"""What an engine does to its model as a whole: its state dict in the precision that it computes in, and its compiled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.check import checked
from ...errors import ConfigError
from ...front.entering import PreparedModel
from ...ranks.agree import together
from ...tuning.compiling import CompiledBlocks, blocks_to_compile
from ...zero.sharded import ShardedModel
from ...zero.whole import persistent_buffers

_WORDS = {"mode": "dynamo_mode", "fullgraph": "dynamo_use_fullgraph", "dynamic": "dynamo_use_dynamic"}


def compiled(prepared: PreparedModel, backend: str, options: Mapping[str, Any]) -> list[CompiledBlocks]:
    """The blocks of a model compiled one by one, their gathers outside of the graphs. Raises ConfigError for other options."""
    given = {name: value for name, value in options.items() if value not in (None, False, {})}
    unknown = sorted(set(given) - set(_WORDS))
    if unknown:
        raise ConfigError(f"engine.compile: {', '.join(unknown)} is not taken; known are {', '.join(_WORDS)}.")
    values = {_WORDS[name]: value for name, value in given.items()}
    config = checked({"dynamo_config": {"dynamo_backend": str(backend).lower(), **values}}).compiling
    return [] if config is None else [CompiledBlocks(blocks_to_compile(prepared.model, None), config, prepared.sharded)]


def consolidated(sharded: ShardedModel, dtype: torch.dtype | None, *, trained_only: bool) -> dict[str, Any] | None:
    """The whole state dict on the CPU of rank 0, floating weights in `dtype`, tied ones tied; None elsewhere. Collective.

    trained_only: without frozen weights; buffers are there in any case.
    """
    state = sharded.state_dict(trainable_only=trained_only)
    if trained_only:
        buffers = persistent_buffers(sharded.model)
        state |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items()}
    if sharded.ranks.rank != 0:
        return None
    cast: dict[int, Tensor] = {}
    return {name: _in_dtype(value, dtype, cast) for name, value in state.items()}


def save_16bit(sharded: ShardedModel, dtype: torch.dtype | None, path: Path) -> None:
    """Write `consolidated` as a file of torch. Collective."""
    state = consolidated(sharded, dtype, trained_only=False)

    def write() -> None:
        if state is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)

    together(sharded.ranks, write, what=f"{path}: ")


def _in_dtype(value: Any, dtype: torch.dtype | None, cast: dict[int, Tensor]) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    key = value.untyped_storage().data_ptr()
    if key not in cast:
        cast[key] = value.to(dtype)
    found = cast[key]
    return found if found.shape == value.shape else value.to(dtype)
