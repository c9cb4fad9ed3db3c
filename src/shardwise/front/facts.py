"""What a script may read of an Accelerator by name, beside what it may set: each a true answer, also of what shardwise has not.

A table, for these are answers and no verbs: `Accelerator.__getattr__` looks here. None of them can be set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..run.plugins import DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs
from .run import Run


def flag_tensor(run: Run) -> torch.Tensor | None:
    """A one, where this process has called `set_trigger` since the last check."""
    return torch.tensor(1, device=run.ranks.device) if run.trigger else None


def data_parallel_shard_rank(run: Run) -> int:
    """Which part of what is sharded this process holds; 0 where nothing is."""
    sharded = run.plan.optimizer.sharded or run.plan.parameter.sharded or run.plan.frozen.sharded
    if not sharded:
        return 0
    rank = run.ranks.rank
    return run.ranks.division(run.config.zero.shard_group).shards(rank).index(rank)


# What was prepared, under accelerate's names; tuples, for what is written into them would prepare nothing.
_PREPARED: Mapping[str, Callable[[Run], Any]] = {
    "_models": lambda run: tuple(prepared.model for prepared in run.models),
    "_optimizers": lambda run: tuple(entry.optimizer for entry in run.optimizers),
    "_schedulers": lambda run: tuple(run.schedulers),
    "_dataloaders": lambda run: tuple(run.dataloaders),
}

FACTS: Mapping[str, Callable[[Run], Any]] = {
    **_PREPARED,
    # The argument objects that the script gave, or None.
    "ddp_handler": lambda run: run.settings.handlers.get(DistributedDataParallelKwargs),
    "scaler_handler": lambda run: run.settings.handlers.get(GradScalerKwargs),
    "init_handler": lambda run: run.settings.handlers.get(InitProcessGroupKwargs),
    "flag_tensor": flag_tensor,
    # What is not here: eight bits, optimizers that step in the backward, other ways to divide a model.
    "fp8_enabled": lambda run: False,
    "fp8_backend": lambda run: None,
    "has_fp8_handler": lambda run: False,
    "has_lomo_optimizer": lambda run: False,
    "parallelism_config": lambda run: None,
    "torch_device_mesh": lambda run: None,
    "is_fsdp2": lambda run: False,
    "is_composable_parallelism_enabled": lambda run: False,
    # Places among the ranks: every one reads data of its own, and no layer or sequence is divided.
    "data_parallel_rank": lambda run: run.ranks.rank,
    "data_parallel_shard_rank": data_parallel_shard_rank,
    "tensor_parallel_rank": lambda run: 0,
    "pipeline_parallel_rank": lambda run: 0,
    "context_parallel_rank": lambda run: 0,
}
