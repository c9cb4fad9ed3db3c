"""The gradients of one flat buffer, from a backward to the step: which have come, and what becomes of them.

    EMPTY --collect--> COLLECTING --reduce--> REDUCING --settle--> READY --drop--> EMPTY
    EMPTY --reduce--> REDUCING, where no micro-batch is only collected
    EMPTY --put--> READY, where a script gives a gradient of its own

Their values, and where those rest: `sums.py`. What scripts see of them: `shown.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto
from itertools import islice

import torch
from torch import Tensor

from ..errors import UnitStateError
from ..offload.store import Slab
from .engine import Engine
from .flat import FlatBuffer
from .guard import unasked
from .shown import Shown
from .sums import Sums


class Grads(Enum):
    EMPTY = auto()
    COLLECTING = auto()
    REDUCING = auto()
    READY = auto()


_MOVES = {
    Grads.EMPTY: {Grads.COLLECTING, Grads.REDUCING, Grads.READY, Grads.EMPTY},
    Grads.COLLECTING: {Grads.REDUCING, Grads.COLLECTING, Grads.EMPTY},
    Grads.REDUCING: {Grads.READY, Grads.REDUCING, Grads.COLLECTING, Grads.EMPTY},
    Grads.READY: {Grads.COLLECTING, Grads.REDUCING, Grads.EMPTY},
}


def used_by_any(gradients: Iterable[Gradients], used: Iterable[bool]) -> None:
    """What any rank has used has a gradient on every rank. used: of all their parameters in turn, whether one has."""
    flags = iter(used)
    for each in gradients:
        each.used = list(islice(flags, len(each.used)))


class Gradients:
    """The gradients of one trainable buffer.

    used:     per parameter, whether a gradient has arrived since the last step: on any rank where what is averaged counts, else
              on this one.
    pending:  whose gradients the running backward has not brought yet.
    measured: whether the step will ask for `square`: set by the optimizer that clips.
    """

    def __init__(self, buffer: FlatBuffer, sums: Sums, engine: Engine) -> None:
        self.buffer = buffer
        self.sums = sums
        self.state = Grads.EMPTY
        self.used = [False] * len(buffer.members)
        self.pending: set[int] = set()
        self.measured = sums.on_host
        self._engine = engine
        self.shown = Shown(self, engine.norms)
        engine.norms.count(self)

    def _move(self, state: Grads) -> None:
        if state not in _MOVES[self.state]:
            raise UnitStateError(
                f"gradients of {self.buffer.members[0].name}...: {self.state.name} does not lead to "
                f"{state.name}. This is a fault of shardwise; please report it."
            )
        self.state = state

    # During a backward.

    def expect(self, *, reduces: bool, boundary: bool) -> None:
        """A backward begins: no parameter has sent its gradient yet. reduces, boundary: whether it will be, and how."""
        self.shown.look(before_backward=True)
        self.sums.apply_factor()
        self.pending = set(range(len(self.buffer.members)))
        if reduces:
            self.sums.expect(boundary)

    def note(self, index: int) -> bool:
        """Parameter `index` has its gradient. True when it was the last of the unit."""
        self.used[index] = True
        self.pending.discard(index)
        return not self.pending

    def collect(self) -> None:
        """Add this rank's gradients to its own sum and drop them from the parameters. No communication."""
        self._move(Grads.COLLECTING)
        self.sums.collect(self._take())

    def reduce(self, boundary: bool = True) -> None:
        """Average over the ranks what this rank has, and add this rank's region to what is already there.

        The one place where gradients meet: over the ranks that divide them, then over those that hold the same part; over all
        at once where none of them divide it.
        boundary: this is the last micro-batch before a step.
        Runs on the reduce lane. Parameters without a gradient count as zeros, so that every rank may call it.
        """
        self._move(Grads.REDUCING)
        engine, lanes, sums = self._engine, self._engine.lanes, self.sums
        ranks = engine.ranks
        engine.reductions.make_room(self.scratch_nbytes)
        partial = sums.with_own(self._take())
        lanes.reduce.wait(lanes.mark_compute())
        with lanes.reduce.on():
            if sums.region.rank is not None:
                out = partial[sums.region.interval]
                ranks.owners.reduce_scatter(partial, out)
                ranks.alike.all_reduce_gradient(out)
            else:
                out = partial
                if not engine.share.alone:
                    ranks.all_reduce_gradient(out)
            done = sums.add(out, boundary=boundary, measured=self.measured)
        engine.reductions.add(done, partial)

    def settle(self) -> None:
        """The backward of the last micro-batch is over: the gradient is where the plan rests it, or on its way."""
        if self.sums.averaged:
            self._move(Grads.READY)

    def _take(self) -> Tensor:
        """This backward's gradients as one flat tensor in the reduce dtype, zeros where there is none."""
        flat = torch.empty(self.buffer.layout.numel, dtype=self.sums.reduce_dtype, device=self.buffer.whole.device)
        slices, gaps = self.buffer.slices_and_gaps(flat)
        targets, sources = [], []
        empty = list(gaps)
        with unasked():
            for member, target in zip(self.buffer.members, slices, strict=True):
                grad = member.parameter.grad
                if grad is not None:
                    targets.append(target)
                    sources.append((grad.to_dense() if grad.is_sparse else grad).reshape(-1))
                    member.parameter.grad = None
                else:
                    empty.append(target)
        # Zeros only where nothing is copied: filling everything would write as many bytes as the copy does.
        if empty:
            torch._foreach_zero_(empty)
        if targets:
            torch._foreach_copy_(targets, sources)
        share = self._engine.share.value
        return flat if share == 1.0 else flat.mul_(share)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that a reduction of this buffer takes besides its result."""
        return self.buffer.layout.numel * self.sums.reduce_dtype.itemsize

    # For the optimizer: None until the backward of the last micro-batch is over.

    @property
    def at_rest(self) -> Tensor | None:
        """The reduced gradient beside the master, or None if there is none. On the host, see `Stores.drain` first."""
        return self.sums.rest if self.state is Grads.READY else None

    @property
    def host(self) -> Slab | None:
        """The reduced gradient in host memory, if it is there."""
        return self.sums.host if self.state is Grads.READY else None

    @property
    def square(self) -> Tensor | None:
        """The squared 2-norm of this rank's gradient, see `Sums`; None where it was not `measured`."""
        return self.sums.square if self.state is Grads.READY else None

    # For scripts, by way of `shown`.

    def parts(self, index: int) -> list[Tensor]:
        """What is at rest of a parameter's gradient on this rank, to be read and changed; flat."""
        return self.sums.parts(index) if self.used[index] else []

    def put(self, index: int, gradient: Tensor) -> None:
        """Let this be the gradient of one parameter, equal on all ranks. gradient: in the parameter's shape, on any device."""
        self.used[index] = True
        none = not self.sums.averaged and self.sums.own is None
        self.sums.put(index, gradient)
        if none:
            self._move(Grads.READY)

    def fill(self) -> None:
        """Zeros where nothing is averaged here, because another rank has something to be averaged."""
        if not self.sums.averaged:
            self.sums.fill()
            if self.state is Grads.EMPTY:
                self._move(Grads.READY)

    def forget(self, indices: Collection[int]) -> None:
        """Forget the gradients of some parameters: another optimizer still needs the others'."""
        for index in indices:
            self.used[index] = False
        if not any(self.used):
            self.drop()
            return
        self.shown.hide_only(indices)
        self.sums.zero(indices)

    def drop(self) -> None:
        """Forget every gradient since the last step."""
        self._move(Grads.EMPTY)
        self.shown.hide()
        self.sums.drop()
        self.used = [False] * len(self.used)
