"""The ranks of a run and what they do together: the only file that calls torch.distributed.

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
import functools
import logging
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.environment import RankEnvironment, without_multicast
from ..errors import ConfigError, LayoutError, RankError
from .words import Words, exchanged

log = logging.getLogger("shardwise")

ReduceOp = Literal["sum", "mean", "max", "min"]
T = TypeVar("T")
P = ParamSpec("P")

# torch 2.13 renamed both and warns on the old names; torch 2.9 to 2.12 have only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# How often all ranks have come together in each call, see `Ranks.assemble`.
_assembled: Counter[str] = Counter()

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


# What gloo and the store say when another rank is not there.
_MISSING = re.compile(r"timed? ?out|connection|pair closure|broken pipe|socket", re.IGNORECASE)


def _waiting(collective: Callable[P, T]) -> Callable[P, T]:
    """A collective that says in a sentence, RankError, that another rank did not come; and at once from then on.

    Of NCCL's, which only enqueue, torch's watchdog tells.
    """

    @functools.wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        ranks = cast("Ranks", args[0])
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
                f"was interrupted, has ended, or does something else. ({' '.join(str(error).split())[:200]}) Nothing that needs "
                "all ranks works any more: end this one too, and resume from a checkpoint."
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
        self._is_aside = False
        self.lost: str | None = None
        self.words = Words(place.rank, _store if place.world_size > 1 else None, timeout)
        if self.world_size > 1:
            self._data, self._control = _groups(timeout)
            self._reduce = dist.group.WORLD

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
        """Take the process group down, if `join` made it."""
        if self._owns_group and dist.is_initialized():
            # A group that Python still holds keeps its threads, and one that asks for the interpreter while that ends aborts
            # the process: seen in 1 to 3 of 16 exits.
            self._data = self._reduce = self._control = self._told = None
            dist.destroy_process_group()
        self._owns_group = False

    @property
    def parted(self) -> bool:
        """Whether this process has left the run: nothing that needs the other ranks works any more."""
        return self.world_size > 1 and self._data is None

    def aside(self) -> Ranks:
        """The same ranks with a control group of their own, for facts that another thread exchanges. Collective.

        It moves no tensors of the device.
        """
        other = copy.copy(self)
        other.counts = Counter()
        other._owns_group = False
        other._is_aside = True
        other._data = other._reduce = other._told = None
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
        ops = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(tensor, op=ops[op], group=self._data)

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
        if self.world_size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        place = f"shardwise/{call}/{_assembled[call]}"
        store.set(f"{place}/{self.rank}", "here")
        missing, present = list(range(self.world_size)), []
        began, said = time.monotonic(), False
        rule = f"{call} is collective{where and ' ' + where}: call it on every rank, not only on the main process."
        while True:
            present += [rank for rank in missing if store.check([f"{place}/{rank}"])]
            missing = [rank for rank in missing if rank not in present]
            if not missing:
                break
            waited = time.monotonic() - began
            names = f"rank {', '.join(map(str, missing))}"
            if waited >= self._timeout.total_seconds():
                store.delete_key(f"{place}/{self.rank}")
                raise RankError(
                    f"{rule} Rank {self.rank} has waited {waited:.0f} s for {names}, which did not call it."
                )
            if waited >= say_after_s and not said:
                said = True
                if self.rank == min(present):
                    log.warning("%s Rank %d has waited %.0f s for %s.", rule, self.rank, waited, names)
            time.sleep(min(0.05, 0.001 + waited / 50))
        if _assembled[call]:
            # Every rank is in this call, so none looks for the marks of the one before.
            store.delete_key(f"shardwise/{call}/{_assembled[call] - 1}/{self.rank}")
        _assembled[call] += 1

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
        errors = self.gather_objects(None if error is None else _in_words(error))
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RankError(f"rank {rank} failed: {text}")

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives on this rank; if it raises on any rank, an error on every rank, as `agree` raises it. Collective.

        `action` is without communication of its own: a rank that left it early would not be there for the others. An interrupt
        of one rank is told to the others too.
        """
        result, error = attempt_or_interrupt(action)
        self.agree(error)
        return cast(T, result)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `action` gave, or what it raised."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def attempt_or_interrupt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """As `attempt`, for an action whose outcome the ranks agree on next: Ctrl-C or an exit inside is an outcome too."""
    try:
        return action(), None
    except BaseException as error:
        return None, error
