"""`Accelerator.prepare` and its like: objects go to the engine and the loaders once no rank has found a mistake; and back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..building.loading import building
from ..config.agreement import settings_of
from ..data.prepare import PreparedLoader, check_data_loader, skip_first_batches
from ..data.prepare import prepare_data_loader as loader_of_rank
from ..run.accumulation import GradientState
from ..run.scheduler import SCHEDULERS, Rhythm, Scheduler, is_prepared, release_scheduler
from ..run.scheduler import prepare_scheduler as set_rhythm
from ..step.optimizer import ShardedOptimizer
from ..step.plain import PlainOptimizer
from ..weights.integrations import generation as keep_for_generation
from ..zero.access import prepared_as
from .described import Described
from .entering import CheckedModel, into_engine
from .object_facts import facts_of, refuse_or_warn
from .prepare_checks import check_objects, is_in_force, placements_of
from .run import PreparedOptimizer, Run, mark_prepared
from .settings import facts_of_loading, facts_of_steps
from .training import give_no_sync, push_sync, take_no_sync

logger = logging.getLogger("shardwise")


@contextmanager
def init(run: Run) -> Iterator[None]:
    """Inside, models are built and loaded without memory; `prepare` gives each rank its shard. Collective at its end.

    Their large weights are on the meta device until then. What `from_config`, own modules' constructors, `from_pretrained`,
    PEFT and `resize_token_embeddings` do to them is recorded and gives the numbers of an ordinary build with the same
    seed. A safetensors checkpoint is read in prepare, by each rank its own bytes.
    An error inside is every rank's: a rank whose own block went well raises RankError.
    """
    with run.ranks.agreeing(), building():
        yield


@torch.inference_mode(False)  # what is made here outlives the mode of the script, and is trained
def prepare(run: Run, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
    """The objects, ready for the run, in the same order; a single one by itself. Collective.

    Models and optimizers and schedulers are the same objects as before; a DataLoader becomes one that reads this
    rank's part; a DummyOptim and a DummyScheduler what the configuration describes; anything else passes through. Any order
    and any number in one call or several.
    device_placement: per object; False leaves a loader's batches where they are.
    Raises PrepareError, OptimizerError or DataError on every rank, before any of them waits for another.
    """
    placements: list[bool] = []
    models: list[CheckedModel] = []
    described = Described()

    def facts() -> dict[str, Any]:
        run.take_plugin()
        placements.extend(placements_of(run, objects, device_placement))
        described.replace_dummies(run, objects)
        models.extend(check_objects(run, described.objects))
        return _facts(run, described.objects)

    refuse_or_warn(run.ranks.compare(facts, "`prepare`"), say=run.is_main_process)
    result = described.objects
    objects = tuple(result)
    described.show(run)
    for model in models:
        run.models.append(into_engine(model, run.config, run.plan, run.precision, run.ranks, in_fp32=True))
        run.models[-1].sharded.schedule.lending = run.lending
        mark_prepared(model.model)
        give_no_sync(run, model.model)
    push_sync(run)
    came = set().union(*(prepared.ids for prepared in run.models[len(run.models) - len(models) :]))
    for entry in run.optimizers:
        plain = entry.stepper
        if isinstance(plain, PlainOptimizer) and came & {id(p) for p in plain.parameters}:  # prepared before its model
            plain.undo()
            entry.stepper = _stepper(run, entry.optimizer)
    for item in objects:
        if isinstance(item, Optimizer) and not any(entry.optimizer is item for entry in run.optimizers):
            run.optimizers.append(PreparedOptimizer(item, _stepper(run, item)))
    for index, item in enumerate(objects):
        if isinstance(item, DataLoader):
            result[index] = _prepare_loader(run, item, placements[index])
        elif isinstance(item, SCHEDULERS):
            _prepare_scheduler(run, item, of_file=described.made(item))
    return result[0] if len(result) == 1 else tuple(result)


@contextmanager
def generation(run: Run, model: nn.Module) -> Iterator[None]:
    """Inside, `model` generates or is evaluated without gradients; ranks may run different numbers of forwards. Collective.

    As many weights stay gathered as `generation_memory_budget` allows, until the end; `generate` does the same by itself
    for one call. With all of them there is no collective inside. Train outside.
    Raises PrepareError if the model is not prepared.
    """
    sharded = prepared_as(model, "generation", run.ranks)
    with keep_for_generation(sharded), torch.no_grad():
        yield


def prepare_data_loader(
    run: Run,
    data_loader: DataLoader[Any],
    device_placement: bool | None = None,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
) -> Any:
    """As `prepare(data_loader)`, with a function that cuts dispatched batches; see `data.prepare_data_loader`."""
    run.ranks.together(lambda: check_data_loader(data_loader, run.ranks.world_size, run.dataloader_config))
    return _prepare_loader(run, data_loader, device_placement, slice_fn_for_dispatch)


def _facts(run: Run, objects: Sequence[Any]) -> dict[str, Any]:
    """What all ranks must have in common: they would wait for each other, or train different things."""
    plugin = GradientState().plugin
    again = [place for place, item in enumerate(objects) if isinstance(item, nn.Module) and is_in_force(run, item)]
    return {
        "the places of models that are prepared already": again,
        **({} if run.plugin is None else _settings(run)),
        **facts_of_steps(plugin.num_steps or 1, plugin, run.step_scheduler_with_optimizer),
        **facts_of_loading(run.dataloader_config, run.rng_types, run.device_placement),
        **facts_of(objects, [prepared.model for prepared in run.models], run.dataloader_config),
    }


def _settings(run: Run) -> dict[str, Any]:
    """Those that a script can change after `Accelerator()`, in its DeepSpeedPlugin."""
    found = settings_of(run.config)
    del found["deepspeed_config.gradient_accumulation_steps"]  # what is in force is said by `facts_of_steps`
    return found


def _stepper(run: Run, optimizer: Optimizer) -> ShardedOptimizer | PlainOptimizer:
    """What drives it from now on."""
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owners = [prepared.sharded for prepared in run.models if prepared.ids & ids]
    clipping = run.config.zero.gradient_clipping
    if owners:
        return ShardedOptimizer(optimizer, owners, scaler=run.scaler, gradient_clipping=clipping)
    logger.warning(
        "None of the parameters of this %s belongs to a prepared model: it steps them as in plain torch. If it was meant for a "
        "model that is prepared, make it from that model's parameters.",
        type(optimizer).__name__,
    )
    state = run.gradient_state
    return PlainOptimizer(
        optimizer, scaler=run.scaler, ends_step=lambda: state.sync_gradients, gradient_clipping=clipping
    )


def _prepare_loader(
    run: Run, loader: DataLoader[Any], placement: bool | None, slice_fn: Callable[..., Any] | None = None
) -> PreparedLoader:
    result = loader_of_rank(
        loader,
        run.ranks,
        run.dataloader_config,
        put_on_device=run.device_placement if placement is None else placement,
        rng_types=tuple(run.rng_types),
        slice_fn=slice_fn,
    )
    if not any(result is known for known in run.dataloaders):
        run.dataloaders.append(result)
    return result


def _prepare_scheduler(run: Run, scheduler: Scheduler, *, of_file: bool) -> None:
    """of_file: it stands in a DummyScheduler's place: its steps are the optimizer's, as in DeepSpeed."""
    times = 1
    if of_file:
        pass
    elif not run.dataloader_config.split_batches and run.config.engine.scheduler_steps_per_process:
        times = run.ranks.world_size
    if times > 1 and run.step_scheduler_with_optimizer and run.is_main_process and not run.schedulers:
        logger.warning(
            "Schedulers step %d times per optimizer step, once for each process, so that a schedule computed from "
            "the unprepared loader ends where it should. Set scheduler_steps_per_process: false in "
            "shardwise_config to step once.",
            times,
        )
    own = [entry for entry in run.optimizers if entry.optimizer is getattr(scheduler, "optimizer", None)]
    watched = own or run.optimizers

    def skipped() -> bool:
        return any(entry.stepper.step_was_skipped for entry in watched)

    known = is_prepared(scheduler)
    set_rhythm(scheduler, Rhythm(times, run.step_scheduler_with_optimizer, skipped))
    if not known:
        run.schedulers.append(scheduler)


def later_batches(loader: Any, num_batches: int) -> Any:
    """As `skip_first_batches` of a prepared loader; None for anything else."""
    return skip_first_batches(loader, num_batches) if isinstance(loader, PreparedLoader) else None


def verify_device_map(run: Run, model: nn.Module) -> bool:
    """True if parts of the model were spread over several devices by a device_map, which `prepare` refuses."""
    return any(len(set(getattr(module, "hf_device_map", None) or {0: 0}.values())) > 1 for module in model.modules())


def free_memory(run: Run, *objects: Any) -> list[None]:
    """Let go of everything prepared: models get whole weights back in place. Gives a None for each argument. Collective.

    Weights have the dtype in which they came; trained ones have the values of their masters, frozen ones those that they
    computed with. Prepared optimizers are done for: make new ones. Call it before `end_training`.
    """
    if run.watch is not None:
        run.watch.ends_pass()
    for prepared in run.models:
        prepared.release()
        mark_prepared(prepared.model, as_prepared=False)
        take_no_sync(prepared.model)
    for entry in run.optimizers:
        entry.release()
    for scheduler in run.schedulers:
        release_scheduler(scheduler)
    run.forget_prepared()
    gc.collect()
    if run.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return [None] * len(objects)
