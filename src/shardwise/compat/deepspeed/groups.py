"""deepspeed.utils.groups: data parallelism is all that there is: its group is the world, every other is refused or of one."""

from __future__ import annotations

from typing import Any, NoReturn

from .comm import get_rank, get_world_group, get_world_size


def get_data_parallel_group() -> Any:
    return get_world_group()


def get_data_parallel_world_size() -> int:
    return get_world_size()


def get_data_parallel_rank() -> int:
    return get_rank()


def get_sequence_parallel_world_size() -> int:
    return 1


def get_sequence_parallel_rank() -> int:
    return 0


def get_model_parallel_world_size() -> int:
    return 1


def _refused(kind: str) -> NoReturn:
    raise NotImplementedError(
        f"there is no group of {kind} parallelism: shardwise, which stands for DeepSpeed here, shards data-parallel training."
    )


def get_sequence_parallel_group() -> NoReturn:
    _refused("sequence")


def get_expert_parallel_group(*args: Any) -> NoReturn:
    _refused("expert")


def get_model_parallel_group() -> NoReturn:
    _refused("model")
