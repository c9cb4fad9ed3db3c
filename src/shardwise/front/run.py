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

from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint.background import Background
from ..checkpoint.run_folder import RunFolder
from ..checkpoint.run_state import RunState
from ..checkpoint.snapshot import Pool
from ..checkpoint.standing import Standing
from ..checkpoint.stopping import StopSignals
from ..data.prepare import PreparedLoader
from ..ranks.ranks import Ranks
from ..run.accumulation import GradientState
from ..run.deepspeed_plugin import DeepSpeedPlugin
from ..run.deepspeed_plugins import selected_plugin
from ..run.plugins import AutocastKwargs, ProfileKwargs
from ..run.scheduler import Scheduler
from ..step.averaging import ShardedEMA
from ..step.optimizer import ShardedOptimizer
from ..step.plain import PlainOptimizer
from ..watching.watch import Watch
from ..zero.lending import Lending
from .entering import PreparedModel
from .settings import Settings, plan_of

_prepared: WeakSet[Optimizer] = WeakSet()


def is_prepared_optimizer(optimizer: Any) -> bool:
    """Whether an Accelerator has prepared it."""
    return isinstance(optimizer, Optimizer) and optimizer in _prepared


def mark_prepared(item: nn.Module | Optimizer, *, as_prepared: bool = True) -> None:
    """Let a script read on the object whether it is prepared, under the name that accelerate has for it."""
    if as_prepared:
        vars(item)["_is_accelerate_prepared"] = True
    else:
        vars(item).pop("_is_accelerate_prepared", None)


class PreparedOptimizer:
    """An optimizer in the engine, or one beside it: see `PlainOptimizer`."""

    def __init__(self, optimizer: Optimizer, stepper: ShardedOptimizer | PlainOptimizer) -> None:
        self.optimizer = optimizer
        self.stepper = stepper
        if not hasattr(optimizer, "optimizer"):
            vars(optimizer)["optimizer"] = optimizer  # as accelerate's wrapper has it
        _prepared.add(optimizer)
        mark_prepared(optimizer)

    def release(self) -> None:
        """The optimizer is nobody's any more; one beside the engine steps as in plain torch again."""
        if isinstance(self.stepper, PlainOptimizer):
            self.stepper.undo()
        _prepared.discard(self.optimizer)
        mark_prepared(self.optimizer, as_prepared=False)

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
        self.plugins = settings.plugins
        self.plugin_config = None if self.plugin is None else self.plugin.config  # as it was last taken over
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
        models = (
            self.models
        )  # no closure over the run: what it holds, as workers of loaders, ends with its last reference
        self.optimizers: list[PreparedOptimizer] = []
        self.schedulers: list[Scheduler] = []
        self.dataloaders: list[PreparedLoader] = []
        self.averages: list[ShardedEMA] = []
        self.lending = Lending(ranks, lambda: [prepared.sharded.schedule for prepared in models])
        # Accumulation. step: micro-batches since the last batch of a loader.
        self.gradient_state = GradientState()
        self.step = 0
        self.by_script = False  # whether the script has ever said itself where a step ends
        self.told_of_empty: set[str] = set()  # verbs of clipping that were given no parameters
        # What is saved beside what was prepared, and how saves go.
        self.custom_objects: list[Any] = []
        self.save_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.load_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self.folder = RunFolder()
        self.background = Background()
        self.standing = Standing()  # of the last save's draft
        self.pool = Pool()  # that saves in the background are copied into
        self.aside: Ranks | None = None  # the ranks as a save in the background speaks to them, once there was one
        self.stop_signals = StopSignals()
        # What is told: trackers that were started, the record of the run, and the flag of set_trigger.
        self.log_with = settings.log_with
        self.trackers: list[Any] = []
        self.watch: Watch | None = None
        self.trigger = False

    @property
    def is_main_process(self) -> bool:
        return self.ranks.rank == 0

    @property
    def plugin(self) -> DeepSpeedPlugin | None:
        """The ZeRO settings in force; of several that the script gave, the one that it has selected."""
        return selected_plugin(self.plugins)

    def take_plugin(self) -> None:
        """Put in force what the script has selected, and written into `deepspeed_config`, for what is prepared from now on.

        Raises ConfigError for what is wrong, or cannot change any more.
        """
        plugin = self.plugin
        if plugin is None or plugin.config is None:
            return
        before = self.config if plugin.config is self.plugin_config else plugin.config
        config = plugin.taken(before)
        plugin.config = self.plugin_config = config if before is not config else plugin.config
        if config is self.config:
            return
        self.config, self.plan = config, plan_of(config)
        steps = config.zero.gradient_accumulation_steps
        if steps is not None and steps != before.zero.gradient_accumulation_steps:
            self.gradient_state.plugin.num_steps = steps

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
            standing=self.standing,
        )

    def forget_prepared(self) -> None:
        """Let go of everything that was prepared; its record ends."""
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        for known in (self.models, self.optimizers, self.schedulers, self.dataloaders, self.averages):
            known.clear()
        self.standing.clear()
        self.pool = Pool()
        self.step = 0
