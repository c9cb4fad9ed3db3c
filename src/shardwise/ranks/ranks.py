"""The ranks of a run and what they do together. `joining.py`, `leaving.py`, `symmetric.py` beside it call torch.distributed.

There are three groups. The data group moves tensors on the device (NCCL on CUDA, gloo on CPU). The reduce group does the
same for gradients alone: a communicator needs its operations in the same order on every rank, and ranks that take
different branches reach gathers and reductions in different interleavings, though each kind in the same order. The control
group is always gloo and moves small facts between host processes: which error a rank met, an object, a barrier, which
unit is needed next. It never waits behind a gather, and agreement works while a GPU is busy.

With one rank no process group is made and every collective is a copy or nothing: the callers need no second path.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.agreement import Difference, disagreement
from ..errors import ConfigError, LayoutError, RankError
from . import assembling, leaving, symmetric
from .agreeing import attempt, attempt_or_interrupt, compared, raise_first, words_of
from .joining import Joined, join_groups
from .words import Words, exchanged

__all__ = ["Ranks", "ReduceOp", "attempt", "attempt_or_interrupt"]

ReduceOp = Literal["sum", "mean", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
T = TypeVar("T")
P = ParamSpec("P")

# torch 2.13 renamed both and warns on the old names; torch 2.9 to 2.12 have only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# What gloo and the store say when another rank is not there.
_MISSING = re.compile(r"timed? ?out|connection|pair closure|broken pipe|socket", re.IGNORECASE)


def _waiting(collective: Callable[P, T]) -> Callable[P, T]:
    """A collective that says in a sentence, RankError, that another rank did not come; and at once from then on.

    Of NCCL's, which only enqueue, torch's watchdog tells.
    """

    @functools.wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        ranks: Ranks = args[0]  # type: ignore[assignment]
        if ranks.lost is not None:
            raise RankError(ranks.lost)
        try:
            return collective(*args, **kwargs)
        except RankError:
            raise
        except RuntimeError as error:
            if _MISSING.search(str(error)) is None:
                raise
            ranks.lost = (
                f"rank {ranks.rank} waited for the other ranks in {collective.__name__}, and at least one did not come: it "
                f"was interrupted, has ended, or does something else. ({' '.join(str(error).split())[:200]}) Nothing that "
                "needs all ranks works any more: end this one too, and resume from a checkpoint."
            )
            raise RankError(ranks.lost) from error

    return call


def _store() -> Any:
    """What the ranks found each other by."""
    return dist.distributed_c10d._get_default_store()


class Ranks:
    """This process, its device, and the collectives over all processes of the run.

    rank, world_size:             over all machines.
    local_rank, local_world_size: on this machine.
    device:                       cuda:local_rank or cpu.
    words:                        what a rank leaves for others without waiting for them.
    lost:                         what a collective said that another rank did not come to; None while all are there.
    counts:                       how often each collective ran on this rank, by name; tests hold it against the design.
    """

    def __init__(self, joined: Joined) -> None:
        self.rank = joined.rank
        self.world_size = joined.world_size
        self.local_rank = joined.local_rank
        self.local_world_size = joined.local_world_size
        self.device = joined.device
        self.counts: Counter[str] = Counter()
        self._owns_group = joined.owned
        self._timeout = joined.timeout
        self._data, self._control = joined.data, joined.control
        self._reduce = None if joined.data is None else dist.group.WORLD
        self._told: dist.Work | None = None  # a vote whose outcome this rank knew
        self._is_aside = False
        self._asides: list[Ranks] = []
        self.lost: str | None = None
        self.words = Words(joined.rank, _store if joined.world_size > 1 else None, joined.timeout)
        if self.world_size > 1:
            leaving.remember(self, made_world=joined.owned)

    @classmethod
    def join(cls, *, use_cpu: bool = False, timeout_s: float = 600.0, problem: Exception | None = None) -> Ranks:
        """Join the run that the environment describes; a process that no launcher started is a run of one rank. Collective.

        Where the script has made torch's process group by itself, its ranks are the run.
        use_cpu:   take gloo and the CPU even where CUDA devices are visible.
        timeout_s: how long a collective may wait for the other ranks before it raises.
        problem:   why this rank cannot join: raised here, and told to the others, who raise RankError. With a group that the
                   script made nobody is told: that is for whoever compares next.
        Raises ConfigError on every rank if ranks differ in what a process group needs, or a machine has fewer CUDA devices than
        ranks; RankError if a rank does not come in time.
        """
        return cls(join_groups(use_cpu, timeout_s, problem))

    def leave(self) -> None:
        """Take the process groups down, if `join` made them. A script that ends without it does so at its end."""
        if self._owns_group and dist.is_initialized():
            leaving.take_down(self.let_go()[0], world=True)
        self._owns_group = False

    @property
    def parted(self) -> bool:
        """Whether this process has left the run: nothing that needs the other ranks works any more."""
        return self.world_size > 1 and self._data is None

    def let_go(self) -> tuple[list[dist.ProcessGroup], dist.Work | None]:
        """Forget the process groups, those aside too; gives them, and a vote under way in the last. For `leaving` alone."""
        groups = [group for other in self._asides for group in other.let_go()[0]]
        groups += [group for group in (self._data, self._reduce, self._control) if group is not None]
        told = self._told
        self._data = self._reduce = self._control = self._told = None
        return groups, told

    def aside(self) -> Ranks:
        """The same ranks with a control group of their own, for facts that another thread exchanges. Collective.

        It moves no tensors of the device.
        """
        other = copy.copy(self)
        other.counts = Counter()
        other._owns_group = False
        other._is_aside = True
        other._data = other._reduce = other._told = None
        other._asides = []
        self._asides.append(other)
        if self._control is not None:
            other._control = dist.new_group(backend="gloo", timeout=self._timeout)
        return other

    @property
    def timeout_s(self) -> float:
        """How long a collective waits for the other ranks before it raises."""
        return self._timeout.total_seconds()

    @property
    def blocking(self) -> bool:
        """Whether a collective holds the host until every rank has come: gloo does, NCCL holds only its stream."""
        return self.world_size > 1 and self.device.type == "cpu"

    # Tensors, on the device, over the data group. Each runs on the current stream; the caller orders streams.

    @_waiting
    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """Concatenate every rank's `shard` into `whole`, in rank order.

        whole: (world_size * n,); shard: (n,), same dtype; may be this rank's slice of `whole`.
        Raises LayoutError if the sizes do not fit.
        """
        if whole.numel() != self.world_size * shard.numel():
            raise LayoutError(
                f"all_gather: whole has {whole.numel()} elements, which is not {self.world_size} ranks "
                f"times the shard's {shard.numel()}."
            )
        self.counts["all_gather"] += 1
        if self._data is None:
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
            return
        _all_gather(whole, shard, group=self._data)

    @_waiting
    def all_gather_together(self, wholes: Sequence[Tensor], shards: Sequence[Tensor]) -> None:
        """`all_gather` of several buffers, of any dtypes, as one collective: NCCL runs them in one kernel.

        gloo has no such call that works for mixed dtypes and sends them one after another.
        """
        if len(wholes) == 1 or self._data is None or self.blocking:
            for whole, shard in zip(wholes, shards, strict=True):
                self.all_gather(whole, shard)
            self.counts["all_gather"] -= len(wholes) - 1
            return
        self.counts["all_gather"] += 1
        self._data._start_coalescing(self.device)
        for whole, shard in zip(wholes, shards, strict=True):
            _all_gather(whole, shard, group=self._data, async_op=True)
        self._data._end_coalescing(self.device).wait()

    @_waiting
    def reduce_scatter(self, partial: Tensor, out: Tensor) -> None:
        """Average `partial` over the ranks, leaving this rank's slice in `out`.

        partial: (world_size * n,), this rank's own gradients; scratch afterwards.
        out:     (n,), same dtype; may be this rank's slice of `partial`.
        Source: ZeRO (arXiv 1910.02054), section 5. Raises LayoutError if the sizes do not fit.
        """
        if partial.numel() != self.world_size * out.numel():
            raise LayoutError(
                f"reduce_scatter: partial has {partial.numel()} elements, which is not {self.world_size} "
                f"ranks times the output's {out.numel()}."
            )
        self.counts["reduce_scatter"] += 1
        if self._data is None:
            if partial.data_ptr() != out.data_ptr():
                out.copy_(partial)
            return
        _reduce_scatter(out, partial, op=dist.ReduceOp.AVG, group=self._reduce)

    @_waiting
    def fence(self) -> None:
        """Hold the current stream until every rank's has come to its own call. Over the data group."""
        self.counts["fence"] += 1
        if self._data is not None:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self._data)

    def map_shared(self, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """(numel,) zeros in the memory of every rank's device, all mapped into this process, in rank order. Collective.

        Needs ranks of one machine whose devices reach each other; raises what torch raises where they do not.
        """
        assert self._data is not None
        return symmetric.map_shared(self._data, self.device, numel, dtype)

    @_waiting
    def all_reduce_gradient(self, gradient: Tensor) -> None:
        """Average a whole gradient over the ranks, in place: what reduce_scatter is for a plan that keeps it whole."""
        self.counts["all_reduce_gradient"] += 1
        if self._reduce is not None:
            dist.all_reduce(gradient, op=dist.ReduceOp.AVG, group=self._reduce)

    @_waiting
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> None:
        """Combine `tensor` over the ranks, in place, on every rank."""
        self.counts["all_reduce"] += 1
        if self._data is None:
            return
        dist.all_reduce(tensor, op=_OPS[op], group=self._data)

    @_waiting
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite `tensor`, which is contiguous, with rank `source`'s on every rank. As bytes: backends lack some dtypes."""
        self.counts["broadcast"] += 1
        if self._data is not None and tensor.numel():
            dist.broadcast(tensor.detach().view(-1).view(torch.uint8), src=source, group=self._data)

    # Facts, between host processes, over the control group.

    def _exchange(self) -> dist.ProcessGroup | None:
        """The control group, for an exchange among all ranks, which is counted: see `words.py`."""
        if self._control is not None and not self._is_aside:
            exchanged()
        return self._control

    @_waiting
    def barrier(self) -> None:
        """Return once every rank has called it."""
        if (control := self._exchange()) is not None:
            dist.all_reduce(torch.zeros(1), group=control)

    def assemble(self, call: str, where: str = "", *, say_after_s: float = 5.0) -> None:
        """Return once every rank is in `call`: for a verb that scripts write under `if is_main_process`. Collective.

        call:  its name, such as "optimizer.state_dict()". where: when it is collective, such as "under zero_stage 2".
        A rank that waits for longer than `say_after_s` logs that the call is collective and which ranks have not come. Raises
        RankError, which says the same, after the timeout of all collectives. About 1 ms. The ranks leave marks in the store in
        which they met: a collective would get mixed up with what the ranks that are elsewhere do there.
        """
        if self.world_size > 1:
            place = (_store(), self.rank, self.world_size)
            assembling.assemble(*place, call, where, self._timeout, say_after_s=say_after_s)

    @_waiting
    def gather_numbers(self, number: int) -> list[int]:
        """Every rank's whole number, in rank order. About 0.1 ms between processes of one machine."""
        self.counts["gather_numbers"] += 1
        if (control := self._exchange()) is None:
            return [number]
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        _all_gather(numbers, torch.tensor([number]), group=control)
        return [int(n) for n in numbers]

    @_waiting
    def any_of(self, flags: list[bool]) -> list[bool]:
        """Element by element, whether the flag is set on any rank. Every rank passes as many flags.

        A rank whose flags are all set knows the answer: it tells the others and does not wait for them until the next call.
        """
        self.counts["any_of"] += 1
        if not flags or (control := self._exchange()) is None:
            return flags
        if self._told is not None:
            self._told.wait()
            self._told = None
        votes = torch.tensor(flags, dtype=torch.uint8)
        sent = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=control, async_op=True)
        if all(flags):
            self._told = sent
            return flags
        sent.wait()
        return [bool(v) for v in votes.tolist()]

    @_waiting
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. The values are pickled."""
        if (control := self._exchange()) is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=control)
        return values

    @_waiting
    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Rank `source`'s `value`, on every rank."""
        if (control := self._exchange()) is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=control)
        return box[0]

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank met an error, so that none waits for a rank that has left.

        A rank raises its own error; the others raise RankError, which names the first rank that failed and repeats its
        words. When every rank met the same one, each raises its own.
        """
        raise_first(error, self.gather_objects(words_of(error)))

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives on this rank; if it raises on any rank, an error on every rank, as `agree` raises it. Collective.

        `action` is without communication of its own: a rank that left it early would not be there for the others. An interrupt
        of one rank is told to the others too.
        """
        result, error = attempt_or_interrupt(action)
        self.agree(error)
        return cast(T, result)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """As `together`, for a block of the caller's: its error, or interrupt, is every rank's at its end. Collective."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        self.agree(error)

    def compare(self, facts: Callable[[], Mapping[str, Any]], where: str) -> list[Difference]:
        """What differs between the ranks' facts, the same list on every rank; [] for nothing. Collective.

        facts: plain JSON values by name. If it raises on any rank, an error on every rank, as `agree` raises it.
        where: the call that all ranks make, for a RankError if one does not.
        """
        return compared(self, facts, where, self._timeout, counted=not self._is_aside)

    def require_same(self, call: str, arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError on every rank unless all ranks make `call` with these arguments, plain JSON values. Collective."""
        differing = self.compare(lambda: arguments, call)
        if differing:
            remedy = "Call it in the same way on every rank."
            raise ConfigError(disagreement(f"{call} is called in another way on {{ranks}}", differing, remedy))
