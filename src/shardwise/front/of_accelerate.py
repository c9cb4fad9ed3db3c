"""accelerate's argument objects, as a script that changes only the Accelerator's import gives them, as ours of the same name.

They are known by the name of their class and by their fields, without importing accelerate. A field that has the value of an
object that was told nothing was not said; one that was said goes to ours, whose own check refuses what does not work here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from ..data.prepare import DataLoaderConfiguration
from ..errors import ConfigError
from ..run.accumulation import GradientAccumulationPlugin
from ..run.dynamo import TorchDynamoPlugin
from ..run.plugins import (
    AutocastKwargs,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
)

_TAKEN: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        AutocastKwargs,
        DataLoaderConfiguration,
        DeepSpeedPlugin,
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProfileKwargs,
        ProjectConfiguration,
        TorchDynamoPlugin,
    )
}
# What a DeepSpeedPlugin of accelerate's builds of its fields, where it was given no JSON file.
_BUILT = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
_BUILT |= {"zero_optimization", "steps_per_print"}
_BUILT_ZERO = {"stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save"}


def own(item: Any) -> Any:
    """`item`, if it is an argument object of accelerate that there is here, as ours; a mapping or list with its items so.

    Raises ConfigError for a field that was said and that ours does not have, and what ours raises.
    """
    if isinstance(item, Mapping):
        taken = {key: own(value) for key, value in item.items()}
        return item if all(value is item[key] for key, value in taken.items()) else taken
    if isinstance(item, (list, tuple)):
        return [own(value) for value in item]
    kind = _theirs(item)
    if kind is None:
        return item
    ours = _TAKEN[kind.__name__]
    said = _of_deepspeed(item, kind) if ours is DeepSpeedPlugin else _said(item, kind)
    known = {entry.name for entry in fields(ours)}
    for name, value in said.items():
        if name not in known:
            raise ConfigError(
                f"accelerate's {kind.__name__} has {name}={value!r}, which shardwise's {kind.__name__} does not "
                f"take. Leave it out; `from shardwise.utils import {kind.__name__}` has the fields that act."
            )
    return ours(**said)


def _theirs(item: Any) -> Any:
    """The class of accelerate's that `item` is of, if it is one that there is here, too."""
    if isinstance(item, type) or not is_dataclass(item):
        return None
    classes = inspect.getmro(type(item))
    for kind in classes:
        if kind.__module__.partition(".")[0] == "accelerate" and kind.__name__ in _TAKEN:
            return kind
    return None


def _said(item: Any, kind: Any) -> dict[str, Any]:
    """The fields in which it differs from an object that was told nothing: such ones fill some in by themselves."""
    plain, found = kind(), {}
    for entry in fields(kind):
        value = getattr(item, entry.name, None)
        if value != getattr(plain, entry.name, None):
            found[entry.name] = value.value if isinstance(value, Enum) else value
    return found


def _of_deepspeed(item: Any, kind: Any) -> dict[str, Any]:
    """A plugin that was given a JSON file or its dictionary is that; of another one, the fields."""
    said = _said(item, kind)
    content = getattr(said.pop("hf_ds_config", None), "config", None)
    if content is None or (set(content) <= _BUILT and set(content.get("zero_optimization", {})) <= _BUILT_ZERO):
        return said
    given = {key: value for key, value in content.items() if (key, value) != ("steps_per_print", float("inf"))}
    return {"hf_ds_config": given, "zero3_init_flag": bool(item.zero3_init_flag)}
