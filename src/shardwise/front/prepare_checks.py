"""What `prepare` can know to be wrong before the ranks wait for each other. What they must share: `front/object_facts.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..data.prepare import PreparedLoader, check_data_loader
from ..errors import ConfigError, OptimizerError, PrepareError
from ..step.optimizer import find_sharded_optimizer
from ..step.plain import PlainOptimizer
from ..zero.sharded import find_sharded
from .entering import CheckedModel
from .run import Run

logger = logging.getLogger("shardwise")


def placements_of(run: Run, objects: Sequence[Any], given: Sequence[bool | None] | None) -> list[bool]:
    """Of each object, whether it is put on the device. given: as the script says; None takes the Accelerator's answer."""
    flags = [None] * len(objects) if given is None else list(given)
    if len(flags) != len(objects):
        raise PrepareError(f"device_placement has {len(flags)} entries for {len(objects)} objects.")
    placements = [run.device_placement if flag is None else flag for flag in flags]
    for item, placed in zip(objects, placements, strict=True):
        if isinstance(item, nn.Module) and not placed:
            devices = (p.device for p in item.parameters() if not p.is_meta)
            stray = next((device for device in devices if device.type != run.ranks.device.type), None)
            if stray is not None:
                raise PrepareError(
                    f"device_placement=False, but the model has parameters on {stray}: shards live on the "
                    f"rank's device, {run.ranks.device}. Move the model there, or leave placement on."
                )
    return placements


def check_objects(run: Run, objects: Sequence[Any]) -> list[CheckedModel]:
    """Everything that this rank can know to be wrong by itself; gives what was found of the models, in their order."""
    for item in objects:
        check_other(item)
    models = [item for item in objects if isinstance(item, nn.Module) and not is_in_force(run, item)]
    if models and run.precision.compute is not None and not run.native_amp:
        raise ConfigError(
            f"accelerator.native_amp was set to False, but mixed_precision is {run.config.mixed_precision}: the model would "
            "compute in 16 bits all the same. Make the Accelerator with mixed_precision='no'."
        )
    checked = []
    for index, model in enumerate(models):
        check_model(model)
        _check_apart(run, model, models[:index])
        checked.append(CheckedModel.of(model, run.config))
    known = {id(p) for model in models for p in model.parameters()}
    known = known.union(*(prepared.ids for prepared in run.models))
    for optimizer in (item for item in objects if isinstance(item, Optimizer)):
        if find_sharded_optimizer(optimizer) is None:
            check_optimizer(optimizer, known, bool(models or run.models), alone=run.ranks.world_size == 1)
    for entry in run.optimizers:
        if isinstance(entry.stepper, PlainOptimizer) and entry.stepper.holds(p for m in models for p in m.parameters()):
            check_optimizer(entry.optimizer, known, True, alone=False)
    loaders = [item for item in objects if isinstance(item, DataLoader)]
    for loader in loaders:
        if not isinstance(loader, PreparedLoader):
            check_data_loader(loader, run.ranks.world_size, run.dataloader_config)
    micro = micro_batch_size(run, loaders)
    if micro is not None:
        _check_batch_sizes(run, micro)
    return checked


def micro_batch_size(run: Run, loaders: Sequence[DataLoader[Any]]) -> int | None:
    """The batch size of one process that loaders of one call stand for; None where none of them tells."""
    sizes = [size for size in map(batch_size_of, loaders) if size is not None]
    if not sizes:
        return None
    chosen = max(sizes) if run.plugin is not None and not run.plugin.is_train_batch_min else min(sizes)
    return chosen // (run.ranks.world_size if run.dataloader_config.split_batches else 1)


def _check_batch_sizes(run: Run, micro: int) -> None:
    """Compare with what the configuration promises; what the script itself has written is its to know, and told."""
    plugin = run.plugin
    written = plugin is not None and plugin.open.wrote_batch_sizes
    try:
        run.config.check_batch_sizes(micro, run.ranks.world_size)
    except ConfigError as error:
        if not written:
            raise
        if run.is_main_process:
            logger.warning("deepspeed_config: %s The loaders' batches are what is trained on.", error)


def is_in_force(run: Run, model: nn.Module) -> bool:
    """Whether this run has prepared it as it would now: then it is given back as it is."""
    return any(prepared.model is model and prepared.sharded.plan == run.plan for prepared in run.models)


def _check_apart(run: Run, model: nn.Module, others: Sequence[nn.Module]) -> None:
    """Raise PrepareError for a model that is prepared, or shares weights with one that is or with `others` of this call."""
    if any(model is other for other in others):
        raise PrepareError(f"the same {type(model).__name__} is given to `prepare` twice. Give it once.")
    if find_sharded(model) is not None:
        raise PrepareError(
            f"this {type(model).__name__} is prepared already, by another Accelerator or with other settings. Use it as it is, "
            "or call free_memory() before preparing it anew."
        )
    shared = {id(p) for other in others for p in other.parameters()}
    shared = shared.union(*(prepared.ids for prepared in run.models))
    name = next((name for name, p in model.named_parameters() if id(p) in shared), None)
    if name is not None:
        raise PrepareError(
            f"{name} of this {type(model).__name__} also belongs to another prepared model. Prepare "
            "the one that contains both."
        )


def check_model(model: nn.Module) -> None:
    for module in model.modules():
        spread = getattr(module, "hf_device_map", None)
        if spread and len({str(device) for device in spread.values()}) > 1:
            raise PrepareError(
                f"this {type(model).__name__} was loaded with a device_map over {sorted(map(str, spread.values()))}. "
                "Load it without device_map: zero_stage 3 divides it over the ranks."
            )

    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise PrepareError(
            f"{lazy} of this {type(model).__name__} has no shape yet: its module is lazy. Run one batch through the model "
            "before `prepare`, and make the optimizer after that."
        )


def check_other(item: Any) -> None:
    """Raise OptimizerError for what looks like an optimizer and is none of torch's: it would pass through, and step nothing."""
    groups = getattr(item, "param_groups", None)
    if isinstance(item, (Optimizer, nn.Module, type)) or not isinstance(groups, (list, tuple)):
        return
    if any(isinstance(group, dict) and "params" in group for group in groups):
        name = type(item).__name__
        held = getattr(item, "__dict__", {}).items()
        inside = [f"its .{n}, a {type(v).__name__}" for n, v in held if isinstance(v, Optimizer)]
        raise OptimizerError(
            f"this {name} has parameter groups, but is no torch.optim.Optimizer: shardwise cannot step it. Give prepare the "
            f"optimizer that it wraps{f' ({inside[0]})' if inside else ''}, or make {name} a subclass of torch.optim.Optimizer."
        )


def check_optimizer(optimizer: Optimizer, known: set[int], any_model: bool, *, alone: bool) -> None:
    """Raise PrepareError or OptimizerError unless it can be driven.

    known: ids of the parameters of prepared models. alone: one process may step what belongs to none of them (see
    `step/plain.py`); of several nobody would average its gradients.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if alone and not held & known:
        return
    if not any_model:
        raise PrepareError(
            f"the {type(optimizer).__name__} is prepared before any model. Prepare its model first, or "
            "together with it."
        )
    for number, group in enumerate(optimizer.param_groups):
        strangers = sum(id(parameter) not in known for parameter in group["params"])
        if strangers:
            raise OptimizerError(
                f"{strangers} of the {len(group['params'])} parameters in group {number} of the "
                f"{type(optimizer).__name__} belong to no prepared model. Build the optimizer from the "
                "parameters of the model that is prepared (after get_peft_model, not before)."
            )


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    if isinstance(loader, PreparedLoader):
        return None
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None
