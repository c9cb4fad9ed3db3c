"""The Accelerator: a script's one object, over the engine, the loaders and the run's state.

It holds what a script prepared and passes each call to the part that does it; it has no numerics of its own. The user's
model, optimizer and scheduler stay the same objects: the engine works below them. `prepare` checks everything on every
rank before the first collective, so that a mistake is one error on all ranks.

    run/process.py    who goes first, printing, splitting (inherited)
    data/prepare.py       prepared loaders                       run/scheduler.py   schedulers that step with the optimizer
    zero/         models and optimizers                  run/tracking.py, run/plugins.py, weights/export.py
    front/checkpointing.py   saving and loading the run
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..building.loading import build_without_memory
from ..data.prepare import DataLoaderConfiguration, PreparedLoader
from ..data.prepare import skip_first_batches as skip_batches_of
from ..errors import PrepareError, ShardwiseError
from ..plan.precision import LossScaler
from ..ranks.ranks import attempt
from ..run.accumulation import GradientAccumulationPlugin, GradientState
from ..run.joined import leave_run, remember_accelerator
from ..run.plugins import AutocastKwargs, DeepSpeedPlugin, ProfileKwargs, ProjectConfiguration
from ..run.process import AcceleratorState, DistributedType
from ..run.tracking import Tracking, check_trackers
from ..step.optimizer import ShardedOptimizer, find_sharded_optimizer
from ..zero.guard import explained
from .checkpointing import Checkpointing
from .entering import PreparedModel
from .metrics import Metrics
from .preparing import PreparedOptimizer, Preparing
from .saving import Saving
from .settings import Settings, join_with, refuse_others, resolve

logger = logging.getLogger("shardwise")


class Accelerator(Preparing, Saving, Checkpointing, Tracking, Metrics):
    """Prepares a script's objects for the run that it was launched in. Making one is collective: the ranks compare settings.

    The arguments are accelerate's. What the launcher's configuration says holds; a keyword given here overrules it,
    except gradient_accumulation_steps, where the configuration wins. fsdp, megatron, tensor-parallel and dynamo plugins
    are refused.
    dynamo_backend: compile the blocks of prepared models with torch.compile; see `tuning/compiling.py`.
    step_scheduler_with_optimizer: False makes a prepared scheduler step whenever its `step` is called.
    rng_types: generators that take rank 0's state when an epoch starts: "generator" (a sampler's own), "torch", "cuda".
    log_with:  trackers; see `run/tracking.py`.
    Raises ConfigError: on every rank if the ranks have different settings, of which config/agreement.py has the list. A rank
    whose own settings are wrong raises what is wrong, the others RankError.
    """

    def __init__(
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
        project = project_config or ProjectConfiguration(project_dir=project_dir)
        if project_dir is not None and project.project_dir is None:
            project.set_directories(project_dir)
        loading = dataloader_config or DataLoaderConfiguration()
        if split_batches is not None:
            loading.split_batches = split_batches

        def checked() -> Settings:
            refuse_others(
                fsdp_plugin=fsdp_plugin,
                torch_tp_plugin=torch_tp_plugin,
                megatron_lm_plugin=megatron_lm_plugin,
                parallelism_config=parallelism_config,
                dynamo_plugin=dynamo_plugin,
            )
            self._log_with = check_trackers(log_with, project.logging_dir)
            return resolve(
                mixed_precision=mixed_precision,
                cpu=cpu,
                dynamo_backend=dynamo_backend,
                plugins=deepspeed_plugins or deepspeed_plugin,
                steps=gradient_accumulation_steps,
                accumulation=gradient_accumulation_plugin,
                kwargs_handlers=kwargs_handlers,
                loading=loading,
                rng_types=rng_types,
                device_placement=device_placement,
                step_scheduler_with_optimizer=step_scheduler_with_optimizer,
            )

        self._ranks, settings = join_with(checked)
        self._config = settings.config
        engine, zero = self._config.engine, self._config.zero
        if engine.threads_per_rank is not None:
            torch.set_num_threads(engine.threads_per_rank)
        build_without_memory(zero.zero3_init_flag and zero.zero_stage == 3)
        self._plugin = DeepSpeedPlugin.in_force(self._config)
        self._precision, self._scaler, self._plan = settings.precision, settings.scaler, settings.plan
        self.device_placement = device_placement
        self.dataloader_config = loading
        self.rng_types = settings.rng_types
        self.project_configuration = project
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self._autocast = settings.handlers.get(AutocastKwargs) or AutocastKwargs()
        self._profile = settings.handlers.get(ProfileKwargs) or ProfileKwargs()
        self.trackers: list[Any] = []
        settings.accumulation.num_steps = settings.steps
        self.gradient_state = GradientState()
        GradientState.configure(settings.accumulation, _listener(self))
        self._models: list[PreparedModel] = []
        self._optimizers: list[PreparedOptimizer] = []
        self._schedulers: list[LRScheduler] = []
        self._dataloaders: list[PreparedLoader] = []
        self._init_checkpointing()
        self._trigger = False
        self._by_script = False
        self.step = 0
        remember_accelerator(self)

    def __repr__(self) -> str:
        place = f"rank {self.process_index} of {self.num_processes}"
        return f"Accelerator({self._plan}; mixed precision {self.mixed_precision}; {place})"

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
        self._by_script = True
        self.gradient_state.sync_gradients = value

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self.gradient_state.plugin.num_steps = GradientAccumulationPlugin(num_steps=value).num_steps

    def _declare_sync(self) -> None:
        """Where a step ends has been said: by a micro-batch of `accumulate`, or by the script."""
        self._push_sync()
        for prepared in self._models:
            prepared.sharded.at_boundary = prepared.sharded.sync_gradients

    def _push_sync(self) -> None:
        for prepared in self._models:
            prepared.sharded.sync_gradients = self.sync_gradients and not prepared.quiet

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """One micro-batch of `gradient_accumulation_steps`; the last batch of a loader ends a step in any case.

        Inside, optimizer.step(), optimizer.zero_grad() and a prepared scheduler's step() act only where a step ends.
        """
        self._by_script = True
        self._count_micro_batch()
        yield

    def _count_micro_batch(self) -> None:
        state = self.gradient_state
        if state.sync_with_dataloader and state.end_of_dataloader:
            self.step = 0
            state.sync_gradients = True
        else:
            self.step += 1
            state.sync_gradients = self.step % state.num_steps == 0

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Backward passes inside only accumulate the gradients of `model`."""
        self._by_script = True
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

    # Training.

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward of the loss divided by the accumulation steps, and scaled in fp16. kwargs go to torch's backward.

        In a script that never says where a step ends (`accumulate`, `no_sync`, `sync_gradients`), each call is one
        micro-batch: so `gradient_accumulation_steps` of a configuration acts in the plainest of loops too.
        """
        if not self._by_script and self.gradient_accumulation_steps > 1:
            self._count_micro_batch()
        self._push_sync()
        loader = self.gradient_state.active_dataloader
        if loader is not None:
            loader.trains()
        share = loss / self.gradient_accumulation_steps if self.gradient_accumulation_steps > 1 else loss
        scaled = self._scaler.scale(share)
        for entry in self._optimizers:
            entry.stepper.note_loss(loss)
        with explained():
            scaled.backward(**kwargs)  # type: ignore[no-untyped-call]

    def _stepper_of(self, parameters: Iterable[Tensor] | Tensor, verb: str) -> tuple[ShardedOptimizer, list[Tensor]]:
        """The optimizer that these parameters belong to: the same one on every rank, or PrepareError on every rank.

        A rank may hold no element of an optimizer, and then finds no parameter in its groups: the ranks say together which is
        meant. With one optimizer nobody waits for that but such a rank. Parameters that no optimizer steps are clipped beside
        those of any that has their model.
        """
        items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        owned = self._ranks.any_of([entry.holds(items) for entry in self._optimizers])
        owners = [entry for entry, meant in zip(self._optimizers, owned, strict=True) if meant]
        owners = owners or [entry for entry in self._optimizers if items and entry.stepper.knows(items)][:1]
        if not owners:
            raise PrepareError(
                f"{verb}: none of these parameters belongs to a prepared optimizer, or to its model. Prepare the model "
                "and its optimizer, and pass model.parameters()."
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
        """Take the loss scale off the gradients of these optimizers (None: of all), for scripts that look at `p.grad`.

        Clipping and steps undo it by themselves. Raises PrepareError for an optimizer that is not prepared.
        """
        given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        steppers = [find_sharded_optimizer(item) for item in given]
        if None in steppers:
            raise PrepareError("unscale_gradients: this optimizer is not prepared.")
        for stepper in steppers if given else [entry.stepper for entry in self._optimizers]:
            if stepper is not None:
                stepper.unscale()

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

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A loader of the rest of an epoch, in the very same order; see `data.skip_first_batches`."""
        return skip_batches_of(dataloader, num_batches)

    def free_memory(self, *objects: Any) -> list[None]:
        """Let go of everything prepared: models get whole weights back in place. Gives a None for each argument. Collective.

        Weights have the dtype in which they came; trained ones have the values of their masters, frozen ones those that they
        computed with. Prepared optimizers are done for: make new ones. Call it before `end_training`.
        """
        for prepared in self._models:
            prepared.release()
        for known in (self._models, self._optimizers, self._schedulers, self._dataloaders, self._averages):
            known.clear()
        self.step = 0
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    def clear(self, *objects: Any) -> list[None]:
        """As `free_memory`."""
        return self.free_memory(*objects)

    def wait_for_everyone(self) -> None:
        """Return once every rank has come here. Raises NonFiniteError if the last step's loss was not finite."""
        for entry in self._optimizers:
            entry.stepper.raise_if_bad()
        super().wait_for_everyone()

    def end_training(self) -> None:
        """Wait for saves, close the trackers and leave the run. Nothing that needs the other ranks works afterwards.

        Raises CheckpointError if a save in the background failed, and what a tracker raised, once all else is done: no rank
        leaves the others waiting. A disk that takes nothing more is a warning then, for the training is finished.
        """
        _, error = attempt(self.finish_saving)
        self._release_locks()
        for tracker in self.trackers:
            _, broken = attempt(getattr(tracker, "finish", lambda: None))
            if isinstance(broken, OSError):
                logger.warning("The tracker %s could not be closed: %s.", getattr(tracker, "name", tracker), broken)
            else:
                error = error or broken
        _, later = attempt(self.wait_for_everyone)
        if later is None:
            leave_run()
        if error or later:
            raise error or later  # type: ignore[misc]


def _listener(accelerator: Accelerator) -> Callable[[], None]:
    reference = weakref.ref(accelerator)

    def push() -> None:
        alive = reference()
        if alive is not None:
            alive._declare_sync()

    return push
