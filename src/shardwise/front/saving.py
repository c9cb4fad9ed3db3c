"""An Accelerator's ways to write whole weights and any object; the state of a run is `front/checkpointing.py`'s."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..weights.export import refuse_empty, save_weights
from ..weights.stream import save_streamed
from ..zero.sharded import find_sharded
from .run import Run


def unwrap_model(run: Run, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
    """The model itself: `prepare` never wraps it. What torch's DataParallel and its like have put around it comes off.

    keep_fp32_wrapper:  False has it give its outputs in the dtype in which it computes, for good.
    keep_torch_compile: False takes off torch.compile's wrapper.
    """
    compiled = getattr(model, "_orig_mod", None)
    inner = model if compiled is None else compiled
    while isinstance(inner, (nn.DataParallel, DistributedDataParallel)):
        inner = inner.module
    if not keep_fp32_wrapper:
        for prepared in run.models:
            if prepared.model is inner:
                prepared.give_own_outputs()
    if compiled is None or not keep_torch_compile:
        return inner
    if inner is not compiled:  # of what was compiled around a wrapper, around what it had inside
        model._orig_mod = inner
    return model


def get_state_dict(run: Run, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """The whole state dict, on the CPU of rank 0; {} on the other ranks. Collective; an error is every rank's.

    Works under every stage; `zero3_save_16bit_model` is not needed for it, but makes its floating weights 16-bit.
    """
    sharded = find_sharded(unwrap_model(run, model, keep_torch_compile=False))
    if sharded is None:
        return dict(model.state_dict()) if run.is_main_process else {}
    run.ranks.assemble("accelerator.get_state_dict()")  # scripts for DDP call it on the main process alone
    state = sharded.state_dict()
    return run.ranks.together(lambda: {name: _cast(value, _export_dtype(run)) for name, value in state.items()})


def _export_dtype(run: Run) -> torch.dtype | None:
    """What floating weights are written in, if the configuration says so."""
    zero = run.config.zero
    return run.precision.compute if zero.zero3_save_16bit_model and zero.zero_stage == 3 else None


def save(run: Run, obj: Any, f: Any, safe_serialization: bool = False) -> None:
    """Write `obj` to `f` on the main process (on one process per machine with save_on_each_node).

    Not collective, so it may be called on that process alone; an error is that process's own.
    """
    if run.project_configuration.save_on_each_node:
        here = run.ranks.local_rank == 0
    else:
        here = run.is_main_process
    if not here:
        return
    if safe_serialization:
        refuse_empty(obj)
        save_file({name: tensor.contiguous() for name, tensor in obj.items()}, f, metadata={"format": "pt"})
    else:
        torch.save(obj, f)


def save_model(
    run: Run,
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the whole weights: model.safetensors, or parts and an index. Collective; an error is every rank's.

    dtype: floating weights are written in it; None leaves each as it is, or takes the precision that the model computes in
           with zero3_save_16bit_model.
    Unit by unit: no rank holds the model. safe_serialization=False writes a pickle, which has to be put together in
    rank 0's memory first.
    """
    sharded = find_sharded(unwrap_model(run, model, keep_torch_compile=False))
    dtype = dtype or _export_dtype(run)
    run.ranks.assemble("accelerator.save_model()")  # as get_state_dict
    way = {"max_shard_size": max_shard_size, "safe_serialization": safe_serialization, "dtype": str(dtype)}
    run.ranks.require_same("save_model", way)
    if sharded is not None and safe_serialization:
        save_streamed(sharded, save_directory, max_shard_size=max_shard_size, dtype=dtype)
        return
    weights = get_state_dict(run, model)

    def write() -> None:
        tensors = {name: _cast(value, dtype) for name, value in weights.items() if isinstance(value, Tensor)}
        save_weights(tensors, save_directory, max_shard_size=max_shard_size, safe_serialization=safe_serialization)

    run.ranks.together(lambda: write() if run.is_main_process else None)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.itemsize == 1:
        return value
    return value.to(dtype)
