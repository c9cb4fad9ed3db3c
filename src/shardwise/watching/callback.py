"""A run of transformers' Trainer as a record: a callback for `Trainer(callbacks=[WatchCallback()])`.

The engine below the Trainer says when it steps and when it evaluates; the Trainer says the rest, with its own loss, rate and
norm. The class has the methods of a TrainerCallback and is none by inheritance, so that it is imported without transformers.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch

from ..ranks.activity import activity
from ..ranks.by_first import by_first
from ..ranks.unfinished import AtEnd
from ..zero.sharded import find_sharded
from .about import facts, peak_for
from .bar import Bar
from .clock import Clock
from .lines import Lines, Noted, Run
from .memory import Ledger, Memory
from .record import Line, Record
from .watch import ids_in
from .work import work_of

logger = logging.getLogger("shardwise")

_EVENTS = (
    *("on_init_end", "on_epoch_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_predict", "on_push_begin"),
    "on_prediction_step",
)


class WatchCallback:
    """Writes metrics.jsonl and run.json of a Trainer's run, one line for each of its logs, and a bar; on rank 0 alone.

    directory:       where they go; the Trainer's output_dir if None.
    flops_per_token: operations of the model for a token, forward and backward, where its weights do not tell.
    peak_flops:      operations a second of one device, where its name does not tell.
    bar:             whether the newest line is shown on stderr.

    A directory that cannot be written is an error of every rank that has the callback. Tokens are counted on rank 0, and taken
    to be as many on the others. docs/design/watching.md says what is in a line.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        bar: bool = True,
    ) -> None:
        self._directory = directory
        self._per_token, self._peak, self._shows = flops_per_token, peak_flops, bar
        self._lines: Lines | None = None
        self._tokens = self._samples = 0
        self._hook: Any = None
        self._at_end: AtEnd | None = None
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        if name in _EVENTS:
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # What the Trainer tells.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sharded = find_sharded(kwargs["model"])
        if sharded is not None:
            by_first(sharded.ranks, "WatchCallback", lambda: self._begin(args, state, **kwargs))
        elif state.is_world_process_zero:
            self._begin(args, state, **kwargs)

    def _begin(self, args: Any, state: Any, **kwargs: Any) -> None:
        """On rank 0. Raises ConfigError for a directory that cannot be written."""
        self._close()  # of a training that an interruption has ended
        self._tokens = self._samples = 0  # of steps that no log came behind
        model, device = kwargs["model"], args.device
        sharded, ledger = find_sharded(model), _ledger_of(model)
        shapes = {} if sharded is None else {member.name: tuple(member.shape) for member in sharded.whole.members()}
        work = work_of(model, shapes, self._per_token)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        peak = peak_for(device, dtype, self._peak)
        per_epoch = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        run = Run(args.world_size, state.max_steps, per_epoch, work, peak[0])
        record = Record(self._directory or args.output_dir, goes_on=state.global_step > 0)
        record.about(
            facts(
                device=device,
                ranks=args.world_size,
                work=work,
                peak=peak,
                ledger=ledger(),
                settings=args.to_sanitized_dict(),
                more={"steps": state.max_steps, "steps_per_epoch": per_epoch, "log_every": state.logging_steps},
            )
        )
        bar = Bar(state.max_steps, state.max_steps / per_epoch if per_epoch else None) if self._shows else None
        self._lines = Lines(run, Clock(device, "data"), state.global_step, Memory(device, ledger), record, bar, _nobody)
        self._step = state.global_step
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        activity.listener = self._lines  # the engine says when it steps
        self._at_end = AtEnd("The last line of the run's record", functools.partial(self._close, wait=False))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._lines is not None:
            self._lines.given()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between the micro-batches of a step nothing is waited for: the Trainer has read all of them before it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        self._goes_on(evaluates=control.should_evaluate, saves=control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._goes_on(evaluates=control.should_evaluate, saves=control.should_save)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._due(args, state, logs)

    def _due(self, args: Any, state: Any, logs: dict[str, Any]) -> None:
        if self._lines is None:
            return
        tokens, samples = self._tokens * args.world_size, self._samples * args.world_size
        self._tokens = self._samples = 0
        noted = Noted(
            _number(logs.get("loss")),
            _number(logs.get("learning_rate")),
            _number(logs.get("grad_norm")),
            tokens or None,
            samples or None,
        )
        self._lines.due(state.global_step, lambda: noted)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._goes_on(evaluates=False, saves=control.should_save)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._goes_on(evaluates=False, saves=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._samples:  # of steps behind the last log
            self._due(args, state, {})
        self._close()

    def _goes_on(self, *, evaluates: bool, saves: bool) -> None:
        """Behind a step the Trainer evaluates and saves, where it has said so, and then reads the next batches."""
        if self._lines is None:
            return
        if evaluates or saves:
            self._lines.enter("evaluation" if evaluates else "saving")
        else:
            self._lines.asks()

    def _count(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = ids_in(kwargs) if kwargs else ids_in(args)
        if model.training and ids is not None:
            self._tokens += ids.numel()
            self._samples += len(ids)

    def _close(self, *, wait: bool = True) -> None:
        if self._at_end is not None:
            self._at_end.cancel()
            self._at_end = None
        if activity.listener is self._lines:
            activity.listener = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._lines is not None:
            self._lines.close(self._step, wait=wait)
            self._lines = None


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What this callback does at an event that it does not need."""


def _nobody(line: Line) -> None:
    """The Trainer reports to trackers by itself."""


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _steps_per_epoch(args: Any, loader: Any) -> int | None:
    """As the Trainer counts them: it tells its callbacks only whole epochs, also where max_steps ends within one."""
    try:
        steps: int = -(-len(loader) // args.gradient_accumulation_steps)
    except TypeError:  # of a stream nobody knows
        return None
    return max(1, steps)


def _ledger_of(model: torch.nn.Module) -> Any:
    def ledger() -> Ledger:
        sharded = find_sharded(model)
        found = {} if sharded is None else sharded.ledger()
        return {(str(role), tier): count for (role, tier), count in found.items()}

    return ledger
