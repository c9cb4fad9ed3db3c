"""An Accelerator's verb that watches a run: what of it a Watch needs is found among what was prepared."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from ..data.loader import PreparedLoader
from ..errors import DataError, PrepareError
from ..step.optimizer import ShardedOptimizer
from ..watching.about import facts, peak_for
from ..watching.bar import Bar
from ..watching.clock import Clock
from ..watching.lines import Lines
from ..watching.lines import Run as Watchable
from ..watching.memory import Ledger, Memory
from ..watching.record import Line, Record
from ..watching.watch import Watch, Watched, Wishes
from ..watching.work import Work, work_of
from .run import Run

logger = logging.getLogger("shardwise")


def watch(
    run: Run,
    loader: Iterable[Any],
    *,
    epochs: float | None = None,
    steps: int | None = None,
    log_every: int = 1,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
    bar: bool = True,
) -> Watched:
    """The batches of `loader`, as it gives them, while the run is watched: a bar, and lines in project_dir/metrics.jsonl.

    epochs, steps:   how long the whole run is, for the time that is left: passes over `loader`, or optimizer steps.
    log_every:       optimizer steps between two lines.
    flops_per_token: operations of the model for a token, forward and backward, where its weights do not tell.
    peak_flops:      operations a second of one device, where its name does not tell.
    bar:             whether rank 0 shows the newest line on stderr.

    Each line goes to the trackers too. Without a project_dir there is no file, which is said. Collective; a run has one
    watch, so each call says the same. docs/design/watching.md says what is in a line. `end_training` writes the last one.
    Raises, on every rank: ConfigError for a wrong value or another than in the first call, PrepareError if no
    optimizer is prepared, DataError for a loader that cannot be iterated over, or has no length where epochs are given.
    """
    wishes = Wishes(epochs, steps, log_every, flops_per_token, peak_flops, bar)
    run.ranks.together(lambda: _check(run, loader, wishes))
    if run.watch is None or run.watch.closed:
        run.watch = _made(run, loader, wishes)
    return Watched(run.watch, loader)


def _check(run: Run, loader: Any, wishes: Wishes) -> None:
    wishes.check()
    if run.watch is not None and not run.watch.closed:
        run.watch.wishes.refuse_change(wishes)
    if not run.optimizers:
        raise PrepareError("watch: no optimizer is prepared, so there are no steps to watch. Call prepare first.")
    if not isinstance(loader, Iterable):
        raise DataError(f"watch takes what a loop goes over, not a {type(loader).__name__}.")
    if wishes.epochs is not None and _length(loader) is None:
        raise DataError("watch: this loader has no length, so that epochs= says nothing of the run's end. Give steps=.")


def _length(loader: Any) -> int | None:
    """Batches of a whole epoch; None where it cannot be known."""
    if not isinstance(loader, Sized):
        return None
    try:
        left_out = loader._skip + loader._skip_sampler if isinstance(loader, PreparedLoader) else 0
        return len(loader) + left_out
    except TypeError:  # torch's, of a stream
        return None


def _made(run: Run, loader: Any, wishes: Wishes) -> Watch:
    entry = run.optimizers[0]
    stepper, optimizer = entry.stepper, entry.optimizer

    def rate() -> float | Tensor | None:
        return optimizer.param_groups[0].get("lr")

    def norm() -> Tensor | None:
        return stepper.norm if isinstance(stepper, ShardedOptimizer) else None

    length = _length(loader)
    lines = run.ranks.together(lambda: _lines(run, length, wishes) if run.is_main_process else None)
    return Watch(run.ranks, wishes, lambda: _steps(run), rate, norm, lines)


def _steps(run: Run) -> int:
    """Optimizer steps done, as checkpoints count them: of several optimizers those of the one that has made most."""
    return max((entry.stepper.steps for entry in run.optimizers), default=0)


def _lines(run: Run, length: int | None, wishes: Wishes) -> Callable[[], Lines]:
    """What makes the lines of rank 0, when the loop begins. Opens their files. length: batches of an epoch."""
    device, ranks = run.ranks.device, run.ranks.world_size
    per_epoch = None if length is None else math.ceil(length / run.gradient_state.num_steps)
    total = wishes.steps
    if wishes.epochs is not None and per_epoch is not None:
        total = math.ceil(wishes.epochs * per_epoch)
    work, ledger = _work(run, wishes), _ledger_of(run)
    peak = peak_for(device, _computes_in(run), wishes.peak_flops)
    watchable = Watchable(ranks, total, per_epoch, work, peak[0])
    record, done = None, _steps(run)
    if run.project_configuration.project_dir is None:
        logger.warning("watch: no metrics.jsonl is written, for this Accelerator has no project_dir.")
    else:
        record = Record(run.project_configuration.project_dir, goes_on=done > 0)
        settings = run.config.model_dump(mode="json", exclude_none=True)
        more = {"plan": str(run.plan), "steps": total, "steps_per_epoch": per_epoch, "log_every": wishes.log_every}
        found = facts(device=device, ranks=ranks, work=work, peak=peak, ledger=ledger(), settings=settings, more=more)
        record.about(found)
    shown = Bar(total, wishes.epochs) if wishes.bar else None
    tell = functools.partial(_tell, run.trackers)
    return lambda: Lines(watchable, Clock(device, "data"), _steps(run), Memory(device, ledger), record, shown, tell)


def _work(run: Run, wishes: Wishes) -> Work:
    """Of the model that the first optimizer trains; without a prepared one nothing is known."""
    if not run.models:
        return Work(0, 0, 0, per_token=wishes.flops_per_token, unknown="no model is prepared; give flops_per_token=")
    prepared = run.models[0]
    shapes = {member.name: tuple(member.shape) for member in prepared.sharded.whole.members()}
    return work_of(prepared.model, shapes, wishes.flops_per_token)


def _computes_in(run: Run) -> torch.dtype:
    """The dtype of most of its products."""
    if run.precision.compute is not None:
        return run.precision.compute
    count: dict[torch.dtype, int] = {}
    for prepared in run.models[:1]:
        for member in prepared.sharded.whole.members():
            count[member.dtype] = count.get(member.dtype, 0) + math.prod(member.shape)
    return max(count, key=lambda dtype: count[dtype], default=torch.float32)


def _ledger_of(run: Run) -> Callable[[], Ledger]:
    """What gives the bytes at rest on this rank, of all that is prepared now."""
    sharded = [prepared.sharded for prepared in run.models]
    steppers = [entry.stepper for entry in run.optimizers if isinstance(entry.stepper, ShardedOptimizer)]

    def ledger() -> Ledger:
        found: Ledger = {}
        for part in (*(one.ledger() for one in sharded), *(one.ledger() for one in steppers)):
            for (role, tier), count in part.items():
                found[str(role), tier] = found.get((str(role), tier), 0) + count
        return found

    return ledger


_TOLD = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "epoch",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "samples_per_s",
    "mfu",
)


def _tell(trackers: list[Any], line: Line) -> None:
    """Give a line to the trackers: its numbers under train/, time/ and memory/."""
    if not trackers:
        return
    values = {f"train/{name}": line[name] for name in _TOLD}
    values |= {f"time/{part}_s": seconds for part, seconds in line["time_s"].items()}
    for tier, level in line["memory_bytes"].items():
        values |= {f"memory/{tier}_{which}_bytes": count for which, count in (level or {}).items()}
    known = {name: value for name, value in values.items() if value is not None}
    for tracker in trackers:
        tracker.log(known, step=line["step"])
