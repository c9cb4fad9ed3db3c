"""`Accelerator.prepare`: the user's objects go to the engine and the loaders once no rank has found a mistake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..building.loading import building
from ..config.schema import Config
from ..data.prepare import DataLoaderConfiguration, PreparedLoader, check_data_loader, prepare_data_loader
from ..errors import PrepareError
from ..plan.plan import Plan
from ..plan.precision import LossScaler, Precision
from ..run.accumulation import GradientState
from ..run.process import PartialState
from ..run.scheduler import Rhythm, is_prepared, prepare_scheduler
from ..step.optimizer import ShardedOptimizer, find_sharded_optimizer
from ..tuning.losses import LeanLoss, LogitsLoss
from ..weights.integrations import generation as keep_for_generation
from ..zero.access import prepared_as
from ..zero.sharded import find_sharded
from .entering import PreparedModel, blocks_in_engine, into_engine
from .object_facts import facts_of, refuse_or_warn
from .prepare_checks import batch_size_of, check_model, check_optimizer, check_other
from .settings import facts_of_loading, facts_of_steps

logger = logging.getLogger("shardwise")


class PreparedOptimizer:
    """An optimizer in the engine."""

    def __init__(self, optimizer: Optimizer, stepper: ShardedOptimizer) -> None:
        self.optimizer = optimizer
        self.stepper = stepper

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it drives any of these: parameters of its model, or the shards that its groups hold now."""
        shards = {id(shard) for group in self.optimizer.param_groups for shard in group["params"]}
        return any(id(item) in shards for item in parameters) or self.stepper.holds(parameters)


class Preparing(PartialState):
    """The preparing verbs of an Accelerator, and what it has prepared."""

    device_placement: bool
    dataloader_config: DataLoaderConfiguration
    rng_types: list[str]
    step_scheduler_with_optimizer: bool
    _config: Config
    _plan: Plan
    _precision: Precision
    _scaler: LossScaler
    _models: list[PreparedModel]
    _optimizers: list[PreparedOptimizer]
    _schedulers: list[LRScheduler]
    _dataloaders: list[PreparedLoader]

    def _push_sync(self) -> None:
        raise NotImplementedError

    @contextmanager
    def init(self) -> Iterator[None]:
        """Inside, models are built and loaded without memory; `prepare` gives each rank its shard. Collective at its end.

        Their large weights are on the meta device until then. What `from_config`, own modules' constructors, `from_pretrained`,
        PEFT and `resize_token_embeddings` do to them is recorded and gives the numbers of an ordinary build with the same
        seed. A safetensors checkpoint is read in prepare, by each rank its own bytes.
        An error inside is every rank's: a rank whose own block went well raises RankError.
        """
        with self._ranks.agreeing(), building():
            yield

    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """The objects, ready for the run, in the same order; a single one by itself. Collective.

        Models and optimizers and schedulers are the same objects as before; a DataLoader becomes one that reads this
        rank's part; anything else passes through. Any order and any number in one call or several.
        device_placement: per object; False leaves a loader's batches where they are.
        Raises PrepareError, OptimizerError or DataError on every rank, before any of them waits for another.
        """

        placements: list[bool] = []

        def facts() -> dict[str, Any]:
            placements.extend(self._placements(objects, device_placement))
            self._check(objects)
            return self._facts(objects)

        refuse_or_warn(self._ranks.compare(facts, "`prepare`"), say=self.is_main_process)
        result = list(objects)
        for item in objects:
            if isinstance(item, nn.Module):
                self._prepare_model(item)
        for item in objects:
            if isinstance(item, Optimizer):
                self._prepare_optimizer(item)
        for index, item in enumerate(objects):
            if isinstance(item, DataLoader):
                result[index] = self._prepare_loader(item, placements[index])
            elif isinstance(item, LRScheduler):
                self._prepare_scheduler(item)
        return result[0] if len(result) == 1 else tuple(result)

    @contextmanager
    def generation(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` generates or is evaluated without gradients; ranks may run different numbers of forwards. Collective.

        As many weights stay gathered as `generation_memory_budget` allows, until the end; `generate` does the same by itself
        for one call. With all of them there is no collective inside. Train outside.
        Raises PrepareError if the model is not prepared.
        """
        sharded = prepared_as(model, "generation", self._ranks)
        with keep_for_generation(sharded), torch.no_grad():
            yield

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """As `prepare(model)`. evaluation_mode changes nothing: without an optimizer a model is only evaluated."""
        return self.prepare(model, device_placement=[device_placement])

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """As `prepare(optimizer)`; its model must have been prepared."""
        return self.prepare(optimizer, device_placement=[device_placement])

    def prepare_scheduler(self, scheduler: LRScheduler) -> Any:
        """As `prepare(scheduler)`."""
        return self.prepare(scheduler)

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """As `prepare(data_loader)`, with a function that cuts dispatched batches; see `data.prepare_data_loader`."""
        self._ranks.together(lambda: check_data_loader(data_loader, self.num_processes, self.dataloader_config))
        return self._prepare_loader(data_loader, device_placement, slice_fn_for_dispatch)

    def _placements(self, objects: Sequence[Any], given: Sequence[bool | None] | None) -> list[bool]:
        flags = [None] * len(objects) if given is None else list(given)
        if len(flags) != len(objects):
            raise PrepareError(f"device_placement has {len(flags)} entries for {len(objects)} objects.")
        placements = [self.device_placement if flag is None else flag for flag in flags]
        for item, placed in zip(objects, placements, strict=True):
            if isinstance(item, nn.Module) and not placed:
                devices = (p.device for p in item.parameters() if not p.is_meta)
                stray = next((device for device in devices if device.type != self.device.type), None)
                if stray is not None:
                    raise PrepareError(
                        f"device_placement=False, but the model has parameters on {stray}: shards live on the "
                        f"rank's device, {self.device}. Move the model there, or leave placement on."
                    )
        return placements

    def _check(self, objects: Sequence[Any]) -> None:
        """Everything that this rank can know to be wrong by itself."""
        for item in objects:
            check_other(item)
        models = [item for item in objects if isinstance(item, nn.Module)]
        for index, model in enumerate(models):
            check_model(model)
            blocks_in_engine(model, self._config)
            if self._config.engine.loss_chunk_tokens is not None:
                (LogitsLoss if self._config.engine.loss_keeps_logits else LeanLoss)(model).undo()
            shared = {id(p) for other in models[:index] for p in other.parameters()}
            if any(model is other for other in models[:index]):
                raise PrepareError(f"the same {type(model).__name__} is given to `prepare` twice. Give it once.")
            if find_sharded(model) is not None:
                raise PrepareError(
                    f"this {type(model).__name__} is prepared already. A prepared model stays the same object: "
                    "use it as it is, or call free_memory() before preparing it anew."
                )
            for prepared in self._models:
                shared |= prepared.ids
            name = next((name for name, p in model.named_parameters() if id(p) in shared), None)
            if name is not None:
                raise PrepareError(
                    f"{name} of this {type(model).__name__} also belongs to another prepared model. Prepare "
                    "the one that contains both."
                )
        known = {id(p) for model in models for p in model.parameters()}
        known = known.union(*(prepared.ids for prepared in self._models))
        for optimizer in (item for item in objects if isinstance(item, Optimizer)):
            if find_sharded_optimizer(optimizer) is None:
                check_optimizer(optimizer, known, bool(models or self._models))
        loaders = [item for item in objects if isinstance(item, DataLoader)]
        for loader in loaders:
            if not isinstance(loader, PreparedLoader):
                check_data_loader(loader, self.num_processes, self.dataloader_config)
        sizes = [size for size in map(batch_size_of, loaders) if size is not None]
        if sizes:
            micro = min(sizes) // (self.num_processes if self.dataloader_config.split_batches else 1)
            self._config.check_batch_sizes(micro, self.num_processes)

    def _facts(self, objects: Sequence[Any]) -> dict[str, Any]:
        """What all ranks must have in common: they would wait for each other, or train different things."""
        plugin = GradientState().plugin
        return {
            **facts_of_steps(plugin.num_steps or 1, plugin, self.step_scheduler_with_optimizer),
            **facts_of_loading(self.dataloader_config, self.rng_types, self.device_placement),
            **facts_of(objects, [prepared.model for prepared in self._models], self.dataloader_config),
        }

    def _prepare_model(self, model: nn.Module) -> None:
        self._models.append(into_engine(model, self._config, self._plan, self._precision, self._ranks))
        self._push_sync()

    def _prepare_optimizer(self, optimizer: Optimizer) -> None:
        if find_sharded_optimizer(optimizer) is not None:
            return
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owners = [prepared.sharded for prepared in self._models if prepared.ids & ids]
        stepper = ShardedOptimizer(
            optimizer, owners, scaler=self._scaler, gradient_clipping=self._config.zero.gradient_clipping
        )
        self._optimizers.append(PreparedOptimizer(optimizer, stepper))

    def _prepare_loader(
        self, loader: DataLoader[Any], placement: bool | None, slice_fn: Callable[..., Any] | None = None
    ) -> PreparedLoader:
        result = prepare_data_loader(
            loader,
            self._ranks,
            self.dataloader_config,
            put_on_device=self.device_placement if placement is None else placement,
            rng_types=tuple(self.rng_types),
            slice_fn=slice_fn,
        )
        if not any(result is known for known in self._dataloaders):
            self._dataloaders.append(result)
        return result

    def _prepare_scheduler(self, scheduler: LRScheduler) -> None:
        times = 1
        if not self.dataloader_config.split_batches and self._config.engine.scheduler_steps_per_process:
            times = self.num_processes
        if times > 1 and self.step_scheduler_with_optimizer and self.is_main_process and not self._schedulers:
            logger.warning(
                "Schedulers step %d times per optimizer step, once for each process, so that a schedule computed from "
                "the unprepared loader ends where it should. Set scheduler_steps_per_process: false in "
                "shardwise_config to step once.",
                times,
            )
        own = [entry for entry in self._optimizers if entry.optimizer is getattr(scheduler, "optimizer", None)]
        watched = own or self._optimizers

        def skipped() -> bool:
            return any(entry.stepper.step_was_skipped for entry in watched)

        known = is_prepared(scheduler)
        prepare_scheduler(scheduler, Rhythm(times, self.step_scheduler_with_optimizer, skipped))
        if not known:
            self._schedulers.append(scheduler)

    def verify_device_map(self, model: nn.Module) -> bool:
        """True if parts of the model were spread over several devices by a device_map, which `prepare` refuses."""
        return any(
            len(set(getattr(module, "hf_device_map", None) or {0: 0}.values())) > 1 for module in model.modules()
        )
