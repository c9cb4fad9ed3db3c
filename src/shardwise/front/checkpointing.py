"""The verbs of an Accelerator that save and load the state of a run.

`save_state` writes everything that `checkpoint/run_state.py` lists into one directory that appears whole or not at all;
`load_state` brings it back on any number of ranks, under any stage and tier. Frozen weights are not written by default: a
checkpoint holds where they came from and a fingerprint of them, which `load_state` compares.

    save_state()                     project_dir/checkpoints/checkpoint_N     automatic_checkpoint_naming
    save_state("out/state")          that directory, replaced if it is a checkpoint
    load_state()                     the newest complete one below project_dir/checkpoints
    load_state("out/latest")         the newest complete one in out/
    load_state("out/state")          that one
"""

from __future__ import annotations

import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from ..checkpoint import directory
from ..checkpoint.background import Background
from ..checkpoint.patience import Progress, patiently
from ..checkpoint.run_folder import Place, RunFolder
from ..checkpoint.run_saving import DamagedError, draft_run, load_run
from ..checkpoint.run_state import RunState
from ..checkpoint.stopping import StopSignals
from ..checkpoint.write import open_staging, write_checkpoint
from ..config.schema import Config
from ..data.loader import PreparedLoader
from ..data.prepare import DataLoaderConfiguration
from ..errors import CheckpointError, ConfigError, PrepareError
from ..files import disk
from ..plan.precision import LossScaler
from ..ranks.agree import on_first, together
from ..ranks.ranks import Ranks, attempt
from ..run.plugins import ProjectConfiguration
from ..run.process import PartialState
from ..step.averaging import ShardedEMA
from ..zero.access import prepared_as
from .entering import PreparedModel
from .preparing import PreparedOptimizer

logger = logging.getLogger("shardwise")


class Checkpointing(PartialState):
    """The checkpoint verbs of an Accelerator."""

    project_configuration: ProjectConfiguration
    dataloader_config: DataLoaderConfiguration
    step_scheduler_with_optimizer: bool
    step: int
    _config: Config
    _scaler: LossScaler
    _models: list[PreparedModel]
    _optimizers: list[PreparedOptimizer]
    _schedulers: list[LRScheduler]
    _dataloaders: list[PreparedLoader]
    _custom_objects: list[Any]
    _averages: list[ShardedEMA]
    _background: Background
    _aside: Ranks | None
    _run_folder: RunFolder
    _stop_signals: StopSignals
    _save_hooks: OrderedDict[int, Callable[..., Any]]
    _load_hooks: OrderedDict[int, Callable[..., Any]]

    def _init_checkpointing(self) -> None:
        self._custom_objects = []
        self._averages = []
        self._background = Background()
        self._aside = None
        self._run_folder = RunFolder()
        self._stop_signals = StopSignals()
        self._save_hooks, self._load_hooks = OrderedDict(), OrderedDict()

    def ema(self, model: nn.Module, decay: float = 0.999) -> ShardedEMA:
        """An exponential moving average of the trained weights of `model`, kept in shards, and by save_state. Collective.

        Call `update()` after each optimizer step; inside `swapped()` the model has the averages. See `step/averaging.py`.
        Raises PrepareError for a model that is not prepared, ConfigError for another decay on another rank, or a wrong one.
        """
        sharded = prepared_as(model, "ema", self._ranks)
        self._averages.append(ShardedEMA(sharded, decay))
        return self._averages[-1]

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Have `save_state` and `load_state` also keep these. Raises PrepareError for one without (load_)state_dict."""
        for item in objects:
            if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
                raise PrepareError(
                    f"register_for_checkpointing: a {type(item).__name__} has no state_dict and load_state_dict."
                )
        self._custom_objects.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(models, weights, directory)` on every rank before a save publishes; what it writes there is kept.

        weights: an empty dictionary for each model, for hooks that take one out. Gives a handle with `remove`.
        """
        return _register(self._save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(models, directory)` on every rank before a load. Gives a handle with `remove`."""
        return _register(self._load_hooks, hook)

    def stop_requested(self) -> bool:
        """Whether SIGTERM or SIGUSR1 has reached any rank: save, and end the script. The same on every rank.

        The first call starts to listen; from then on the signals end nothing by themselves. Collective, about 0.1 ms; call
        it once a step, after the optimizer's.
        """
        return self._stop_signals.requested(self._ranks)

    # Saving.

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        async_: bool = False,
        include_frozen: bool | Literal["shared"] = False,
        metric: float | None = None,
        **kwargs: Any,
    ) -> str:
        """Save the run and give the directory. Collective; call it between two optimizer steps.

        output_dir:     None numbers them below project_dir/checkpoints, with automatic_checkpoint_naming.
        async_:         copy the state, go on, and write in the background; the next save and the end of the run wait, and
                        raise what went wrong.
        include_frozen: False keeps a fingerprint of frozen weights; True keeps them; "shared" keeps them once, beside the
                        checkpoints, for all that are saved there.
        metric:         what the best checkpoints are chosen by, see ProjectConfiguration; rank 0's counts.
        Raises CheckpointError with the same words on every rank; checkpoints that were there are then unharmed.
        """
        if kwargs:
            raise ConfigError(f"save_state: {next(iter(kwargs))} is not one of its arguments.")
        if not safe_serialization and self.is_main_process:
            logger.warning("save_state: safe_serialization=False has no effect; checkpoints are safetensors and JSON.")
        self.finish_saving()
        way = {"async_": async_, "include_frozen": include_frozen, "the number of save hooks": len(self._save_hooks)}
        self._ranks.require_same("save_state", way)
        place = self._agree_on_place(output_dir, metric)
        target = place.target
        run = self._run_state()
        run.settle()
        if any(model.accumulating for model in run.models) and self.is_main_process:
            logger.warning(
                "save_state between two optimizer steps, with gradients of some micro-batches accumulated: those are not "
                "saved. Save where accelerator.sync_gradients is true."
            )
        made = draft_run(run, place, {"step": self.step}, include_frozen)
        staging = open_staging(target, self._ranks)
        self._call_save_hooks(staging)
        if not async_:
            write_checkpoint(staging, target, made.draft, self._ranks, made.manifest)
            self._prune(self._ranks, place)
            return place.named
        if self._aside is None:
            self._aside = self._ranks.aside()
        aside = self._aside
        copying = Progress("copies its part to the host")
        copied = patiently(self._ranks, made.draft.copied, copying, what=f"Saving {target}", failed=made.failed)
        assert copied is not None

        def write() -> None:
            write_checkpoint(staging, target, copied, aside, made.manifest)
            self._prune(aside, place)

        self._background.start(write)
        return place.named

    def finish_saving(self) -> None:
        """Wait for a save in the background. Raises CheckpointError, on every rank, if it failed. Collective."""
        if self._aside is not None:
            together(self._ranks, self._background.wait)

    def _run_state(self) -> RunState:
        return RunState(
            ranks=self._ranks,
            models=[prepared.sharded for prepared in self._models],
            steppers=[entry.stepper for entry in self._optimizers],
            schedulers=self._schedulers,
            loaders=self._dataloaders,
            objects=self._custom_objects,
            averages=self._averages,
            scaler=self._scaler,
        )

    def _agree_on_place(self, output_dir: str | os.PathLike[str] | None, metric: float | None) -> Place:
        looking = Progress("looks at the directory")
        failed = "nothing was saved: "
        chosen = patiently(
            self._ranks,
            lambda: self._run_folder.choose(self.project_configuration, output_dir, metric),
            looking,
            what="Saving",
            on=0,
            failed=failed,
        )
        place: Place = self._ranks.broadcast_object(chosen)
        return place

    def _call_save_hooks(self, staging: Path) -> None:
        models = [prepared.model for prepared in self._models]
        for hook in list(self._save_hooks.values()):
            try:
                together(self._ranks, lambda: hook(list(models), [{} for _ in models], str(staging)))  # noqa: B023
            except CheckpointError:
                if self.is_main_process:
                    attempt(lambda: disk.remove(staging))  # the first error is the one to tell
                raise

    def _release_locks(self) -> None:
        self._run_folder.release()

    def _prune(self, ranks: Ranks, place: Place) -> None:
        project = self.project_configuration
        if place.made.name is not None and project.total_limit is not None:
            removing = Progress("removes older checkpoints")
            patiently(
                ranks, lambda: self._run_folder.prune(project, place), removing, what=f"Saving {place.target}", on=0
            )

    # Loading.

    def load_state(
        self, input_dir: str | os.PathLike[str] | None = None, load_kwargs: Any = None, **kwargs: Any
    ) -> str:
        """Bring a saved run back into the prepared objects, and give the directory that was read. Collective.

        input_dir: a checkpoint; or DIRECTORY/latest, or None with automatic naming: then the newest one that is complete
                   and undamaged, and what is skipped is logged with its reason.
        Works for checkpoints of any number of ranks, any stage and any tier. Prepared loaders go on behind the batches that
        were given out, unless the script skips some itself.
        Raises CheckpointError with the same words on every rank. What was found before anything was read has changed
        nothing; after damage found while reading, the weights are those of neither run.
        """
        if kwargs or load_kwargs:
            raise ConfigError("load_state takes a directory and no other argument.")
        self.finish_saving()
        folder, path = on_first(
            self._ranks, lambda: self._run_folder.choose_to_load(self.project_configuration, input_dir)
        )
        if path is not None:
            try:
                return self._load(path)
            except DamagedError as error:
                raise CheckpointError(str(error)) from error
        complete, reasons = self._survey(folder)
        self._say(reasons, "Skipped: %s")
        for found in complete:
            try:
                return self._load(found)
            except DamagedError as error:
                reasons.append(str(error))
                self._say(reasons[-1:], "Skipped: %s")
        words = " ".join(f"{reason.rstrip('.')}." for reason in reasons) if reasons else "There is nothing in it."
        raise CheckpointError(f"{folder} holds no complete checkpoint. {words}")

    def has_checkpoint(self, folder: str | os.PathLike[str] | None = None) -> bool:
        """Whether `load_state(folder / "latest")` (None: `load_state()`) would find a complete checkpoint. Collective.

        Where there is none, what is there and why it does not count is logged as a warning. Raises CheckpointError if the
        directory cannot be read.
        """
        numbered = self._run_folder.numbered
        where = on_first(
            self._ranks, lambda: Path(folder) if folder is not None else numbered(self.project_configuration)
        )
        complete, reasons = self._survey(where)
        if not complete:
            self._say(reasons, "There is no complete checkpoint: %s")
        return bool(complete)

    def _survey(self, folder: Path) -> tuple[list[Path], list[str]]:
        """The complete checkpoints, the newest first, and why others are none. Collective."""

        def look() -> tuple[list[Path], list[str]]:
            found = directory.survey(folder)
            return [one.path for one in found.complete], [reason for _, reason in found.skipped]

        return on_first(self._ranks, look)

    def _say(self, reasons: Sequence[str], words: str) -> None:
        for reason in reasons if self.is_main_process else ():
            logger.warning(words, reason)

    def _load(self, path: Path) -> str:
        models = [prepared.model for prepared in self._models]
        hooks = [functools.partial(hook, models, str(path)) for hook in self._load_hooks.values()]
        checkpoint, counters = load_run(self._run_state(), path, hooks=hooks)
        self.step = counters["step"]
        self._run_folder.lineage.resume(checkpoint.manifest.made)
        if self.is_main_process:
            saved = checkpoint.manifest
            if saved.world_size != self.num_processes and self._schedulers and self._schedules_count_processes:
                logger.warning(
                    "Schedulers step once for each process: with %d instead of %d processes they go on %g times as fast. Set "
                    "scheduler_steps_per_process: false in shardwise_config for runs whose number of processes changes.",
                    self.num_processes,
                    saved.world_size,
                    self.num_processes / saved.world_size,
                )
            logger.info("Resumed %s: step %d, saved by %d rank(s).", path, saved.step, saved.world_size)
        return str(path)

    @property
    def _schedules_count_processes(self) -> bool:
        each = self._config.engine.scheduler_steps_per_process and not self.dataloader_config.split_batches
        return each and self.step_scheduler_with_optimizer


def _register(hooks: OrderedDict[int, Callable[..., Any]], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
