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
from torch.utils.hooks import RemovableHandle

from ..checkpoint import directory
from ..checkpoint.patience import Progress, patiently
from ..checkpoint.run_folder import Place
from ..checkpoint.run_saving import DamagedError, Drafted, draft_run, load_run
from ..checkpoint.write import Taken, open_staging, take, write_checkpoint
from ..errors import CheckpointError, ConfigError, PrepareError
from ..files import disk
from ..ranks.agree import on_first, together
from ..ranks.agreeing import attempt
from ..ranks.ranks import Ranks
from ..step.averaging import ShardedEMA
from ..zero.access import prepared_as
from ..zero.engine import Engine
from .run import Run

logger = logging.getLogger("shardwise")


def ema(run: Run, model: nn.Module, decay: float = 0.999) -> ShardedEMA:
    """An exponential moving average of the trained weights of `model`, kept in shards, and by save_state. Collective.

    Call `update()` after each optimizer step; inside `swapped()` the model has the averages. See `step/averaging.py`.
    Raises PrepareError for a model that is not prepared, ConfigError for another decay on another rank, or a wrong one.
    """
    sharded = prepared_as(model, "ema", run.ranks)
    run.averages.append(ShardedEMA(sharded, decay))
    return run.averages[-1]


def register_for_checkpointing(run: Run, *objects: Any) -> None:
    """Have `save_state` and `load_state` also keep these. Raises PrepareError for one without (load_)state_dict."""
    wrong = [
        f"Item at index {index}, a {type(item).__name__}, has no state_dict and load_state_dict."
        for index, item in enumerate(objects)
        if not all(callable(getattr(item, verb, None)) for verb in ("state_dict", "load_state_dict"))
    ]
    if wrong:
        raise PrepareError(f"register_for_checkpointing: {' '.join(wrong)}")
    run.custom_objects.extend(objects)


def register_save_state_pre_hook(run: Run, hook: Callable[..., Any]) -> RemovableHandle:
    """Call `hook(models, weights, directory)` on every rank before a save publishes; what it writes there is kept.

    weights: an empty dictionary for each model, for hooks that take one out. Gives a handle with `remove`.
    """
    return _register(run.save_hooks, hook)


def register_load_state_pre_hook(run: Run, hook: Callable[..., Any]) -> RemovableHandle:
    """Call `hook(models, directory)` on every rank before a load. Gives a handle with `remove`."""
    return _register(run.load_hooks, hook)


def stop_requested(run: Run) -> bool:
    """Whether SIGTERM or SIGUSR1 has reached any rank: save, and end the script. The same on every rank.

    The first call starts to listen; from then on the signals end nothing by themselves. Collective, about 0.1 ms; call
    it once a step, after the optimizer's.
    """
    return run.stop_signals.requested(run.ranks)


# Saving.


def save_state(
    run: Run,
    /,
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
    if not safe_serialization and run.is_main_process:
        logger.warning("save_state: safe_serialization=False has no effect; checkpoints are safetensors and JSON.")
    run.ranks.assemble("accelerator.save_state()")  # scripts for DDP call it on the main process alone
    finish_saving(run)
    way = {"async_": async_, "include_frozen": include_frozen, "the number of save hooks": len(run.save_hooks)}
    run.ranks.require_same("save_state", way)
    place = _agree_on_place(run, output_dir, metric)
    target = place.target
    state = run.state()
    state.settle(waits=not async_)
    if any(model.accumulating for model in state.models) and run.is_main_process:
        logger.warning(
            "save_state between two optimizer steps, with gradients of some micro-batches accumulated: those are not "
            "saved. Save where accelerator.sync_gradients is true."
        )
    made = draft_run(state, place, {"step": run.step}, include_frozen)
    engines = [model.engine for model in state.models]
    at_once = any(engine.stores.uses_disk or engine.state_dtype != "fp32" for engine in engines)
    staging = None
    if not async_ or run.save_hooks or at_once:
        staging = open_staging(target, run.ranks)
        _call_save_hooks(run, staging)
    if not async_:
        write_checkpoint(staging or open_staging(target, run.ranks), target, made.draft, run.ranks, made.manifest)
        _prune(run, run.ranks, place)
        return place.named
    _write_aside(run, place, made, staging, engines)
    return place.named


def _write_aside(run: Run, place: Place, made: Drafted, staging: Path | None, engines: Sequence[Engine]) -> None:
    """Take this rank's part as it is, and have it written in the background. Collective.

    staging: the directory, where something is to be written at once; else it is made in the background too.
    """
    if run.aside is None:
        run.aside = run.ranks.aside()
    aside, pool, target = run.aside, run.pool, place.target
    lanes = [engine.lanes for engine in engines]
    held: list[Taken] = []

    def taking() -> None:
        held.extend(take(staging, made.draft, run.ranks.rank, lanes, pool))

    def let_go() -> None:
        for taken in held:
            taken.close()

    def write() -> None:
        try:
            for taken in held:  # at once, for the next step waits for it; what goes wrong is said by the ranks together
                attempt(taken.snapshot.copy)
            where = staging or open_staging(target, aside)
            write_checkpoint(where, target, made.draft, aside, made.manifest, next(iter(held), None))
        finally:
            let_go()
        _prune(run, aside, place)

    try:
        if staging is None:  # nothing asks a disk
            together(run.ranks, taking, what=made.failed)
        else:
            progress = Progress("writes what does not rest in memory")
            patiently(run.ranks, taking, progress, what=f"Saving {target}", failed=made.failed)
        run.background.start(write)
    except BaseException:  # also where another rank could not: no step of this one may wait for a writer
        let_go()
        raise


def finish_saving(run: Run) -> None:
    """Wait for a save in the background. Raises CheckpointError, on every rank, if it failed. Collective."""
    if run.aside is not None:
        together(run.ranks, run.background.wait)


def _agree_on_place(run: Run, output_dir: str | os.PathLike[str] | None, metric: float | None) -> Place:
    looking = Progress("looks at the directory")
    failed = "nothing was saved: "
    chosen = patiently(
        run.ranks,
        lambda: run.folder.choose(run.project_configuration, output_dir, metric),
        looking,
        what="Saving",
        on=0,
        failed=failed,
    )
    place: Place = run.ranks.broadcast_object(chosen)
    return place


def _call_save_hooks(run: Run, staging: Path) -> None:
    models = [prepared.model for prepared in run.models]
    for hook in list(run.save_hooks.values()):
        try:
            together(run.ranks, lambda: hook(list(models), [{} for _ in models], str(staging)))  # noqa: B023
        except CheckpointError:
            if run.is_main_process:
                attempt(lambda: disk.remove(staging))  # the first error is the one to tell
            raise


def _prune(run: Run, ranks: Ranks, place: Place) -> None:
    project = run.project_configuration
    if place.made.name is not None and project.total_limit is not None:
        removing = Progress("removes older checkpoints")
        patiently(ranks, lambda: run.folder.prune(project, place), removing, what=f"Saving {place.target}", on=0)


# Loading.


def load_state(
    run: Run, /, input_dir: str | os.PathLike[str] | None = None, load_kwargs: Any = None, **kwargs: Any
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
    finish_saving(run)
    folder, path = on_first(run.ranks, lambda: run.folder.choose_to_load(run.project_configuration, input_dir))
    if path is not None:
        try:
            return _load(run, path)
        except DamagedError as error:
            raise CheckpointError(str(error)) from error
    complete, reasons = _survey(run, folder)
    _say(run, reasons, "Skipped: %s")
    for found in complete:
        try:
            return _load(run, found)
        except DamagedError as error:
            reasons.append(str(error))
            _say(run, reasons[-1:], "Skipped: %s")
    words = " ".join(f"{reason.rstrip('.')}." for reason in reasons) if reasons else "There is nothing in it."
    raise CheckpointError(f"{folder} holds no complete checkpoint. {words}")


def has_checkpoint(run: Run, folder: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load_state(folder / "latest")` (None: `load_state()`) would find a complete checkpoint. Collective.

    Where there is none, what is there and why it does not count is logged as a warning. Raises CheckpointError if the
    directory cannot be read.
    """
    numbered = run.folder.numbered
    where = on_first(run.ranks, lambda: Path(folder) if folder is not None else numbered(run.project_configuration))
    complete, reasons = _survey(run, where)
    if not complete:
        _say(run, reasons, "There is no complete checkpoint: %s")
    return bool(complete)


def _survey(run: Run, folder: Path) -> tuple[list[Path], list[str]]:
    """The complete checkpoints, the newest first, and why others are none. Collective."""

    def look() -> tuple[list[Path], list[str]]:
        found = directory.survey(folder)
        return [one.path for one in found.complete], [reason for _, reason in found.skipped]

    return on_first(run.ranks, look)


def _say(run: Run, reasons: Sequence[str], words: str) -> None:
    for reason in reasons if run.is_main_process else ():
        logger.warning(words, reason)


def _load(run: Run, path: Path) -> str:
    models = [prepared.model for prepared in run.models]
    hooks = [functools.partial(hook, models, str(path)) for hook in run.load_hooks.values()]
    checkpoint, counters = load_run(run.state(), path, hooks=hooks)
    run.step = counters["step"]
    run.folder.lineage.resume(checkpoint.manifest.made)
    if run.is_main_process:
        saved = checkpoint.manifest
        if saved.world_size != run.ranks.world_size and run.schedulers and _schedules_count_processes(run):
            logger.warning(
                "Schedulers step once for each process: with %d instead of %d processes they go on %g times as fast. Set "
                "scheduler_steps_per_process: false in shardwise_config for runs whose number of processes changes.",
                run.ranks.world_size,
                saved.world_size,
                run.ranks.world_size / saved.world_size,
            )
        logger.info("Resumed %s: step %d, saved by %d rank(s).", path, saved.step, saved.world_size)
    return str(path)


def _schedules_count_processes(run: Run) -> bool:
    each = run.config.engine.scheduler_steps_per_process and not run.dataloader_config.split_batches
    return each and run.step_scheduler_with_optimizer


def _register(hooks: OrderedDict[int, Callable[..., Any]], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
