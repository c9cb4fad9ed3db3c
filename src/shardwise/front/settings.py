"""From an Accelerator's arguments and the launcher's configuration to the settings in force. No collectives here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..building.loading import build_without_memory
from ..config.accelerate_variables import configuration
from ..config.agreement import SAME_EVERYWHERE, disagreement, settings_of
from ..config.check import merged
from ..config.environment import RankEnvironment, torch_debug
from ..config.schema import Config
from ..data.prepare import DataLoaderConfiguration
from ..errors import ConfigError
from ..plan.plan import Plan
from ..plan.precision import LossScaler, Precision
from ..ranks.agreeing import attempt
from ..ranks.meeting import versions
from ..ranks.ranks import Ranks
from ..run.accumulation import GradientAccumulationPlugin
from ..run.deepspeed_plugins import Plugins, adopted, merge_plugins
from ..run.dynamo import TorchDynamoPlugin
from ..run.joined import check_device, configuration_in_force, join_first
from ..run.plugins import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
)
from ..run.tracking import filter_trackers

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


@dataclass(frozen=True)
class Settings:
    """What an Accelerator works by: its arguments over the launcher's configuration, checked.

    plugins: of the script, or one of the configuration; None in a run without ZeRO settings.
    steps:   micro-batches per optimizer step. accumulation: the rest about them. accumulates: whether the script has said them;
             False where those of an earlier Accelerator hold.
    loading: how data loaders are prepared. project: where checkpoints and logs go. log_with: names of trackers, and trackers.
    """

    config: Config
    plugins: Plugins
    steps: int
    accumulation: GradientAccumulationPlugin
    accumulates: bool
    handlers: dict[type, Any]
    timeout_s: float
    precision: Precision
    scaler: LossScaler
    plan: Plan
    loading: DataLoaderConfiguration
    project: ProjectConfiguration
    log_with: list[Any]
    plugin_name: str | None
    rng_types: list[str]
    device_placement: bool
    step_scheduler_with_optimizer: bool

    def facts(self) -> dict[str, Any]:
        """What all ranks must have in common, as plain JSON values by the name that an error gives them."""
        found = {**versions(), **settings_of(self.config)}
        # The configuration's or the script's: what counts is what is in force.
        del found["deepspeed_config.gradient_accumulation_steps"]
        found["shardwise_config.collective_timeout_s"] = self.timeout_s
        found["TORCH_DISTRIBUTED_DEBUG"] = torch_debug()
        found |= facts_of_steps(self.steps, self.accumulation, self.step_scheduler_with_optimizer)
        found |= facts_of_loading(self.loading, self.rng_types, self.device_placement)
        for kind in (GradScalerKwargs, AutocastKwargs):
            for name, value in asdict(self.handlers.get(kind) or kind()).items():
                found[f"{kind.__name__}.{name}"] = value
        return found


def facts_of_steps(steps: int, accumulation: GradientAccumulationPlugin, with_optimizer: bool) -> dict[str, Any]:
    return {
        "gradient_accumulation_steps": steps,
        "GradientAccumulationPlugin.adjust_scheduler": accumulation.adjust_scheduler,
        "GradientAccumulationPlugin.sync_with_dataloader": accumulation.sync_with_dataloader,
        "Accelerator.step_scheduler_with_optimizer": with_optimizer,
    }


def facts_of_loading(loading: DataLoaderConfiguration, rng_types: Sequence[str], placed: bool) -> dict[str, Any]:
    # How copies to the device are made is each rank's own.
    given = {name: value for name, value in asdict(loading).items() if name != "non_blocking"}
    return {
        **{f"DataLoaderConfiguration.{name}": value for name, value in given.items()},
        "Accelerator.rng_types": list(rng_types),
        "Accelerator.device_placement": placed,
    }


def resolve(
    *,
    mixed_precision: Any,
    cpu: bool,
    dynamo_backend: Any,
    dynamo_plugin: TorchDynamoPlugin | None,
    plugins: Plugins,
    steps: int | None,
    accumulation: GradientAccumulationPlugin | None,
    kwargs_handlers: Sequence[Any] | None,
    loading: DataLoaderConfiguration,
    project: ProjectConfiguration,
    log_with: Any,
    rng_types: Sequence[str] | None,
    device_placement: bool,
    step_scheduler_with_optimizer: bool,
) -> Settings:
    """The settings in force. The arguments are the Accelerator's. Raises ConfigError.

    The configuration of an Accelerator that lives holds for what the script does not say to this one.
    """
    in_force = configuration_in_force()
    accumulates = in_force is None or steps is not None or accumulation is not None
    trackers = filter_trackers(log_with, project.logging_dir)
    handlers = handlers_by_type(kwargs_handlers)
    steps = 1 if steps is None else steps
    config, steps, plugins = _configured(in_force, mixed_precision, cpu, plugins, steps, accumulation)
    config = _compiling(config, dynamo_backend, dynamo_plugin)
    types = ["generator"] if rng_types is None else list(rng_types)
    if set(types) - {"generator", "torch", "cuda"}:
        raise ConfigError(f"rng_types is {types}; it can hold 'generator', 'torch' and 'cuda'.")
    engine = config.engine
    group: InitProcessGroupKwargs | None = handlers.get(InitProcessGroupKwargs)
    given = None if group is None or group.timeout is None else group.timeout.total_seconds()
    precision = Precision.named(config.mixed_precision, engine.reduce_dtype)
    return Settings(
        config=config,
        plugins=plugins,
        steps=steps,
        accumulation=accumulation or GradientAccumulationPlugin(),
        accumulates=accumulates,
        handlers=handlers,
        timeout_s=engine.collective_timeout_s if given is None else given,
        precision=precision,
        scaler=loss_scaler(config, precision, handlers.get(GradScalerKwargs)),
        plan=plan_of(config),
        loading=loading,
        project=project,
        log_with=trackers,
        plugin_name=next(iter(plugins)) if isinstance(plugins, dict) else None,
        rng_types=types,
        device_placement=device_placement,
        step_scheduler_with_optimizer=step_scheduler_with_optimizer,
    )


def _compiling(config: Config, backend: Any, plugin: TorchDynamoPlugin | None) -> Config:
    """The configuration with what the script says of torch.compile."""
    if plugin is None:
        return merged(config, dynamo_backend=getattr(backend, "value", backend))
    if not isinstance(plugin, TorchDynamoPlugin):
        raise ConfigError(f"Accelerator: dynamo_plugin is a {type(plugin).__name__}, not a TorchDynamoPlugin.")
    if backend is not None:
        raise ConfigError("Accelerator: dynamo_backend and dynamo_plugin are given. Give one of them.")
    return plugin.merged_into(config)


def plan_of(config: Config) -> Plan:
    """What a configuration shards, and where it rests."""
    zero = config.zero
    return Plan.from_stage(
        zero.zero_stage,
        offload_optimizer=zero.offload_optimizer_device,
        offload_param=zero.offload_param_device,
    )


def join_with(checked: Callable[[], Settings]) -> tuple[Ranks, Settings]:
    """The run's ranks and the settings that `checked` gives, once all ranks are known to have the same. Collective.

    Raises ConfigError on every rank if they differ; what `checked` raises on one rank, and RankError on the others.
    """
    settings, problem = attempt(checked)
    if settings is None:
        ranks = join_first(Config(), problem=problem)
    else:
        ranks = join_first(settings.config, timeout_s=settings.timeout_s)

    def facts() -> dict[str, Any]:
        if problem is not None:
            raise problem
        assert settings is not None
        check_device(ranks, settings.config.use_cpu)
        if settings.config.zero.zero_stage:
            ranks.division(settings.config.zero.shard_group)  # of groups that cannot be it raises
        return settings.facts()

    differing = ranks.compare(facts, "`Accelerator()`")
    if differing:
        raise ConfigError(disagreement("{ranks} have different settings", differing, SAME_EVERYWHERE))
    assert settings is not None
    return ranks, settings


def act_on_process(settings: Settings) -> None:
    """Do what settings change in this process as a whole: threads, how models are built from here on, steps of accumulation."""
    engine, zero = settings.config.engine, settings.config.zero
    if engine.threads_per_rank is not None:
        torch.set_num_threads(engine.threads_per_rank)
    build_without_memory(zero.zero3_init_flag and zero.zero_stage == 3)
    settings.accumulation.num_steps = settings.steps


def project_of(given: ProjectConfiguration | None, folder: str | os.PathLike[str] | None) -> ProjectConfiguration:
    """Where checkpoints and logs go. folder: the project_dir that the script names beside `given`, which holds."""
    project = given or ProjectConfiguration(project_dir=folder)
    if folder is not None and project.project_dir is None:
        project.set_directories(folder)
    return project


def loading_of(given: DataLoaderConfiguration | None, split_batches: bool | None) -> DataLoaderConfiguration:
    """How loaders are prepared. split_batches: overrules `given` where the script says it."""
    loading = given or DataLoaderConfiguration()
    if split_batches is not None:
        loading.split_batches = split_batches
    return loading


def refuse_others(**arguments: Any) -> None:
    """ConfigError for an argument of the Accelerator that belongs to another way to shard, if it is given."""
    for name, value in arguments.items():
        if value is None:
            continue
        raise ConfigError(
            f"Accelerator: {name} is for another way to shard. Use zero_stage (0 to 3) in the configuration, or "
            "deepspeed_plugin=DeepSpeedPlugin(zero_stage=3)."
        )


def _configured(
    in_force: Config | None,
    mixed_precision: Any,
    cpu: bool,
    plugins: Plugins,
    steps: int,
    accumulation: GradientAccumulationPlugin | None,
) -> tuple[Config, int, Plugins]:
    """The configuration in force, the accumulation steps, and the plugins, which show it."""
    config, notes = (in_force, []) if in_force is not None else configuration()
    _say_once(notes)
    if accumulation is not None and accumulation.num_steps is not None:
        if steps not in (1, accumulation.num_steps):
            raise ConfigError(
                f"gradient_accumulation_steps is {steps}, but gradient_accumulation_plugin says "
                f"{accumulation.num_steps}. Give one of them."
            )
        steps = accumulation.num_steps
    precision = getattr(mixed_precision, "value", mixed_precision)
    config = merged(config, mixed_precision=precision, cpu=cpu or None)
    configs = merge_plugins(plugins, config)
    config = next(iter(configs.values()), config)
    GradientAccumulationPlugin(num_steps=steps)  # refuses what is no whole number
    if accumulation is not None and accumulation.sync_each_batch and RankEnvironment.read().rank == 0:
        logger.warning(
            "sync_each_batch has no effect: zero_stage 2 and 3 reduce every micro-batch anyway, and 0 and 1 add them "
            "up locally with the same result."
        )
    said = config.zero.gradient_accumulation_steps
    if said is not None:
        merged(config, gradient_accumulation_steps=steps)  # says which of the two holds
    steps = steps if said is None else said
    return config, steps, adopted(plugins, configs, config, steps)


_SAID: set[str] = set()


def _say_once(notes: Sequence[str]) -> None:
    """Log on rank 0 what no Accelerator of this process has told yet."""
    for note in notes:
        if note not in _SAID and RankEnvironment.read().rank == 0:
            logger.warning(note)
        _SAID.add(note)


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
    return LossScaler.for_precision(
        precision,
        init_scale=said.initial if said.static is None else said.static,
        growth_interval=said.growth_interval,
        min_scale=said.minimum,
        dynamic=said.static is None,
    )
