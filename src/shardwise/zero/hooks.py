"""Where the engine listens to modules and to autograd: the only file that registers hooks.

    forward of an entry module     need(its units) before, done(its units) after
    weight read by another module  need(its unit) until the module that is running ends; in a recomputation, need(its unit)
    forward of the outermost one   begins and ends the schedule's forward pass
    gradient of an output          need(its units) before the module's backward
    gradients of its inputs        done(its units): an identity function on the inputs runs last in its backward
    gradient of a parameter        counted; the last one of a unit has it reduced
    end of autograd's backward     ends the schedule's backward pass

Activation checkpointing runs the forward hooks again, inside the backward; there they only ask for the unit, and the
backward decides when it is done.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .ending import EndOfBackward
from .forwards import Forwards, Running
from .gradients import Gradients
from .listening import Listening, watch_inputs
from .nested import mapped, tensors_in
from .saved import SavedWeights
from .schedule import Phase, Schedule
from .unit import Unit, Weights
from .weakly import Entry, weakly

log = logging.getLogger("shardwise")

_BACKWARD = Phase.BACKWARD  # an Enum looks its members up by a call


class Hooks:
    """Ties one model to its schedule.

    root:          the model; its forward is the pass, also when no unit belongs to it.
    before:        called when a forward begins that records gradients.
    boundary:      asked when a backward begins: is this the last micro-batch before a step?
    after:         called when a backward has ended, with that answer.
    compute_dtype: floating inputs of the outermost module are cast to it; None leaves them.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        root: nn.Module,
        before: Callable[[], None],
        boundary: Callable[[], bool],
        after: Callable[[bool], None],
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.schedule = schedule
        self._before = before
        self._boundary = boundary
        self._after = after
        self._compute_dtype = compute_dtype
        self._forwards = Forwards(root)
        self._left = False  # an error has ended the backward that seems to run
        self._left_boundary = True  # of the backward that began last
        schedule.end_left_backward = self._end_left_backward
        self._active: dict[Unit, int] = defaultdict(int)  # in how many running forwards each unit is needed
        self._recording = False  # whether the running forward of the model records a graph
        self._unrecorded: set[nn.Module] = set()  # ran without one in such a forward: to be recomputed, or for good
        self._told_of_reads = False
        self._following = False  # whether it packs the weights that autograd keeps
        recall = weakly(self.recall, gone=lambda _: True)
        self.saved = SavedWeights(schedule.units, recall, main=schedule.ranks.rank == 0)
        self.listening = Listening(root, self)
        self.renew()

    def renew(self) -> None:
        """The schedule may have other units. Not inside a forward."""
        self.listening.renew(self.schedule.units)
        self._active.clear()
        self.saved.renew(self.schedule.units)

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model is running, one whose backward runs inside of it included."""
        return self._forwards.in_forward

    def finish_interrupted(self) -> None:
        """End the pass that an error or an interrupt has left open, for verbs between passes. Collective where there is one.

        What a backward had brought by then counts, as in torch. Does nothing inside of a pass.
        """
        if (self._forwards or self.schedule.phase is not Phase.IDLE) and not in_backward():
            self._forget_interrupted()
            if not self._forwards:
                self.schedule.abandon_open_pass()

    def _forget_interrupted(self) -> None:
        """Forget forwards that have ended without a word."""
        if self._forwards.are_over():
            self._forwards.forget()
            self._active.clear()
            self._recording = False
            if self._following:
                self._following = False
                self.saved.unwind()

    # Forward.

    def before_forward(
        self,
        kind: int,
        entry: Entry,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        recording = torch.is_grad_enabled()
        if not recording and not self.schedule.holds and not self._forwards:
            self.schedule.lending.evaluates(self.schedule)
        if not recording and self.schedule.holds:  # generating: a token's forward is little more than such calls
            outermost = self._begins(Running(module, (), recomputed=False), sys._getframe(1))
            return self._cast(args, kwargs) if outermost and self._compute_dtype is not None else None
        running = Running(module, entry.units, recomputed=in_backward())
        outermost = self._begins(running, sys._getframe(1))
        if _transforming():
            with temporarily_clear_interpreter_stack():
                self._enter(kind, running, outermost, recording, stay=True)
        else:
            self._enter(kind, running, outermost, recording)
        changed = outermost and self._compute_dtype is not None
        if changed:
            args, kwargs = self._cast(args, kwargs)
        if recording and any(unit.leaves for unit in entry.ending) and not _transforming():
            wrapped = watch_inputs((args, kwargs), entry.ends)
            if wrapped is not None:
                args, kwargs = wrapped
                changed = True
        return (args, kwargs) if changed else None

    def _begins(self, running: Running, frame: FrameType) -> bool:
        """An entry module runs, called from `frame`. Whether it is the outermost one."""
        forwards = self._forwards
        if forwards.doubted(running.module):
            self._forget_interrupted()
        outermost = not forwards.in_forward and not running.recomputed
        forwards.begin(running, frame)
        return outermost

    def _enter(self, kind: int, running: Running, outermost: bool, recording: bool, *, stay: bool = False) -> None:
        """Ask for the units of a module that runs; the outermost one begins a pass.

        stay: what is gathered stays until a pass begins that says otherwise.
        """
        schedule = self.schedule
        if running.recomputed:
            if not self._in_pass:
                self._begin_backward()
            schedule.reducing.recomputes |= running.module in self._unrecorded
        else:
            for unit in running.units:
                self._active[unit] += 1
            if outermost:
                schedule.abandon_open_pass()  # before gradients are looked at: a backward that was left ends with some
                self._recording = recording
                if recording:
                    self._before()
                schedule.begin_forward(recording, kind, stay=stay)
                self._following = recording and self.saved.follows and self.saved.begin()
        for unit in running.units:
            schedule.need(unit)

    def _cast(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._compute_dtype is not None
        args, kwargs = mapped((args, kwargs), _caster(self._compute_dtype))
        return args, kwargs

    def after_forward(self, entry: Entry, module: nn.Module, args: Any, output: Any) -> None:
        over = self._forwards.end(module)
        if self.schedule.holds and not torch.is_grad_enabled():
            return
        if _transforming():
            with temporarily_clear_interpreter_stack():
                self._leave(over)
            return
        if torch.is_grad_enabled() and output is not None:
            for tensor in tensors_in(output):
                # A weight that is handed out lives on: a hook for each forward would pile up on it.
                if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                    tensor.register_hook(entry.begins)  # type: ignore[no-untyped-call]
        self._leave(over)

    def _leave(self, over: Sequence[Running]) -> None:
        schedule = self.schedule
        if all(running.recomputed for running in over):
            return
        if not torch.is_grad_enabled() and self._recording:
            self._unrecorded.update(running.module for running in over)
        for unit in (unit for running in over if not running.recomputed for unit in running.units):
            self._active[unit] -= 1
            if not self._active[unit]:  # the encoder has ended, but the model around it needs the root unit still
                schedule.done(unit)
        if not self.in_forward:
            if self._following:
                self._following = False
                self.saved.end()
            schedule.end_forward()

    def wanted(self, unit: Unit, name: str) -> bool:
        """A script reads `name`, a released weight of `unit`. Whether it may: it is gathered for the module that is running.

        Such as a regulariser over the weights of all blocks, or a head that computes with the embedding's. In a backward it is
        gathered for a part of a module that the script recomputes: no module runs then, and where the output came in an object
        of the script's own nobody has announced it.
        """
        running = self._forwards.lend(unit)
        if running is None:
            # A read that records nothing, and comes before the backward has come to the model, is no part of one.
            if not in_backward():
                return not self._forwards and self.schedule.lending.lend(self.schedule, unit, name)
            if not (self._in_pass or torch.is_grad_enabled()):
                return False
            with temporarily_clear_interpreter_stack() if _transforming() else nullcontext():
                self.recall(unit)
            return True
        if not running.recomputed:
            self._active[unit] += 1
        if torch.is_grad_enabled():
            self.note_read()
        with temporarily_clear_interpreter_stack() if _transforming() else nullcontext():
            self.schedule.need(unit)
        if not self._told_of_reads and self.schedule.ranks.rank == 0:
            self._told_of_reads = True
            log.warning(
                "%r is read inside of the forward of %s, not of its own module: its unit is gathered for that, and stays until "
                "that forward ends. To gather it once for both, pass the outer module in `units`.",
                name,
                type(running.module).__name__,
            )
        return True

    def note_read(self) -> None:
        """Weights are read in a pass past their own module: what autograd keeps of them is followed for good.

        A forward that follows nothing any more does not know what it keeps; so it keeps all that it gathers.
        """
        if torch.is_grad_enabled() and not self._following:
            self.schedule.linger()
        self.saved.surprise()

    # Backward. Autograd calls these, on its own thread when the device is a GPU.

    def before_backward(self, entry: Entry, _: Tensor) -> None:
        if not self._in_pass:
            self._begin_backward()
        for unit in entry.units:
            self.schedule.need(unit)

    def after_backward(self, entry: Entry, *_: Tensor) -> None:
        for unit in entry.ending:
            self.schedule.done(unit)

    def gradient_arrived(self, unit: Unit, index: int) -> None:
        assert unit.trained is not None
        gradients = unit.trained.gradients
        if self.schedule.phase is not _BACKWARD or self._left:  # `_in_pass`, in every parameter's way
            with gradients.shown.without(index):  # the backward's first gradient is no script's
                self._begin_backward()
        if gradients.note(index):
            with torch.no_grad():  # of a backward that records one for itself
                self.schedule.reducing.complete(unit)

    def notice(self, _: Tensor) -> None:
        """A weight that nothing counts has got its gradient: a backward is running."""
        if not self._in_pass:
            self._begin_backward()

    def uses(self, unit: Unit) -> bool:
        """Whether a running forward needs `unit`."""
        return bool(self._active.get(unit))

    @property
    def in_pass(self) -> bool:
        """Whether a forward or a backward is running: `hold` would end it."""
        return bool(self._forwards) or (self.schedule.phase is Phase.BACKWARD and in_backward())

    def recall(self, unit: Unit) -> bool:
        """A backward is about to read the weights of `unit`, wherever it comes from. Whether they were asked for already."""
        if not self._in_pass:
            self._begin_backward()
        here = unit.state is Weights.GATHERED
        self.schedule.need(unit)
        return here

    @property
    def _in_pass(self) -> bool:
        """Whether the running backward is the one that the schedule knows of."""
        return self.schedule.phase is Phase.BACKWARD and not self._left

    def _begin_backward(self) -> None:
        if self._forwards:
            self._forget_interrupted()
        if self._left:
            self.schedule.abandon_open_pass()
        boundary = self._left_boundary = self._boundary()
        self.schedule.begin_backward(boundary, again=_records_backward())
        end = EndOfBackward(ended=partial(self._end_backward, boundary), left=self._leave_backward)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _leave_backward(self) -> None:
        """An error has ended the backward. Until a verb ends its pass, scripts see what there is of gradients."""
        if self.schedule.phase is Phase.BACKWARD:
            self._left = True
            for gradients in self._gradients():
                gradients.shown.put_back()

    def _gradients(self) -> list[Gradients]:
        return [unit.trained.gradients for unit in self.schedule.units if unit.trained is not None]

    @torch.no_grad()
    def _end_left_backward(self) -> None:
        """An error or an interrupt has ended a backward. What it had brought counts, unless a script has dropped it since."""
        left, self._left = self._left, False
        if left:
            self.schedule.lanes.join()
            for gradients in self._gradients():
                gradients.shown.look(before_backward=True)
        self.schedule.end_backward(whole=False)
        self._after(self._left_boundary)

    @torch.no_grad()
    def _end_backward(self, boundary: bool) -> None:
        self.schedule.end_backward()
        self.saved.backward_ended()
        self._after(boundary)
        if self.in_forward:  # it takes gradients by itself, such as forces of an energy, and goes on
            self.schedule.resume_forward(self._recording, [unit for unit, times in self._active.items() if times])


def _transforming() -> bool:
    """Whether this runs inside of a transform of torch.func, where tensors are not what they seem and nothing can be sent."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: true inside a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def _records_backward() -> bool:
    """Whether the result of the running backward shall have a backward too (create_graph=True).

    Only then gradients are recorded in it, but for those of a recomputation, where it may begin; its graph is kept as well.
    """
    return torch.is_grad_enabled() and bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _caster(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
