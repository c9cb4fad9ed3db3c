"""A run as an Accelerator knows it: its ranks, the settings in force, what was prepared, and what is saved.

The verbs of an Accelerator are functions that take the Run first; `front/accelerator.py` lists them. They keep nothing of their
own: whoever wants to know what a verb may change reads the fields here.

    preparing.py      init, prepare, generation, free_memory      training.py    accumulation, backward, clipping
    checkpointing.py  save_state, load_state, ema                 saving.py      whole weights into files
    metrics.py        gather, reduce, triggers                    reporting.py   trackers, profiles
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint.background import Background
from ..checkpoint.run_folder import RunFolder
from ..checkpoint.run_state import RunState
from ..checkpoint.stopping import StopSignals
from ..data.prepare import PreparedLoader
from ..ranks.ranks import Ranks
from ..run.accumulation import GradientState
from ..run.plugins import AutocastKwargs, DeepSpeedPlugin, ProfileKwargs
from ..step.averaging import ShardedEMA
from ..step.optimizer import ShardedOptimizer
from ..step.plain import PlainOptimizer
from .entering import PreparedModel
from .settings import Settings

_prepared: WeakSet[Optimizer] = WeakSet()


def is_prepared_optimizer(optimizer: Any) -> bool:
    """Whether an Accelerator has prepared it."""
    return isinstance(optimizer, Optimizer) and optimizer in _prepared


class PreparedOptimizer:
    """An optimizer in the engine, or one beside it: see `PlainOptimizer`."""

    def __init__(self, optimizer: Optimizer, stepper: ShardedOptimizer | PlainOptimizer) -> None:
        self.optimizer = optimizer
        self.stepper = stepper
        if not hasattr(optimizer, "optimizer"):
            vars(optimizer)["optimizer"] = optimizer  # as accelerate's wrapper has it
        _prepared.add(optimizer)

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it drives any of these: parameters of its model, or the shards that its groups hold now."""
        shards = {id(shard) for group in self.optimizer.param_groups for shard in group["params"]}
        return any(id(item) in shards for item in parameters) or self.stepper.holds(parameters)


class Run:
    """All that an Accelerator knows.

    ranks:    the run that this process has joined.
    settings: in force on every rank.
    """

    def __init__(self, ranks: Ranks, settings: Settings) -> None:
        # Settings in force.
        self.ranks = ranks
        self.config = settings.config
        self.plan = settings.plan
        self.precision = settings.precision
        self.scaler = settings.scaler
        self.plugin = DeepSpeedPlugin.in_force(settings.config)
        self.plugin_name = settings.plugin_name
        self.settings = settings
        # Those that a script may set too, under these names.
        self.autocast_handler: AutocastKwargs | None = settings.handlers.get(AutocastKwargs)
        self.profile_handler: ProfileKwargs | None = settings.handlers.get(ProfileKwargs)
        self.native_amp = settings.precision.compute is not None
        self.device_placement = settings.device_placement
        self.dataloader_config = settings.loading
        self.rng_types = settings.rng_types
        self.project_configuration = settings.project
        self.step_scheduler_with_optimizer = settings.step_scheduler_with_optimizer
        # What was prepared.
        self.models: list[PreparedModel] = []
        self.optimizers: list[PreparedOptimizer] = []
        self.schedulers: list[LRScheduler] = []
        self.dataloaders: list[PreparedLoader] = []
        self.averages: list[ShardedEMA] = []
        # Accumulation. step: micro-batches since the last batch of a loader.
        self.gradient_state = GradientState()
        self.step = 0
        self.by_script = False  # whether the script has ever said itself where a step ends
        # What is saved beside what was prepared, and how saves go.
        self.custom_objects: list[Any] = []
        self.save_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.load_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.folder = RunFolder()
        self.background = Background()
        self.aside: Ranks | None = None  # the ranks as a save in the background speaks to them, once there was one
        self.stop_signals = StopSignals()
        # What is told: trackers that were started, and the flag of set_trigger.
        self.log_with = settings.log_with
        self.trackers: list[Any] = []
        self.trigger = False

    @property
    def is_main_process(self) -> bool:
        return self.ranks.rank == 0

    def state(self) -> RunState:
        """What a checkpoint keeps of it."""
        steppers = [entry.stepper for entry in self.optimizers]
        return RunState(
            ranks=self.ranks,
            models=[prepared.sharded for prepared in self.models],
            steppers=[s for s in steppers if isinstance(s, ShardedOptimizer)],
            schedulers=self.schedulers,
            loaders=self.dataloaders,
            objects=[*self.custom_objects, *(s for s in steppers if isinstance(s, PlainOptimizer))],
            averages=self.averages,
            scaler=self.scaler,
        )

    def forget_prepared(self) -> None:
        """Let go of everything that was prepared."""
        for known in (self.models, self.optimizers, self.schedulers, self.dataloaders, self.averages):
            known.clear()
        self.step = 0
