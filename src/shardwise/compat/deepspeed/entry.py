"""deepspeed.initialize, and the names beside it at the top of the package."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ...errors import ConfigError, OptimizerError
from ...front.entering import CheckedModel, into_engine
from ...ranks.ranks import Ranks
from ...run.deepspeed_sections import make_optimizer, make_scheduler
from ...run.joined import join_run
from ...step.optimizer import ShardedOptimizer
from ...zero.sharded import find_sharded
from .. import libraries
from . import settings as reading
from .backwards import Backwards
from .comm import init_distributed
from .engine import DeepSpeedEngine, former_engine
from .optimizer import ZeroOptimizer, optimizer_class

logger = logging.getLogger("shardwise")

ENVIRONMENT_NAME = ".deepspeed_env"
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
SchedulerCallable = Callable[[Optimizer], Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | OptimizerCallable | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, ZeroOptimizer | None, Any, Any]:
    """(engine, its optimizer, its data loader, its schedule); None for what there is none of. Collective.

    model:            stays the same object; what an earlier engine did to it is undone first.
    optimizer:        of torch, over the model's parameters; or a function of them. Without one the configuration's section
                      counts, over `model_parameters`. With neither, the engine evaluates, and no weight has a master or a
                      gradient.
    lr_scheduler:     an object, or a function of the optimizer; else the configuration's section.
    config:           a dictionary, path, or base64; config_params is its older name, and args.deepspeed_config a third.
    Raises ConfigError, PrepareError or OptimizerError, on every rank.
    """
    for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
        if value is not None:
            raise NotImplementedError(f"initialize: {name} is for model parallelism, which shardwise does not do.")
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    ranks = join_run()

    def checked() -> reading.Settings:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"initialize: model is {type(model).__name__}, which is no torch.nn.Module.")
        return reading.read(_source(args, config, config_params), ranks.world_size)

    settings = ranks.together(checked)
    assert model is not None
    _announce(settings, ranks)
    former, left = former_engine(model), find_sharded(model)
    if former is not None:
        former.destroy()
    elif left is not None:  # of an engine that the script has dropped
        left.release()
    raw = settings.raw
    driven = ranks.together(lambda: _optimizer_of(optimizer, model, model_parameters, raw))
    found = ranks.together(lambda: CheckedModel.of(model, settings.config))
    prepared = into_engine(found, settings.config, settings.plan, settings.precision, ranks, trains=driven is not None)
    scaler = settings.scaler()
    wrapped = None
    if driven is not None:
        stepper = ShardedOptimizer(
            driven, [prepared.sharded], scaler=scaler, gradient_clipping=settings.clipping or None, measures_norm=True
        )
        backwards = Backwards(prepared.sharded, settings.steps, sums=settings.sums, needs_scale=scaler.enabled)
        wrapped = optimizer_class(settings.stage)(driven, stepper, scaler, backwards)
    schedule = ranks.together(lambda: _schedule_of(lr_scheduler, driven, raw))
    loader = None if training_data is None else _loader(training_data, settings, ranks, collate_fn)
    engine = DeepSpeedEngine(prepared, wrapped, schedule, settings, loader)
    return engine, wrapped, loader, schedule


def _source(args: Any, config: Any, config_params: Any) -> Any:
    given = [
        source for source in (config, config_params, getattr(args, "deepspeed_config", None)) if source is not None
    ]
    if not given:
        raise ConfigError("initialize: no configuration was given. Pass config=, a dictionary or a path.")
    return given[0]


def _announce(settings: reading.Settings, ranks: Ranks) -> None:
    """What is in force and what is different on purpose, once, on rank 0."""
    if ranks.rank != 0:
        return
    if settings.clips_unsaid:
        libraries.say_once(
            f"the DeepSpeed configuration has no gradient_clipping: gradients are clipped at {reading.CLIPPING}, "
            "DeepSpeed's own default. Write gradient_clipping: 0 for none."
        )
    if settings.precision.compute is not None:
        libraries.say_once(
            "a loss that is NaN or infinite ends the run with NonFiniteError, where DeepSpeed goes on; in fp16 an overflow "
            "skips the step and halves the loss scale at once. Checkpoints are shardwise's own: see "
            "docs/design/deepspeed.md."
        )
    for note in settings.notes:
        logger.info(note)


def _optimizer_of(given: Any, model: nn.Module, parameters: Any, raw: dict[str, Any]) -> Optimizer | None:
    section = raw.get("optimizer")
    if given is None:
        if section is None:
            return None
        chosen = list(model.parameters() if parameters is None else parameters)
        made: Optimizer = make_optimizer(section, [p for p in chosen if isinstance(p, dict) or p.requires_grad])
        return made
    if isinstance(given, ZeroOptimizer):
        given = given.optimizer
    if callable(given) and not isinstance(given, Optimizer):
        given = given(list(model.parameters() if parameters is None else parameters))
    if not isinstance(given, Optimizer):
        raise OptimizerError(f"initialize: optimizer is a {type(given).__name__}, which is no torch.optim.Optimizer.")
    return given


def _schedule_of(given: Any, optimizer: Optimizer | None, raw: dict[str, Any]) -> Any:
    section = raw.get("scheduler")
    if optimizer is None:
        return None
    if given is not None:
        return given(optimizer) if callable(given) and not hasattr(given, "step") else given
    return None if section is None else make_scheduler(section, optimizer)


def _loader(data: Any, settings: reading.Settings, ranks: Ranks, collate_fn: Any) -> DataLoader[Any]:
    """Batches of this rank's part of `data`, as DeepSpeed's own loader gives them."""
    micro = settings.batch[1]
    if micro is None:
        raise ConfigError("initialize: training_data needs train_micro_batch_size_per_gpu or train_batch_size.")
    sampler: Any = DistributedSampler(data, ranks.world_size, ranks.rank)
    return DataLoader(
        data, batch_size=micro, sampler=sampler, collate_fn=collate_fn, pin_memory=ranks.device.type == "cuda"
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --deepspeed and --deepspeed_config to a parser."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", default=False, action="store_true", help="Train with the DeepSpeed engine.")
    group.add_argument("--deepspeed_config", default=None, type=str, help="The JSON file.")
    return parser


def init_inference(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        "init_inference: shardwise has no inference engine. initialize(model=...) without an optimizer evaluates and "
        "generates, sharded."
    )


def tp_model_init(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("tp_model_init: shardwise does no tensor parallelism. Remove tensor_parallel.")
