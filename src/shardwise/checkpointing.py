"""The verbs of an Accelerator that save and load the state of a run.

`save_state` writes everything that `run_state.py` lists into one directory that appears whole or not at all; `load_state`
brings it back on any number of ranks, under any stage and tier. Frozen weights are not written by default: a checkpoint
holds where they came from and a fingerprint of them, which `load_state` compares.

    save_state()                     project_dir/checkpoints/checkpoint_N     automatic_checkpoint_naming
    save_state("out/state")          that directory, replaced if it is a checkpoint
    load_state()                     the newest complete one below project_dir/checkpoints
    load_state("out/latest")         the newest complete one in out/
    load_state("out/state")          that one
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from .checkpoint import directory
from .checkpoint.agree import first_failure, on_first, together
from .checkpoint.background import Background
from .checkpoint.manifest import describer
from .checkpoint.read import Checkpoint
from .checkpoint.write import open_staging, write_checkpoint
from .config.schema import Config
from .data import DataLoaderConfiguration
from .data_loader import PreparedLoader
from .errors import CheckpointError, ConfigError, PrepareError
from .frozen import compare_frozen, forget_sums, frozen_record
from .model_facts import KeptAdapters, adapters_of, facts_of
from .plugins import ProjectConfiguration
from .preparing import PreparedModel, PreparedOptimizer
from .process import PartialState
from .run_state import RunState
from .stopping import StopSignals
from .zero.collectives import Ranks, attempt
from .zero.precision import LossScaler
from .zero.sharded import ShardedModel

logger = logging.getLogger("shardwise")

_facts: WeakKeyDictionary[ShardedModel, dict[str, Any]] = WeakKeyDictionary()


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
    _background: Background
    _aside: Ranks | None
    _locks: dict[Path, directory.Lock]
    _stop_signals: StopSignals
    _save_hooks: OrderedDict[int, Callable[..., Any]]
    _load_hooks: OrderedDict[int, Callable[..., Any]]

    def _init_checkpointing(self) -> None:
        self._custom_objects = []
        self._background = Background()
        self._aside = None
        self._locks = {}
        self._stop_signals = StopSignals()
        self._save_hooks, self._load_hooks = OrderedDict(), OrderedDict()

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
        metric:         what the best checkpoints are chosen by, see ProjectConfiguration.
        Raises CheckpointError with the same words on every rank; checkpoints that were there are then unharmed.
        """
        if kwargs:
            raise ConfigError(f"save_state: {next(iter(kwargs))} is not one of its arguments.")
        if not safe_serialization and self.is_main_process:
            logger.warning("save_state: safe_serialization=False has no effect; checkpoints are safetensors and JSON.")
        self.finish_saving()
        target, order = on_first(self._ranks, lambda: self._choose(output_dir), "nothing was saved: ")
        run = self._run_state()
        run.settle()
        if any(model.accumulating for model in run.models) and self.is_main_process:
            logger.warning(
                "save_state between two optimizer steps, with gradients of some micro-batches accumulated: those are not "
                "saved. Save where accelerator.sync_gradients is true."
            )
        frozen = frozen_record([prepared.model for prepared in self._models], run, include_frozen, target)
        kept = [adapters_of(model) for model in run.models]
        draft, error = attempt(lambda: run.draft({"step": self.step}, kept, with_frozen=include_frozen is True))
        text = first_failure(self._ranks, error)
        if text is not None or draft is None:
            raise CheckpointError(f"{target} was not saved: {text}") from error
        staging = open_staging(target, self._ranks)
        if self._save_hooks:
            models = [prepared.model for prepared in self._models]
            for hook in list(self._save_hooks.values()):
                together(self._ranks, lambda: hook(list(models), [{} for _ in models], str(staging)))  # noqa: B023
        manifest = together(
            self._ranks,
            lambda: describer(self._ranks.world_size, run.step, order, metric, frozen, _facts_of(run.models, kept)),
            what=f"{target} was not saved: ",
        )
        assert manifest is not None
        if not async_:
            write_checkpoint(staging, target, draft, self._ranks, manifest)
            together(self._ranks, lambda: self._prune(target, output_dir is None), on=0)
            return str(target)
        if self._aside is None:
            self._aside = self._ranks.aside()
        aside = self._aside
        copied, error = attempt(draft.copied)
        text = first_failure(self._ranks, error)
        if copied is None:
            raise CheckpointError(f"{target} was not saved: {text}") from error

        def write() -> None:
            write_checkpoint(staging, target, copied, aside, manifest)
            together(aside, lambda: self._prune(target, output_dir is None), on=0)

        self._background.start(write)
        return str(target)

    def finish_saving(self) -> None:
        """Wait for a save in the background. Raises CheckpointError, on every rank, if it failed. Collective."""
        _, error = attempt(self._background.wait)
        if self._aside is not None:
            text = first_failure(self._ranks, error)
            if text is not None:
                raise CheckpointError(text) from error

    def _run_state(self) -> RunState:
        return RunState(
            ranks=self._ranks,
            models=[prepared.sharded for prepared in self._models],
            steppers=[entry.stepper for entry in self._optimizers],
            schedulers=self._schedulers,
            loaders=self._dataloaders,
            objects=self._custom_objects,
            scaler=self._scaler,
        )

    def _folder(self) -> Path:
        project = self.project_configuration
        if project.project_dir is None or not project.automatic_checkpoint_naming:
            raise CheckpointError(
                "no directory was given. Name one, or make the Accelerator with "
                "ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True)."
            )
        return Path(project.project_dir) / "checkpoints"

    def _choose(self, output_dir: str | os.PathLike[str] | None) -> tuple[Path, int]:
        """On rank 0: where the coming save goes and its place in the order, with the directory claimed for this run."""
        if output_dir is None:
            folder = self._folder()
            self._claim(folder / ".lock")
            directory.sweep(folder)
            number = directory.next_number(folder, self.project_configuration.iteration)
            self.project_configuration.iteration = number + 1
            target = folder / f"checkpoint_{number}"
        else:
            target = Path(os.path.abspath(output_dir))
            self._claim(target.with_name(f".lock-{target.name}"))
            directory.refuse_foreign(target)
        return target, directory.next_order(target.parent)

    def _claim(self, path: Path) -> None:
        if path not in self._locks:
            self._locks[path] = directory.Lock(path)

    def _release_locks(self) -> None:
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    def _prune(self, target: Path, numbered: bool) -> None:
        project = self.project_configuration
        if numbered:
            directory.prune(
                target.parent,
                newest=project.total_limit,
                best=project.keep_best,
                smaller_is_better=project.smaller_is_better,
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
        given = Path(os.path.abspath(input_dir)) if input_dir is not None else None
        if given is not None and (given.name != "latest" or given.exists()):
            path = on_first(self._ranks, lambda: directory.resolve(given))
            try:
                return self._load(path)
            except _DamagedError as error:
                raise CheckpointError(str(error)) from error
        folder = given.parent if given is not None else together(self._ranks, self._folder)
        assert folder is not None
        found = directory.survey(folder) if self.is_main_process else None
        complete, skipped = on_first(
            self._ranks, lambda: ([f.path for f in found.complete], found.skipped) if found else ([], ())
        )
        reasons = [reason for _, reason in skipped]
        for reason in reasons if self.is_main_process else ():
            logger.warning("Skipped: %s", reason)
        for path in complete:
            try:
                return self._load(path)
            except _DamagedError as error:
                reasons.append(str(error))
                if self.is_main_process:
                    logger.warning("Skipped: %s", error)
        words = " ".join(reasons) if reasons else "There is nothing in it."
        raise CheckpointError(f"{folder} holds no complete checkpoint. {words}")

    def has_checkpoint(self, folder: str | os.PathLike[str] | None = None) -> bool:
        """Whether `load_state(folder / "latest")` (None: `load_state()`) would find a complete checkpoint. Collective."""
        where = together(self._ranks, lambda: Path(folder) if folder is not None else self._folder())
        assert where is not None
        return on_first(self._ranks, lambda: bool(directory.survey(where).complete))

    def _load(self, path: Path) -> str:
        run = self._run_state()
        run.settle()
        what = f"{path} could not be loaded: "
        checkpoint, states = self._open(path)
        together(self._ranks, lambda: run.check(checkpoint, states[0]), what="")
        for hook in list(self._load_hooks.values()):
            together(self._ranks, lambda: hook([p.model for p in self._models], str(path)), what=what)  # noqa: B023
        frozen = compare_frozen(run, checkpoint)
        for model in run.models:
            model.drop_gradients()
        _, error = attempt(lambda: run.restore_tensors(checkpoint, states, frozen))
        text = first_failure(self._ranks, error)
        if text is not None:
            raise _DamagedError(what + text) from error
        run.publish()
        groups = run.group_names()
        counters = together(self._ranks, lambda: run.restore_rest(states, groups), what=what)
        assert counters is not None
        self.step = counters["step"]
        forget_sums(run.models[number] for number in frozen)
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

    def _open(self, path: Path) -> tuple[Checkpoint, list[dict[str, Any]]]:
        def read() -> tuple[Checkpoint, list[dict[str, Any]]]:
            checkpoint = Checkpoint(path)
            # Registered objects may be large, and those of other ranks are theirs.
            mine = (0, self._ranks.rank)
            return checkpoint, [
                checkpoint.state(rank, () if rank in mine else ("objects",))
                for rank in range(checkpoint.manifest.world_size)
            ]

        found, error = attempt(read)
        text = first_failure(self._ranks, error)
        if text is not None or found is None:
            raise _DamagedError(f"{path} could not be loaded: {text}") from error
        return found


class _DamagedError(CheckpointError):
    """This checkpoint cannot be read to its end; an older one may do."""


def _register(hooks: OrderedDict[int, Callable[..., Any]], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _facts_of(models: Sequence[ShardedModel], adapters: Sequence[KeptAdapters]) -> dict[str, Any]:
    for model in models:
        if model not in _facts:
            _facts[model] = facts_of(model)
    return {f"model{n}": {**_facts[m], **adapters[n].facts} for n, m in enumerate(models)}
