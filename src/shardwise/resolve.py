"""From an Accelerator's arguments and the launcher's configuration to the settings in force. No collectives here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .accumulation import GradientAccumulationPlugin
from .config.environment import RankEnvironment
from .config.schema import Config
from .errors import ConfigError
from .plugins import (
    AutocastKwargs,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from .zero.precision import LossScaler, Precision

logger = logging.getLogger("shardwise")

_HANDLERS = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)


def handlers_by_type(handlers: Sequence[Any] | None) -> dict[type, Any]:
    found: dict[type, Any] = {}
    for handler in handlers or ():
        if not isinstance(handler, _HANDLERS):
            raise ConfigError(
                f"kwargs_handlers: a {type(handler).__name__} is not one of "
                f"{', '.join(kind.__name__ for kind in _HANDLERS)}."
            )
        if type(handler) in found:
            raise ConfigError(f"kwargs_handlers has two objects of type {type(handler).__name__}.")
        found[type(handler)] = handler
    return found


def resolve(
    mixed_precision: Any,
    cpu: bool,
    plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None,
    steps: int,
    accumulation: GradientAccumulationPlugin | None,
) -> tuple[Config, int]:
    """The configuration in force, and the accumulation steps."""
    config = Config.from_environment()
    if isinstance(plugins, dict):
        if len(plugins) != 1:
            raise ConfigError(
                f"deepspeed_plugins has {len(plugins)} entries; one Accelerator has one set of ZeRO settings. "
                "Two models under one setting (a frozen teacher, say) need no second plugin."
            )
        plugins = next(iter(plugins.values()))
    if accumulation is not None and accumulation.num_steps is not None:
        if steps not in (1, accumulation.num_steps):
            raise ConfigError(
                f"gradient_accumulation_steps is {steps}, but gradient_accumulation_plugin says "
                f"{accumulation.num_steps}. Give one of them."
            )
        steps = accumulation.num_steps
    config = config.merged(
        mixed_precision=getattr(mixed_precision, "value", mixed_precision),
        cpu=cpu or None,
        gradient_accumulation_steps=None,
    )
    if plugins is not None:
        config = plugins.merged_into(config)
    GradientAccumulationPlugin(num_steps=steps)  # refuses what is no whole number
    if accumulation is not None and accumulation.sync_each_batch and RankEnvironment.read().rank == 0:
        logger.warning(
            "sync_each_batch has no effect: zero_stage 2 and 3 reduce every micro-batch anyway, and 0 and 1 add them "
            "up locally with the same result."
        )
    said = config.zero.gradient_accumulation_steps
    if said is not None:
        config = config.merged(gradient_accumulation_steps=steps)  # says which of the two holds
        return config, said
    return config, steps


def loss_scaler(config: Config, precision: Precision, given: GradScalerKwargs | None) -> LossScaler:
    if given is not None:
        if precision.compute is torch.float16 and not given.enabled:
            return LossScaler(enabled=False)
        return LossScaler.for_precision(
            precision,
            init_scale=given.init_scale,
            growth_factor=given.growth_factor,
            backoff_factor=given.backoff_factor,
            growth_interval=given.growth_interval,
        )
    said = config.engine.loss_scale
    if said.hysteresis != 1:
        raise ConfigError(f"loss_scale.hysteresis is {said.hysteresis}: the scale falls at every overflow, which is 1.")
    return LossScaler.for_precision(
        precision,
        init_scale=said.initial if said.static is None else said.static,
        growth_interval=said.growth_interval,
        min_scale=said.minimum,
        dynamic=said.static is None,
    )
