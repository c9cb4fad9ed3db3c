"""The Accelerator: a script's one object, over the engine, the loaders and the run's state.

It is a facade: what it knows lies in its Run (`front/run.py`), and each verb is a function over a Run in the file that it is
listed under; it has no numerics of its own. The user's model, optimizer and scheduler stay the same objects: the engine works
below them. `prepare` checks everything on every rank before the first collective, so that a mistake is one error on all ranks.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..data.prepare import DataLoaderConfiguration
from ..data.prepare import skip_first_batches as skip_batches_of
from ..plan.precision import LossScaler
from ..ranks.activity import published
from ..ranks.agreeing import attempt
from ..run.accelerator_state import AcceleratorState
from ..run.accumulation import GradientAccumulationPlugin, GradientState
from ..run.beside import tell_accelerator
from ..run.deepspeed_plugins import plugins_of
from ..run.joined import accelerator_in_force, leave_run, remember_accelerator
from ..run.plugins import AutocastKwargs, DeepSpeedPlugin, ProfileKwargs, ProjectConfiguration
from ..run.process import DistributedType, PartialState
from . import checkpointing, facts, metrics, preparing, reporting, saving, training, watching
from .of_accelerate import own
from .pickling import reduced
from .run import Run
from .settings import Settings, act_on_process, join_with, loading_of, project_of, refuse_others, resolve

P = ParamSpec("P")
R = TypeVar("R")


def _over_run(verb: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[Accelerator, P], R]:
    """The method that passes a call on to `verb`, with the Accelerator's Run; its signature and docstring are the verb's."""

    @functools.wraps(verb)
    def method(self: Accelerator, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return verb(self._run, *args, **kwargs)

    taken = inspect.signature(verb)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = taken.replace(parameters=[own, *list(taken.parameters.values())[1:]])  # type: ignore[attr-defined]
    method.__qualname__ = f"Accelerator.{method.__name__}"
    return method


def _collective(verb: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[Accelerator, P], R]:
    """The same for a verb in which ranks meet: it is published while it runs."""
    return _over_run(published(verb))


def _fact(of: Callable[[Run], Any]) -> Any:
    """A property that gives what the Run says."""
    return property(lambda self: of(self._run))


class Accelerator(PartialState):
    """Prepares a script's objects for the run that it was launched in. Making one is collective: the ranks compare settings.

    The arguments are accelerate's. What the launcher's configuration says holds; a keyword given here overrules it, except
    gradient_accumulation_steps, where the configuration wins. fsdp, megatron and tensor-parallel plugins are refused.
    gradient_accumulation_steps: None, as any setting that is not given, is what an Accelerator that lives was told, or else 1.
    dynamo_backend, dynamo_plugin: compile the blocks of prepared models, by name or as accelerate's `dynamo_config` says it.
    step_scheduler_with_optimizer: False makes a prepared scheduler step whenever its `step` is called.
    rng_types: generators that take rank 0's state when an epoch starts: "generator" (a sampler's own), "torch", "cuda".
    log_with: trackers; see `run/tracking.py`.
    Raises ConfigError: on every rank if the ranks have different settings, of which `config/agreement.py` has the list. A rank
    whose own settings are wrong raises what is wrong, the others RankError.

    The attributes below may be read and set, too; they lie in the Run.
    """

    device_placement: bool
    dataloader_config: DataLoaderConfiguration
    rng_types: list[str]
    project_configuration: ProjectConfiguration
    step_scheduler_with_optimizer: bool
    trackers: list[Any]
    log_with: list[Any]
    native_amp: bool
    autocast_handler: AutocastKwargs | None
    profile_handler: ProfileKwargs | None
    gradient_state: GradientState
    step: int

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
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
        def checked() -> Settings:
            refuse_others(
                fsdp_plugin=fsdp_plugin,
                torch_tp_plugin=torch_tp_plugin,
                megatron_lm_plugin=megatron_lm_plugin,
                parallelism_config=parallelism_config,
            )
            return resolve(  # a script may have kept its other imports from accelerate
                mixed_precision=mixed_precision,
                cpu=cpu,
                dynamo_backend=dynamo_backend,
                dynamo_plugin=own(dynamo_plugin),
                plugins=plugins_of(own(deepspeed_plugin), own(deepspeed_plugins)),
                steps=gradient_accumulation_steps,
                accumulation=own(gradient_accumulation_plugin),
                kwargs_handlers=own(kwargs_handlers),
                loading=loading_of(own(dataloader_config), split_batches),
                project=project_of(own(project_config), project_dir),
                log_with=log_with,
                rng_types=rng_types,
                device_placement=device_placement,
                step_scheduler_with_optimizer=step_scheduler_with_optimizer,
            )

        ranks, settings = join_with(checked)
        super().__init__()  # a view of the run that has just been joined
        act_on_process(settings)
        self._run = Run(ranks, settings)
        GradientState.configure(settings.accumulation if settings.accumulates else None, training.listener(self._run))
        remember_accelerator(self, settings.config)
        tell_accelerator(accelerator_in_force, preparing.later_batches)

    if not TYPE_CHECKING:  # a checker shall know the attributes above and no others

        def __getattr__(self, name):
            if name in _IN_RUN:
                return getattr(self._run, name)
            if name in facts.FACTS:
                return facts.FACTS[name](self._run)
            return super().__getattribute__(name)  # raises once more what it raised, also within a property

        def __setattr__(self, name, value):
            if name in _IN_RUN:
                setattr(self._run, name, value)
            elif name in facts.FACTS:
                raise AttributeError(f"Accelerator.{name} is a fact of the run, and cannot be set.")
            else:
                super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_IN_RUN, *facts.FACTS})

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def __repr__(self) -> str:
        place = f"rank {self.process_index} of {self.num_processes}"
        return f"Accelerator({self._run.plan}; mixed precision {self.mixed_precision}; {place})"

    # What the run is.

    @property
    def state(self) -> AcceleratorState:
        return AcceleratorState(accelerator=self)

    @property
    def distributed_type(self) -> DistributedType:
        return DistributedType.DEEPSPEED if self._run.plugin is not None else super().distributed_type

    @property
    def mixed_precision(self) -> str:
        """ "no", "fp16" or "bf16"."""
        return self._run.config.mixed_precision

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The ZeRO settings in force, or None in a run without them."""
        return self._run.plugin

    @property
    def deepspeed_plugins(self) -> DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None:
        """As they were given; `deepspeed_plugin` is the one in force."""
        return self._run.plugins

    @property
    def scaler(self) -> LossScaler | None:
        """The fp16 loss scale; None in other precisions."""
        return self._run.scaler if self._run.scaler.enabled else None

    @property
    def multi_device(self) -> bool:
        return self.use_distributed

    split_batches = _fact(lambda run: run.dataloader_config.split_batches)
    dispatch_batches = _fact(lambda run: run.dataloader_config.dispatch_batches)
    use_seedable_sampler = _fact(lambda run: run.dataloader_config.use_seedable_sampler)
    non_blocking = _fact(lambda run: run.dataloader_config.non_blocking)
    use_stateful_dataloader = _fact(lambda run: run.dataloader_config.use_stateful_dataloader)
    dynamo_plugin = _fact(lambda run: run.config.compiling)

    @property
    def even_batches(self) -> bool:
        return self._run.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self._run.dataloader_config.even_batches = value

    @property
    def project_dir(self) -> str | os.PathLike[str] | None:
        return self._run.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | os.PathLike[str] | None:
        return self._run.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        return self._run.project_configuration.iteration

    @property
    def should_save_model(self) -> bool:
        """True on the process that `save_model` writes on."""
        return self.is_main_process

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any prepared optimizer was skipped, because fp16 gradients overflowed."""
        return any(entry.stepper.step_was_skipped for entry in self._run.optimizers)

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch ends an optimizer step."""
        return self._run.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._run.by_script = True
        self._run.gradient_state.sync_gradients = value

    @property
    def gradient_accumulation_steps(self) -> int:
        return self._run.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self._run.gradient_state.plugin.num_steps = GradientAccumulationPlugin(num_steps=value).num_steps

    # Its verbs, by the file that they are in.

    init = _collective(preparing.init)
    prepare = _collective(preparing.prepare)
    prepare_data_loader = _collective(preparing.prepare_data_loader)
    generation = _over_run(preparing.generation)
    verify_device_map = _over_run(preparing.verify_device_map)
    free_memory = _collective(preparing.free_memory)

    # Those that are another verb by name: of a subclass, its own.

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

    def clear(self, *objects: Any) -> list[None]:
        """As `free_memory`."""
        return self.free_memory(*objects)

    accumulate = _over_run(training.accumulate)
    no_sync = _over_run(training.no_sync)
    trigger_sync_in_backward = _over_run(training.trigger_sync_in_backward)
    maybe_context_parallel = _over_run(training.maybe_context_parallel)
    lomo_backward = _over_run(training.lomo_backward)
    join_uneven_inputs = _over_run(training.join_uneven_inputs)
    backward = _over_run(training.backward)
    autocast = _over_run(training.autocast)
    clip_grad_norm_ = _collective(training.clip_grad_norm_)
    clip_grad_value_ = _over_run(training.clip_grad_value_)
    unscale_gradients = _over_run(training.unscale_gradients)

    gather = _collective(metrics.gather)
    gather_for_metrics = _collective(metrics.gather_for_metrics)
    reduce = _collective(metrics.reduce)
    pad_across_processes = _collective(metrics.pad_across_processes)
    set_trigger = _over_run(metrics.set_trigger)
    check_trigger = _collective(metrics.check_trigger)

    ema = _collective(checkpointing.ema)
    register_for_checkpointing = _over_run(checkpointing.register_for_checkpointing)
    register_save_state_pre_hook = _over_run(checkpointing.register_save_state_pre_hook)
    register_load_state_pre_hook = _over_run(checkpointing.register_load_state_pre_hook)
    stop_requested = _collective(checkpointing.stop_requested)
    save_state = _collective(checkpointing.save_state)
    finish_saving = _collective(checkpointing.finish_saving)
    load_state = _collective(checkpointing.load_state)
    has_checkpoint = _collective(checkpointing.has_checkpoint)

    unwrap_model = _over_run(saving.unwrap_model)
    get_state_dict = _collective(saving.get_state_dict)
    save = _over_run(saving.save)
    save_model = _collective(saving.save_model)

    init_trackers = _collective(reporting.init_trackers)
    get_tracker = _over_run(reporting.get_tracker)
    log = _over_run(reporting.log)
    profile = _over_run(reporting.profile)
    watch = _collective(watching.watch)

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A loader of the rest of an epoch, in the very same order; see `data.skip_first_batches`."""
        return skip_batches_of(dataloader, num_batches)

    def wait_for_everyone(self) -> None:
        """Return once every rank has come here; see `zero/lending.py` for what one may do alone then. Raises NonFiniteError."""
        for entry in self._run.optimizers:
            entry.stepper.raise_if_bad()
        super().wait_for_everyone()
        self._run.lending.open()

    @published
    def end_training(self) -> None:
        """Wait for saves, close record and trackers and leave the run. Nothing that needs the other ranks works afterwards.

        Raises CheckpointError if a save in the background failed, and what a tracker raised, once all else is done: no rank
        leaves the others waiting. A disk that takes nothing more is a warning then, for the training is finished.
        """
        _, error = attempt(self.finish_saving)
        self._run.folder.release()
        broken = reporting.finish(self._run)
        _, later = attempt(self.wait_for_everyone)
        self._run.lending.forget()
        if later is None:
            leave_run()
        if error or broken or later:
            raise error or broken or later  # type: ignore[misc]


# What a script reads and sets by name, passed on as it is; see `docs/design/front_end.md` for why these are no properties.
_IN_RUN = frozenset(Accelerator.__annotations__)
