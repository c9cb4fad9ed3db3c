"""Lines of a record in the making, on the rank that writes: what was noted of a step, with the time until the next one.

    asked   given                 due                        asked   given
    | data  | forward, backward   | step | saving, other ... | data  |
    ^ a line's time begins, where the last one ended         ^ here, which is known when a batch has come

So what a script does behind a step (a save, an evaluation behind the epoch) is in that step's line. A line is written when the
device has passed its end. This file knows neither loops nor ranks; `watch.py` and `callback.py` call it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..ranks.activity import Doing
from .bar import Bar
from .clock import Clock, Interval
from .memory import Levels, Memory
from .record import Line, Record
from .work import Work

PARTS = ("data", "forward_backward", "step", "saving", "evaluation", "other")
_OF_PASS = {
    Doing.FORWARD: "forward_backward",
    Doing.BACKWARD: "forward_backward",
    Doing.EVALUATION: "evaluation",
    Doing.STEP: "step",
}
_OF_VERB = {
    "clip_grad_norm_": "step",
    **dict.fromkeys(("save_state", "finish_saving", "load_state", "save_model", "get_state_dict"), "saving"),
}
_BETWEEN = "between"  # loops: other time, but none in which tokens could have been trained on
_WRITTEN_EVERY_S = 0.5  # lines of steps that are shorter are written together, which costs half
_DRIVES_EVERY = 256  # lines between two counts of what lies on drives


@dataclass(frozen=True)
class Noted:
    """What a step says of itself; None for what is not known. tokens, samples: of all ranks since the last line."""

    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int | None = None
    samples: int | None = None


NOTHING = Noted()


@dataclass(frozen=True)
class Run:
    """What of a run its lines need.

    ranks:           how many.
    total:           optimizer steps of the whole run. steps_per_epoch: likewise. None where it is not known.
    work:            of the model. peak: operations a second of one device, None where it is not known.
    """

    ranks: int
    total: int | None
    steps_per_epoch: float | None
    work: Work
    peak: float | None


@dataclass
class _Pending:
    """A line whose numbers may be on their way. elapsed_s: at its end."""

    step: int
    noted: Callable[[], Noted]
    has_come: Callable[[], bool]
    memory: Levels
    interval: Interval | None = None
    elapsed_s: float = 0.0


def _known() -> bool:
    return True


class Lines:
    """Writes the lines of a run. It may listen to the engine (`ranks/listener.py`), or be told.

    run:    what they need of it.
    clock:  its time, made when the run is first watched. step: how many were done then.
    memory: of this process.
    record: the files, None for no files. bar: None for none. tell: who else is given each line.
    """

    def __init__(
        self,
        run: Run,
        clock: Clock,
        step: int,
        memory: Memory,
        record: Record | None,
        bar: Bar | None,
        tell: Callable[[Line], None],
    ) -> None:
        self._run, self._clock, self._memory = run, clock, memory
        self._record, self._bar, self._tell = record, bar, tell
        self._began = self._asked_at = time.perf_counter()
        self._flushed_at = -_WRITTEN_EVERY_S
        self._step = step  # of the last line
        self._due: _Pending | None = None
        self._pending: deque[_Pending] = deque()
        self._within: list[str] = []  # parts that verbs have interrupted
        self._lines = 0
        self._first: tuple[int, float] | None = None  # step and elapsed time of the first line: it has the warming up
        self._open = True

    # Where the time goes.

    def enter(self, part: str) -> None:
        if not self._within:
            self._clock.enter(part)

    def begins(self, doing: int) -> None:
        """A pass or step of the engine begins."""
        part = _OF_PASS.get(Doing(doing))
        if part is not None and part != self._clock.part:
            self.enter(part)

    def stepped(self) -> None:
        """The engine has made a step."""
        self.enter("other")

    def calls(self, verb: str) -> None:
        """A verb of the script begins; what lies inside is its part of the time."""
        part = _OF_VERB.get(verb)
        if self._within:
            self._within.append(self._clock.part)
        elif part is not None:
            self._within.append(self._clock.enter(part))

    def returns(self) -> None:
        if self._within:
            before = self._within.pop()
            if not self._within:
                self._clock.enter(before)

    def asks(self) -> None:
        """A batch is waited for."""
        self._asked_at = time.perf_counter()
        self.enter("data")

    def given(self) -> None:
        """There is one."""
        if self._due is not None:
            self._end_line(self._clock.cut(before_part=self._clock.part == "data"), self._asked_at)
        self.enter("forward_backward")
        if self._asked_at - self._flushed_at >= _WRITTEN_EVERY_S:
            self._flushed_at = self._asked_at
            self.flush()

    # Lines.

    def due(self, step: int, noted: Callable[[], Noted], has_come: Callable[[], bool] = _known) -> None:
        """A line of what was noted is to be written. noted: gives it, without waiting once it `has_come`."""
        if self._due is not None:  # steps without a batch between them
            self._end_line(self._clock.cut(), time.perf_counter())
        if self._lines % _DRIVES_EVERY == 0:
            self._memory.look_at_drives()
        self._lines += 1
        self._due = _Pending(step, noted, has_come, self._memory.read())

    def _end_line(self, interval: Interval, at: float) -> None:
        assert self._due is not None
        self._due.interval, self._due.elapsed_s = interval, at - self._began
        self._pending.append(self._due)
        self._due = None

    def flush(self, *, wait: bool = False) -> None:
        """Write what has come. wait: for what has not."""
        while self._pending:
            first = self._pending[0]
            assert first.interval is not None
            if not (wait or (first.has_come() and first.interval.passed())):
                return
            self._pending.popleft()
            line = self._line(first, first.interval.read())
            if self._record is not None:
                self._record.write(line)
            if self._bar is not None:
                self._bar.show(line)
            self._tell(line)

    def rest(self) -> None:
        """A loop has ended: the script goes on with other things, which are no part of training."""
        self.enter(_BETWEEN)
        self.flush()
        if self._bar is not None:
            self._bar.rest()

    def close(self, step: int, *, wait: bool = True) -> None:
        """The run ends after `step`: write what there is, also time in which no step was logged.

        wait: False leaves out what the device has not passed yet, for the end of a process whose device may hang.
        """
        if not self._open:
            return
        self._open = False
        if self._due is None:
            self._due = _Pending(step, lambda: NOTHING, _known, self._memory.read())
        self._end_line(self._clock.cut(), time.perf_counter())
        self.flush(wait=wait)
        if self._bar is not None:
            self._bar.rest()
        if self._record is not None:
            self._record.close()
        self._memory.close()

    def _line(self, pending: _Pending, seconds: dict[str, float]) -> Line:
        noted, run = pending.noted(), self._run
        steps, self._step = pending.step - self._step, pending.step
        wall, between = sum(seconds.values()), seconds.pop(_BETWEEN, 0.0)
        training = sum(seconds.values()) - seconds.get("saving", 0.0) - seconds.get("evaluation", 0.0)
        seconds["other"] = seconds.get("other", 0.0) + between
        tokens = _rate(noted.tokens, training)
        each = None if tokens is None else tokens / run.ranks
        work = run.work.of_token(noted.tokens / noted.samples) if noted.tokens and noted.samples else None
        return {
            "step": pending.step,
            "steps": steps,
            "epoch": None if not run.steps_per_epoch else pending.step / run.steps_per_epoch,
            "loss": noted.loss,
            "learning_rate": noted.learning_rate,
            "gradient_norm": noted.gradient_norm,
            "tokens": noted.tokens,
            "samples": noted.samples,
            "tokens_per_s": tokens,
            "tokens_per_s_per_gpu": each,
            "samples_per_s": _rate(noted.samples, training),
            "mfu": None if work is None or each is None or run.peak is None else work * each / run.peak,
            "wall_s": wall,
            "time_s": {part: round(seconds.get(part, 0.0), 7) for part in PARTS},
            "memory_bytes": pending.memory,
            "elapsed_s": pending.elapsed_s,
            "left_s": self._left(pending, steps),
        }

    def _left(self, pending: _Pending, steps: int) -> float | None:
        """Seconds left of the run: steps left times the mean of those so far, from the second line on without the first's."""
        if self._run.total is None:
            return None
        if self._first is None:
            done, elapsed = steps, pending.elapsed_s
            self._first = (pending.step, pending.elapsed_s)
        else:
            done, elapsed = pending.step - self._first[0], pending.elapsed_s - self._first[1]
        left = max(0, self._run.total - pending.step)
        if not left:
            return 0.0
        return left * elapsed / done if done else None


def _rate(count: int | None, seconds: float) -> float | None:
    return None if not count or seconds <= 0 else count / seconds
