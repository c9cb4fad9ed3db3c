"""The ranks of a run and what they do together: with `leaving.py` the only file that calls torch.distributed.

There are three groups. The data group moves tensors on the device (NCCL on CUDA, gloo on CPU). The reduce group does the
same for gradients alone: a communicator needs its operations in the same order on every rank, and ranks that take
different branches reach gathers and reductions in different interleavings, though each kind in the same order. The control
group is always gloo and moves small facts between host processes: which error a rank met, an object, a barrier, which
unit is needed next. It never waits behind a gather, and agreement works while a GPU is busy.

With one rank no process group is made and every collective is a copy or nothing: the callers need no second path.
"""

from __future__ import annotations

import copy
import datetime
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.environment import RankEnvironment, without_multicast
from ..errors import ConfigError, LayoutError, RankError
from . import leaving

ReduceOp = Literal["sum", "mean", "max", "min"]
T = TypeVar("T")

# torch 2.13 renamed both and warns on the old names; torch 2.9 to 2.12 have only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# By timeout: the WORLD that they belong to, the data group and the control group. Weakly, so that they end with WORLD.
_made: dict[datetime.timedelta, tuple[weakref.ref[Any], ...]] = {}


def _groups(timeout: datetime.timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The data and the control group of this process. Collective where they do not exist yet.

    A group of gloo has three threads, one of which wakes up a hundred times a second, and torch keeps it until WORLD ends. A
    process that makes many Accelerators would be busy with nothing else: with 450 groups a test suite took twice its time.
    """
    world = dist.group.WORLD
    held = [ref() for ref in _made.get(timeout, ())]
    if held and held[0] is world and held[1] is not None and held[2] is not None:
        return held[1], held[2]
    data, control = dist.new_group(timeout=timeout), dist.new_group(backend="gloo", timeout=timeout)
    _made[timeout] = tuple(weakref.ref(group) for group in (world, data, control))
    return data, control


class Ranks:
    """This process, its device, and the collectives over all processes of the run.

    rank, world_size:             over all machines.
    local_rank, local_world_size: on this machine.
    device:                       cuda:local_rank or cpu.
    counts:                       how often each collective ran on this rank, by name; tests hold it against the design.
    """

    def __init__(
        self, place: RankEnvironment, device: torch.device, owns_group: bool, timeout: datetime.timedelta
    ) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self.local_rank = place.local_rank
        self.local_world_size = place.local_world_size
        self.device = device
        self.counts: Counter[str] = Counter()
        self._owns_group = owns_group
        self._timeout = timeout
        self._data: dist.ProcessGroup | None = None
        self._reduce: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None
        self._told: dist.Work | None = None  # a vote whose outcome this rank knew
        self._asides: list[Ranks] = []
        if self.world_size > 1:
            self._data, self._control = _groups(timeout)
            self._reduce = dist.group.WORLD
            leaving.remember(self, made_world=owns_group)

    @classmethod
    def join(cls, *, use_cpu: bool = False, timeout_s: float = 600.0) -> Ranks:
        """Join the run that the environment describes; a process that no launcher started is a run of one rank.

        use_cpu:   take gloo and the CPU even where CUDA devices are visible.
        timeout_s: how long a collective may wait for the other ranks before it raises.
        Raises ConfigError if this machine has fewer CUDA devices than ranks.
        """
        place = RankEnvironment.read()
        cuda = torch.cuda.is_available() and not use_cpu
        if cuda and place.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {place.rank} wants cuda:{place.local_rank}, but this machine shows "
                f"{torch.cuda.device_count()} CUDA device(s). Start at most one process per device, or "
                "add --use_cpu."
            )
        device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        owns = False
        timeout = datetime.timedelta(seconds=timeout_s)
        if place.world_size > 1 and not dist.is_initialized():
            if cuda:
                dist.init_process_group("nccl", timeout=timeout, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=timeout)
            owns = True
        return cls(place, device, owns, timeout)

    def leave(self) -> None:
        """Take the process groups down, if `join` made them. A script that ends without it does so at its end."""
        if self._owns_group and dist.is_initialized():
            leaving.take_down(self.let_go()[0], world=True)
        self._owns_group = False

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
        other._data = other._reduce = other._told = None
        other._asides = []
        self._asides.append(other)
        if self._control is not None:
            other._control = dist.new_group(backend="gloo", timeout=self._timeout)
        return other

    @property
    def blocking(self) -> bool:
        """Whether a collective holds the host until every rank has come: gloo does, NCCL holds only its stream."""
        return self.world_size > 1 and self.device.type == "cpu"

    # Tensors, on the device, over the data group. Each runs on the current stream; the caller orders streams.

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

    def fence(self) -> None:
        """Hold the current stream until every rank's has come to its own call. Over the data group."""
        self.counts["fence"] += 1
        if self._data is not None:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self._data)

    def map_shared(self, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """(numel,) zeros in the memory of every rank's device, all mapped into this process, in rank order. Collective.

        Needs ranks of one machine whose devices reach each other; raises what torch raises where they do not.
        Source: torch's symmetric memory.
        """
        import torch.distributed._symmetric_memory as symmetric

        assert self._data is not None
        without_multicast()
        if pool := getattr(symmetric, "get_mem_pool", None):
            # Through torch's allocator, so that its statistics count these bytes too.
            with torch.cuda.use_mem_pool(pool(self.device)):
                own = torch.zeros(numel, dtype=dtype, device=self.device)
        else:
            own = symmetric.empty(numel, dtype=dtype, device=self.device).zero_()
        handle = symmetric.rendezvous(own, self._data)
        return [own if r == self.rank else handle.get_buffer(r, (numel,), dtype) for r in range(self.world_size)]

    def all_reduce_gradient(self, gradient: Tensor) -> None:
        """Average a whole gradient over the ranks, in place: what reduce_scatter is for a plan that keeps it whole."""
        self.counts["all_reduce_gradient"] += 1
        if self._reduce is not None:
            dist.all_reduce(gradient, op=dist.ReduceOp.AVG, group=self._reduce)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> None:
        """Combine `tensor` over the ranks, in place, on every rank."""
        self.counts["all_reduce"] += 1
        if self._data is None:
            return
        ops = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(tensor, op=ops[op], group=self._data)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with rank `source`'s."""
        self.counts["broadcast"] += 1
        if self._data is not None:
            dist.broadcast(tensor, src=source, group=self._data)

    # Facts, between host processes, over the control group.

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self._control is not None:
            dist.all_reduce(torch.zeros(1), group=self._control)

    def gather_numbers(self, number: int) -> list[int]:
        """Every rank's whole number, in rank order. About 0.1 ms between processes of one machine."""
        self.counts["gather_numbers"] += 1
        if self._control is None:
            return [number]
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        _all_gather(numbers, torch.tensor([number]), group=self._control)
        return [int(n) for n in numbers]

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Element by element, whether the flag is set on any rank. Every rank passes as many flags.

        A rank whose flags are all set knows the answer: it tells the others and does not wait for them until the next call.
        """
        self.counts["any_of"] += 1
        if self._control is None or not flags:
            return flags
        if self._told is not None:
            self._told.wait()
            self._told = None
        votes = torch.tensor(flags, dtype=torch.uint8)
        sent = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        if all(flags):
            self._told = sent
            return flags
        sent.wait()
        return [bool(v) for v in votes.tolist()]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. The values are pickled."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Rank `source`'s `value`, on every rank."""
        if self._control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self._control)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank met an error, so that none waits for a rank that has left.

        A rank raises its own error; the others raise RankError, which names the first rank that failed and repeats its
        words. When every rank met the same one, each raises its own.
        """
        errors = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RankError(f"rank {rank} failed: {text}")

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives on this rank; if it raises on any rank, an error on every rank, as `agree` raises it. Collective.

        `action` is without communication of its own: a rank that left it early would not be there for the others.
        """
        result, error = attempt(action)
        self.agree(error)
        return cast(T, result)


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `action` gave, or what it raised."""
    try:
        return action(), None
    except Exception as error:
        return None, error
