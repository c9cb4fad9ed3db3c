"""The Accelerator: a script's one object, over the engine, the loaders and the run's state.

It holds what a script prepared and passes each call to the part that does it; it has no numerics of its own. The user's
model, optimizer and scheduler stay the same objects: the engine works below them. `prepare` checks everything on every
rank before the first collective, so that a mistake is one error on all ranks.

    process.py    who goes first, printing, splitting (inherited)
    data.py       prepared loaders                       scheduler.py   schedulers that step with the optimizer
    zero/         models and optimizers                  tracking.py, plugins.py, checkpoint/export.py
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from . import nested
from .checkpoint.export import save_weights
from .config.environment import RankEnvironment
from .config.schema import Config
from .data import DataLoaderConfiguration, PreparedLoader, check_data_loader, drop_repeats, prepare_data_loader
from .data import skip_first_batches as skip_batches_of
from .errors import ConfigError, OptimizerError, PrepareError, ShardwiseError
from .integrations import connect
from .plugins import (
    AutocastKwargs,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
)
from .process import (
    AcceleratorState,
    DistributedType,
    GradientAccumulationPlugin,
    GradientState,
    PartialState,
    join_run,
    leave_run,
    remember_accelerator,
)
from .scheduler import Rhythm, is_prepared, prepare_scheduler
from .tracking import TensorBoardTracker, check_trackers
from .zero.optimizer import ShardedOptimizer, find_sharded_optimizer
from .zero.plan import Plan
from .zero.precision import LossScaler, Precision
from .zero.sharded import ShardedModel, find_sharded

logger = logging.getLogger("shardwise")

_HANDLERS = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
_CHECKPOINTS = (
    "comes with shardwise's checkpoint release and is not in this version. Until then: save_model or "
    "get_state_dict for the weights, and `save` for anything else."
)


class _PreparedModel:
    """A model in the engine, and the parameters that it had when it went in."""

    def __init__(self, model: nn.Module, sharded: ShardedModel, parameters: list[nn.Parameter]) -> None:
        self.model = model
        self.sharded = sharded
        self.parameters = parameters
        self.ids = {id(parameter) for parameter in parameters}
        self.quiet = 0  # how many no_sync blocks are open


class _PreparedOptimizer:
    """An optimizer in the engine."""

    def __init__(self, optimizer: Optimizer, stepper: ShardedOptimizer) -> None:
        self.optimizer = optimizer
        self.stepper = stepper

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it drives any of these: parameters of its model, or the shards that its groups hold now."""
        shards = {id(shard) for group in self.optimizer.param_groups for shard in group["params"]}
        return any(id(item) in shards for item in parameters) or self.stepper.holds(parameters)


class Accelerator(PartialState):
    """Prepares a script's objects for the run that it was launched in.

    The arguments are accelerate's. What the launcher's configuration says holds; a keyword given here overrules it,
    except gradient_accumulation_steps, where the configuration wins. fsdp, megatron, tensor-parallel and dynamo plugins
    are refused.
    step_scheduler_with_optimizer: False makes a prepared scheduler step whenever its `step` is called.
    rng_types: generators that take rank 0's state when an epoch starts: "generator" (a sampler's own), "torch", "cuda".
    log_with:  trackers; see `tracking.py`.
    Raises ConfigError.
    """

    def __init__(  # noqa: PLR0917 - accelerate's signature
        self,
        device_placement: bool = True,
        split_batches: bool | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: Sequence[str] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[Any] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: Any = None,
        deepspeed_plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        parallelism_config: Any = None,
    ) -> None:
        for name, value in (
            ("fsdp_plugin", fsdp_plugin),
            ("torch_tp_plugin", torch_tp_plugin),
            ("megatron_lm_plugin", megatron_lm_plugin),
            ("parallelism_config", parallelism_config),
        ):
            if value is not None:
                raise ConfigError(
                    f"Accelerator: {name} is for another way to shard. Use zero_stage (0 to 3) in the "
                    "configuration, or deepspeed_plugin=DeepSpeedPlugin(zero_stage=3)."
                )
        backend = getattr(dynamo_backend, "value", dynamo_backend)
        if dynamo_plugin is not None or str(backend or "no").lower() != "no":
            raise ConfigError(
                "Accelerator: torch.compile is not started by this version. Leave dynamo_backend out, and "
                "compile the model's blocks yourself before `prepare`."
            )
        handlers = _by_type(kwargs_handlers)
        self._config, steps = _resolve(
            mixed_precision,
            cpu,
            deepspeed_plugins or deepspeed_plugin,
            gradient_accumulation_steps,
            gradient_accumulation_plugin,
        )
        group: InitProcessGroupKwargs | None = handlers.get(InitProcessGroupKwargs)
        timeout = None if group is None or group.timeout is None else group.timeout.total_seconds()
        engine = self._config.engine
        # Both before the first collective: `Ranks.join` is one.
        self._ranks = join_run(
            use_cpu=self._config.use_cpu, timeout_s=engine.collective_timeout_s if timeout is None else timeout
        )
        if engine.threads_per_rank is not None:
            torch.set_num_threads(engine.threads_per_rank)
        self._plugin = DeepSpeedPlugin.in_force(self._config)
        self._precision = Precision.named(self._config.mixed_precision, engine.reduce_dtype)
        self._scaler = _loss_scaler(self._config, self._precision, handlers.get(GradScalerKwargs))
        zero = self._config.zero
        self._plan = Plan.from_stage(
            zero.zero_stage,
            offload_optimizer=zero.offload_optimizer_device,
            offload_param=zero.offload_param_device,
        )
        self.device_placement = device_placement
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        if split_batches is not None:
            self.dataloader_config.split_batches = split_batches
        self.rng_types = list(rng_types) if rng_types is not None else ["generator"]
        if set(self.rng_types) - {"generator", "torch", "cuda"}:
            raise ConfigError(f"rng_types is {self.rng_types}; it can hold 'generator', 'torch' and 'cuda'.")
        self.project_configuration = project_config or ProjectConfiguration(project_dir=project_dir)
        if project_dir is not None and self.project_configuration.project_dir is None:
            self.project_configuration.set_directories(project_dir)
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self._autocast = handlers.get(AutocastKwargs) or AutocastKwargs()
        self._profile = handlers.get(ProfileKwargs) or ProfileKwargs()
        self._log_with = check_trackers(log_with, self.logging_dir)
        self.trackers: list[Any] = []
        plugin = gradient_accumulation_plugin or GradientAccumulationPlugin()
        plugin.num_steps = steps
        self.gradient_state = GradientState()
        GradientState.configure(plugin, _listener(self))
        self._models: list[_PreparedModel] = []
        self._optimizers: list[_PreparedOptimizer] = []
        self._schedulers: list[LRScheduler] = []
        self._dataloaders: list[PreparedLoader] = []
        self._custom_objects: list[Any] = []
        self._trigger = False
        self.step = 0
        remember_accelerator(self)

    def __repr__(self) -> str:
        return (
            f"Accelerator({self._plan}; mixed precision {self.mixed_precision}, rank {self.process_index} of {self.num_processes})"
        )

    # What the run is.

    @property
    def state(self) -> AcceleratorState:
        return AcceleratorState(accelerator=self)

    @property
    def distributed_type(self) -> DistributedType:
        return DistributedType.DEEPSPEED if self._plugin is not None else super().distributed_type

    @property
    def mixed_precision(self) -> str:
        """ "no", "fp16" or "bf16"."""
        return self._config.mixed_precision

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The ZeRO settings in force, or None in a run without them."""
        return self._plugin

    @property
    def scaler(self) -> LossScaler | None:
        """The fp16 loss scale; None in other precisions."""
        return self._scaler if self._scaler.enabled else None

    @property
    def multi_device(self) -> bool:
        return self.use_distributed

    @property
    def split_batches(self) -> bool:
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        return self.dataloader_config.use_stateful_dataloader

    @property
    def project_dir(self) -> str | os.PathLike[str] | None:
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | os.PathLike[str] | None:
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        return self.project_configuration.iteration

    @property
    def should_save_model(self) -> bool:
        """True on the process that `save_model` writes on."""
        return self.is_main_process

    # Accumulation.

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch ends an optimizer step."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self.gradient_state.plugin.num_steps = GradientAccumulationPlugin(num_steps=value).num_steps

    def _push_sync(self) -> None:
        for prepared in self._models:
            prepared.sharded.sync_gradients = self.sync_gradients and not prepared.quiet

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """One micro-batch of `gradient_accumulation_steps`; the last batch of a loader ends a step in any case.

        Inside, optimizer.step(), optimizer.zero_grad() and a prepared scheduler's step() act only where a step ends.
        """
        state = self.gradient_state
        if state.sync_with_dataloader and state.end_of_dataloader:
            self.step = 0
            self.sync_gradients = True
        else:
            self.step += 1
            self.sync_gradients = self.step % state.num_steps == 0
        yield

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Backward passes inside only accumulate the gradients of `model`."""
        found = [prepared for prepared in self._models if prepared.model is model]
        for prepared in found:
            prepared.quiet += 1
        self._push_sync()
        try:
            yield
        finally:
            for prepared in found:
                prepared.quiet -= 1
            self._push_sync()

    @contextmanager
    def join_uneven_inputs(self, joinables: Sequence[Any], even_batches: bool | None = None) -> Iterator[None]:
        """Nothing needs joining while the ranks read equally many batches, as they do by default: then it does nothing.

        Raises ShardwiseError for even_batches=False with more than one rank: a rank without a batch cannot take part in
        the gathers of the others' forward.
        """
        even = self.even_batches if even_batches is None else even_batches
        if self.use_distributed and not even:
            raise ShardwiseError(
                "join_uneven_inputs: with even_batches=False the ranks read different numbers of batches, "
                "and a rank that has none left cannot take part in the others' gathers. Leave "
                "even_batches on; gather_for_metrics drops the repeated samples."
            )
        yield

    # Preparing.

    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """The objects, ready for the run, in the same order; a single one by itself. Collective.

        Models and optimizers and schedulers are the same objects as before; a DataLoader becomes one that reads this
        rank's part; anything else passes through. Any order and any number in one call or several.
        device_placement: per object; False leaves a loader's batches where they are.
        Raises PrepareError, OptimizerError or DataError on every rank, before any of them waits for another.
        """
        problem: Exception | None = None
        try:
            placements = self._placements(objects, device_placement)
            self._check(objects)
        except Exception as error:
            problem = error
        self._ranks.agree(problem)
        self._agree_on_objects(objects)
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
        problem: Exception | None = None
        try:
            check_data_loader(data_loader, self.num_processes, self.dataloader_config)
        except Exception as error:
            problem = error
        self._ranks.agree(problem)
        return self._prepare_loader(data_loader, device_placement, slice_fn_for_dispatch)

    def _placements(self, objects: Sequence[Any], given: Sequence[bool | None] | None) -> list[bool]:
        flags = [None] * len(objects) if given is None else list(given)
        if len(flags) != len(objects):
            raise PrepareError(f"device_placement has {len(flags)} entries for {len(objects)} objects.")
        placements = [self.device_placement if flag is None else flag for flag in flags]
        for item, placed in zip(objects, placements, strict=True):
            if isinstance(item, nn.Module) and not placed:
                stray = next((p.device for p in item.parameters() if p.device.type != self.device.type), None)
                if stray is not None:
                    raise PrepareError(
                        f"device_placement=False, but the model has parameters on {stray}: shards live on the "
                        f"rank's device, {self.device}. Move the model there, or leave placement on."
                    )
        return placements

    def _check(self, objects: Sequence[Any]) -> None:
        """Everything that this rank can know to be wrong by itself."""
        models = [item for item in objects if isinstance(item, nn.Module)]
        for index, model in enumerate(models):
            _check_model(model)
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
                _check_optimizer(optimizer, known, bool(models or self._models))
        loaders = [item for item in objects if isinstance(item, DataLoader)]
        for loader in loaders:
            if not isinstance(loader, PreparedLoader):
                check_data_loader(loader, self.num_processes, self.dataloader_config)
        sizes = [size for size in map(_batch_size, loaders) if size is not None]
        if sizes:
            micro = min(sizes) // (self.num_processes if self.split_batches else 1)
            self._config.check_batch_sizes(micro, self.num_processes)

    def _agree_on_objects(self, objects: Sequence[Any]) -> None:
        """Raise PrepareError on every rank if the ranks prepare different things: they would wait for each other."""
        rows = self._ranks.gather_objects([_describe(item, self.dataloader_config) for item in objects])
        for rank, row in enumerate(rows):
            if row != rows[0]:
                differing = [(a, b) for a, b in zip(rows[0], row, strict=False) if a != b]
                first = (
                    f"{differing[0][0]} and {differing[0][1]}"
                    if differing
                    else f"{len(rows[0])} and {len(row)} objects"
                )
                raise PrepareError(
                    f"`prepare` got different objects on ranks 0 and {rank}: {first}. Build the same model and "
                    "data on every rank; `prepare` divides them."
                )

    def _prepare_model(self, model: nn.Module) -> None:
        engine = self._config.engine
        parameters = list(model.parameters())
        sharded = ShardedModel(
            model,
            plan=self._plan,
            ranks=self._ranks,
            precision=self._precision,
            prefetch=engine.prefetch_units,
            units=engine.units,
            whole_adapters="auto" if isinstance(engine.whole_adapters, str) else engine.whole_adapters,
        )
        connect(model)
        self._models.append(_PreparedModel(model, sharded, parameters))
        self._push_sync()

    def _prepare_optimizer(self, optimizer: Optimizer) -> None:
        if find_sharded_optimizer(optimizer) is not None:
            return
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owners = [prepared.sharded for prepared in self._models if prepared.ids & ids]
        stepper = ShardedOptimizer(
            optimizer, owners, scaler=self._scaler, gradient_clipping=self._config.zero.gradient_clipping
        )
        self._optimizers.append(_PreparedOptimizer(optimizer, stepper))

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
        if not self.split_batches and self._config.engine.scheduler_steps_per_process:
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

    # Training.

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward of the loss divided by the accumulation steps, and scaled in fp16. kwargs go to torch's backward."""
        self._push_sync()
        for entry in self._optimizers:
            entry.stepper.note_loss(loss)
        if self.gradient_accumulation_steps > 1:
            loss = loss / self.gradient_accumulation_steps
        self._scaler.scale(loss).backward(**kwargs)  # type: ignore[no-untyped-call]

    def _stepper_of(self, parameters: Iterable[Tensor] | Tensor, verb: str) -> tuple[ShardedOptimizer, list[Tensor]]:
        items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        owners = [entry for entry in self._optimizers if entry.holds(items)]
        if not owners:
            raise PrepareError(
                f"{verb}: none of these parameters belongs to a prepared optimizer. Prepare the model and its "
                "optimizer, and pass model.parameters()."
            )
        if len(owners) > 1:
            raise PrepareError(
                f"{verb}: these parameters belong to {len(owners)} optimizers. Call it once for each, with "
                "that optimizer's parameters."
            )
        return owners[0].stepper, items

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clip the gradients of this step to a global norm, and give the norm before clipping, over all ranks.

        None, without clipping, while gradients are only accumulated: they have no norm yet.
        """
        if not self.sync_gradients:
            return None
        stepper, items = self._stepper_of(parameters, "clip_grad_norm_")
        return stepper.clip_norm(items, max_norm, norm_type=norm_type)

    def clip_grad_value_(self, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
        """Clip each element of this step's gradients to [-clip_value, clip_value]; nothing while accumulating."""
        if self.sync_gradients:
            stepper, items = self._stepper_of(parameters, "clip_grad_value_")
            stepper.clip_value(items, clip_value)

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """Checks its arguments: clipping and steps undo the loss scale by themselves."""
        given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        for item in given:
            if find_sharded_optimizer(item) is None:
                raise PrepareError("unscale_gradients: this optimizer is not prepared.")

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any prepared optimizer was skipped, because fp16 gradients overflowed."""
        return any(entry.stepper.step_was_skipped for entry in self._optimizers)

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
        """Torch's autocast in the run's precision, for computations outside of a prepared model."""
        handler = autocast_handler or self._autocast
        dtype = self._precision.compute
        if dtype is None:
            yield
            return
        with torch.autocast(
            self.device.type, dtype=dtype, enabled=handler.enabled, cache_enabled=handler.cache_enabled
        ):
            yield

    # What the ranks say together. The rules are in `nested.py`.

    def gather(self, tensor: Any) -> Any:
        """Every rank's tensors joined along dimension 0, in rank order; a scalar gives one entry per rank.

        Raises DataError on every rank if the shapes differ.
        """
        return nested.gather(self._ranks, tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As `gather`, but at a loader's last batch without the samples that padding repeated.

        Exact for every sampler and batch size, and for k rows per sample. Dimension 0 may differ over the ranks. Things
        that are no tensors are gathered as objects: lists are joined.
        """
        loader = self.gradient_state.active_dataloader
        shares = loader.last_round if loader is not None else None
        if loader is not None and loader.end_of_dataloader and shares is None and self.use_distributed:
            _say_once(
                "gather_for_metrics: the last round of this iterable data set was completed inside the loader's "
                "workers, so repeated samples cannot be told. Use num_workers=0 or dispatch_batches=True."
            )
        if use_gather_object or not nested.only_tensors(input_data):
            values = self._ranks.gather_objects(input_data)
            if not all(isinstance(value, (list, tuple)) for value in values):
                return values
            return [entry for part in drop_repeats(values, shares) for entry in part]
        ragged = nested.gather_ragged(self._ranks, input_data)
        width = self.num_processes
        return nested.map_leaves(
            lambda parts: torch.cat(drop_repeats(parts, shares)), ragged, lambda item: _is_parts(item, width)
        )

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The tensors summed ("sum") or averaged ("mean") over the ranks, times `scale`."""
        return nested.reduce(self._ranks, tensor, reduction, scale)

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: int | float = 0, pad_first: bool = False
    ) -> Any:
        """The tensors padded along `dim` to the longest of any rank."""
        return nested.pad_across_processes(self._ranks, tensor, dim, pad_index, pad_first)

    def set_trigger(self) -> None:
        """Raise a flag that `check_trigger` sees on every rank."""
        self._trigger = True

    def check_trigger(self) -> bool:
        """Whether any rank raised the flag since the last check. Collective; lowers the flag."""
        raised = any(self._ranks.gather_objects(self._trigger))
        self._trigger = False
        return raised

    # Saving.

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model itself: `prepare` never wraps it. keep_torch_compile=False takes off torch.compile's wrapper."""
        if not keep_torch_compile and hasattr(model, "_orig_mod"):
            return model._orig_mod
        return model

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole state dict, on the CPU of rank 0; {} on the other ranks. Collective.

        Works under every stage; `zero3_save_16bit_model` is not needed for it.
        """
        sharded = find_sharded(self.unwrap_model(model, keep_torch_compile=False))
        if sharded is None:
            return dict(model.state_dict()) if self.is_main_process else {}
        return sharded.state_dict()

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write `obj` to `f` on the main process (on one process per machine with save_on_each_node)."""
        if self.project_configuration.save_on_each_node:
            here = self.is_local_main_process
        else:
            here = self.is_main_process
        if not here:
            return
        if safe_serialization:
            save_file({name: tensor.contiguous() for name, tensor in obj.items()}, f, metadata={"format": "pt"})
        else:
            torch.save(obj, f)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the whole weights: model.safetensors, or parts and an index. Collective; an error is every rank's."""
        weights = self.get_state_dict(model)
        problem: Exception | None = None
        if self.is_main_process:
            try:
                tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
                save_weights(
                    tensors, save_directory, max_shard_size=max_shard_size, safe_serialization=safe_serialization
                )
            except Exception as error:
                problem = error
        self._ranks.agree(problem)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Have `save_state` and `load_state` also keep these. Raises PrepareError for one without (load_)state_dict."""
        for item in objects:
            if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
                raise PrepareError(
                    f"register_for_checkpointing: a {type(item).__name__} has no state_dict and load_state_dict."
                )
        self._custom_objects.extend(objects)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> str:
        raise ShardwiseError(f"save_state {_CHECKPOINTS}")

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **kwargs: Any) -> None:
        raise ShardwiseError(f"load_state {_CHECKPOINTS}")

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        raise ShardwiseError(f"register_save_state_pre_hook belongs to save_state, which {_CHECKPOINTS}")

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        raise ShardwiseError(f"register_load_state_pre_hook belongs to load_state, which {_CHECKPOINTS}")

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A loader of the rest of an epoch, in the very same order; see `data.skip_first_batches`."""
        return skip_batches_of(dataloader, num_batches)

    def free_memory(self, *objects: Any) -> list[None]:
        """Let go of everything prepared: models get whole weights back in place. Gives a None for each argument."""
        for prepared in self._models:
            prepared.sharded.release()
        for known in (self._models, self._optimizers, self._schedulers, self._dataloaders):
            known.clear()
        self.step = 0
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    def clear(self, *objects: Any) -> list[None]:
        """As `free_memory`."""
        return self.free_memory(*objects)

    def verify_device_map(self, model: nn.Module) -> bool:
        """True if parts of the model were spread over several devices by a device_map, which `prepare` refuses."""
        return any(
            len(set(getattr(module, "hf_device_map", None) or {0: 0}.values())) > 1 for module in model.modules()
        )

    # Trackers and profiles.

    def init_trackers(
        self, project_name: str, config: dict[str, Any] | None = None, init_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Start the trackers of `log_with`, on the main process. init_kwargs: keywords per tracker name."""
        if not self.is_main_process:
            return
        for item in self._log_with:
            tracker = item
            if isinstance(item, str):
                assert self.logging_dir is not None
                tracker = TensorBoardTracker(project_name, Path(self.logging_dir), **(init_kwargs or {}).get(item, {}))
            elif callable(getattr(item, "start", None)):
                item.start()
            if config is not None and callable(getattr(tracker, "store_init_configuration", None)):
                tracker.store_init_configuration(config)
            self.trackers.append(tracker)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The tracker of this name on the main process; an inert GeneralTracker elsewhere. Raises ConfigError."""
        for tracker in self.trackers:
            if getattr(tracker, "name", type(tracker).__name__) == name:
                return getattr(tracker, "tracker", tracker) if unwrap else tracker
        if not self.is_main_process:
            return _Inert()
        known = [getattr(tracker, "name", type(tracker).__name__) for tracker in self.trackers]
        raise ConfigError(f"get_tracker: no tracker named {name!r}; started are {known}.")

    def log(
        self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Give `values` to every tracker, on the main process. log_kwargs: keywords per tracker name."""
        for tracker in self.trackers:
            name = getattr(tracker, "name", type(tracker).__name__)
            tracker.log(values, step=step, **(log_kwargs or {}).get(name, {}))

    def end_training(self) -> None:
        """Close the trackers and leave the run. Nothing that needs the other ranks works afterwards."""
        for tracker in self.trackers:
            if callable(getattr(tracker, "finish", None)):
                tracker.finish()
        self._ranks.barrier()
        leave_run()

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profile the block on this rank; see ProfileKwargs."""
        handler = profile_handler or self._profile
        with handler.build(self.process_index) as profiler:
            yield profiler
        if handler.output_trace_dir is not None and handler.schedule_option is None:
            handler.writer(self.process_index)(profiler)


class _Inert:
    """Stands in for a tracker on ranks that have none: every call does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def _listener(accelerator: Accelerator) -> Callable[[], None]:
    reference = weakref.ref(accelerator)

    def push() -> None:
        alive = reference()
        if alive is not None:
            alive._push_sync()

    return push


def _by_type(handlers: Sequence[Any] | None) -> dict[type, Any]:
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


def _resolve(
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
    said = config.zero.gradient_accumulation_steps
    if said is not None:
        config = config.merged(gradient_accumulation_steps=steps)  # says which of the two holds
        return config, said
    if accumulation is not None and accumulation.sync_each_batch and RankEnvironment.read().rank == 0:
        _say_once(
            "sync_each_batch has no effect: zero_stage 2 and 3 reduce every micro-batch anyway, and 0 and 1 add them "
            "up locally with the same result."
        )
    return config, steps


def _loss_scaler(config: Config, precision: Precision, given: GradScalerKwargs | None) -> LossScaler:
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


def _check_model(model: nn.Module) -> None:
    for module in model.modules():
        spread = getattr(module, "hf_device_map", None)
        if spread and len({str(device) for device in spread.values()}) > 1:
            raise PrepareError(
                f"this {type(model).__name__} was loaded with a device_map over {sorted(map(str, spread.values()))}. "
                "Load it without device_map: zero_stage 3 divides it over the ranks."
            )


def _check_optimizer(optimizer: Optimizer, known: set[int], any_model: bool) -> None:
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


def _batch_size(loader: DataLoader[Any]) -> int | None:
    if isinstance(loader, PreparedLoader):
        return None
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def _describe(item: Any, settings: DataLoaderConfiguration) -> str:
    """What all ranks must have in common of an object, in words."""
    name = type(item).__name__
    if isinstance(item, nn.Module):
        shapes = [tuple(parameter.shape) for parameter in item.parameters()]
        elements = sum(parameter.numel() for parameter in item.parameters())
        trained = sum(parameter.requires_grad for parameter in item.parameters())
        return f"a {name} with {len(shapes)} parameters of {elements} elements, {trained} of them trained"
    if isinstance(item, Optimizer):
        counts = [len(group["params"]) for group in item.param_groups]
        return f"a {name} with groups of {counts} parameters"
    if isinstance(item, DataLoader):
        if settings.dispatch_batches or isinstance(item.dataset, IterableDataset):
            return "a DataLoader"
        try:
            return f"a DataLoader with {len(item)} batches of a data set of {len(item.dataset)}"  # type: ignore[arg-type]
        except TypeError:
            return "a DataLoader"
    return "a scheduler" if isinstance(item, LRScheduler) else "another object"


def _is_parts(item: Any, width: int) -> bool:
    return isinstance(item, list) and len(item) == width and all(isinstance(part, Tensor) for part in item)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)
