"""What `prepare` makes of a DummyOptim and a DummyScheduler, and finds out for the "auto" of a DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..errors import OptimizerError, PrepareError
from ..run.dummies import is_dummy_optimizer, is_dummy_scheduler, made_optimizer, made_scheduler
from ..run.scheduler import SCHEDULERS, is_prepared
from ..step.optimizer import find_sharded_optimizer
from .prepare_checks import micro_batch_size
from .run import Run


class Described:
    """The objects of one call of `prepare`, with what the configuration describes in place of dummies.

    objects: in their order.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._schedules: list[Any] = []
        self._given: dict[str, Any] = {}

    def made(self, scheduler: Any) -> bool:
        """Whether it stands in a DummyScheduler's place."""
        return any(scheduler is item for item in self._schedules)

    def replace_dummies(self, run: Run, objects: Sequence[Any]) -> None:
        """Fill `objects`. Nothing is sent.

        Raises OptimizerError or PrepareError where the configuration describes what the script has made itself, or does not
        describe what a dummy stands for; ConfigError for what it describes wrongly.
        """
        optimizer, scheduler = run.config.engine.optimizer, run.config.engine.scheduler
        self._refuse_two_of_a_kind(objects, described=(optimizer is not None, scheduler is not None))
        made: dict[int, Optimizer] = {}
        for item in objects:
            if is_dummy_optimizer(item):
                made[id(item)] = made_optimizer(item, optimizer)
                self._given |= {"optimizer.params.lr": item.lr, "optimizer.params.weight_decay": item.weight_decay}
        processes = 1 if run.dataloader_config.split_batches else run.ranks.world_size
        for item in objects:
            if is_dummy_scheduler(item):
                schedule, filled = made_scheduler(item, scheduler, made, processes=processes)
                self._given |= {f"scheduler.params.{name}": value for name, value in filled.items()}
                self._schedules.append(schedule)
                self.objects.append(schedule)
            else:
                self.objects.append(made.get(id(item), item))
        loaders = [item for item in objects if isinstance(item, DataLoader)]
        micro = micro_batch_size(run, loaders)
        if micro is not None:
            self._given["train_micro_batch_size_per_gpu"] = micro

    def show(self, run: Run) -> None:
        """Write what was found out where the plugin's `deepspeed_config` says "auto"."""
        if run.plugin is None:
            return
        steps = run.gradient_state.num_steps
        micro = self._given.get(
            "train_micro_batch_size_per_gpu", run.plugin.get_value("train_micro_batch_size_per_gpu")
        )
        if isinstance(micro, int):
            self._given["train_batch_size"] = micro * steps * run.ranks.world_size
        run.plugin.fill({**self._given, "gradient_accumulation_steps": steps})

    def _refuse_two_of_a_kind(self, objects: Sequence[Any], described: tuple[bool, bool]) -> None:
        own = [item for item in objects if isinstance(item, Optimizer) and find_sharded_optimizer(item) is None]
        schedules = [item for item in objects if isinstance(item, SCHEDULERS) and not is_prepared(item)]
        if own and described[0]:
            raise OptimizerError(
                f"`prepare` got an optimizer of the script's own, a {type(own[0]).__name__}, and the DeepSpeed configuration "
                "has an optimizer section. Remove the section, or give a DummyOptim in the optimizer's place."
            )
        if schedules and described[1]:
            raise PrepareError(
                f"`prepare` got a scheduler of the script's own, a {type(schedules[0]).__name__}, and the DeepSpeed "
                "configuration has a scheduler section. Remove the section, or give a DummyScheduler in the scheduler's place."
            )
        if schedules and any(is_dummy_optimizer(item) for item in objects):
            raise PrepareError(
                f"the {type(schedules[0]).__name__} steps an optimizer that a DummyOptim does not become. Give a "
                "DummyScheduler with it, with lr_scheduler_callable for a schedule of your own."
            )
