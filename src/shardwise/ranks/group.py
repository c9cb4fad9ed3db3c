"""A group of ranks as a value, and the collectives of tensors over it.

Who takes part is the group's, so what is done with a tensor says which of three it means:

    rank          0  1  2  3      four ranks, two of which hold one copy of a model together
    shards       (0  1)(2  3)     a buffer is divided by them: gathered, and reduced
    copies       (0  2)(1  3)     they hold the same shards: a reduced gradient is averaged over them
    all of them  (0  1  2  3)     values of rank 0, what the ranks say of a step, whole gradients, a user's own tensors

Unless `shard_group` says otherwise (`dividing.py`) all ranks hold one copy together: `shards` are all of them, `copies` is each
rank alone. Masters, states and reduced gradients are divided by the `owners`: the shards, or all ranks (`nested.py`). A group
of one rank needs no process group; each of its collectives is a copy or nothing, and the callers need no second path.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LayoutError
from . import symmetric
from .waiting import Attendance, waiting

ReduceOp = Literal["sum", "mean", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# torch 2.13 renamed both and warns on the old names; torch 2.9 to 2.12 have only the old ones.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """Some ranks of the run, this one among them. Each collective runs on the current stream; the caller orders streams.

    rank, size: this rank's place in the group, and how many they are.
    members:    the ranks of the run that they are, in the order of the group.
    device:     this rank's.
    attendance: whether the ranks of the run are there: what one group finds, the others say too.
    counts:     how often each collective ran, by name.
    data:       the communicator that moves tensors; None in a group of one.
    reductions: the one for gradients alone: a communicator needs its operations in the same order on every rank, and ranks that
                take different branches reach gathers and reductions in different interleavings, each kind in the same order.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        attendance: Attendance,
        counts: Counter[str],
        data: dist.ProcessGroup | None = None,
        reductions: dist.ProcessGroup | None = None,
        members: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.attendance = attendance
        self.counts = counts
        self.members = tuple(range(size) if members is None else members)
        self._data = data
        self._reductions = reductions

    @classmethod
    def alone(cls, device: torch.device, attendance: Attendance) -> Group:
        """This rank by itself. What it counts is its own: nothing of it is sent."""
        return cls(0, 1, device, attendance, Counter(), members=[attendance.rank])

    def aside(self, attendance: Attendance, counts: Counter[str]) -> Group:
        """The same ranks, for a thread that moves no tensors."""
        return Group(self.rank, self.size, self.device, attendance, counts, members=self.members)

    @property
    def blocking(self) -> bool:
        """Whether a collective holds the host until every rank has come: gloo does, NCCL holds only its stream."""
        return self.size > 1 and self.device.type == "cpu"

    @property
    def parted(self) -> bool:
        """Whether it has let go of its communicators: nothing that needs the other ranks works any more."""
        return self.size > 1 and self._data is None

    def let_go(self) -> list[dist.ProcessGroup]:
        """Forget the communicators; gives them. For `Ranks.let_go` alone."""
        held = [group for group in (self._data, self._reductions) if group is not None]
        self._data = self._reductions = None
        return held

    @waiting
    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """Concatenate every rank's `shard` into `whole`, in rank order.

        whole: (size * n,); shard: (n,), same dtype; may be this rank's slice of `whole`.
        Raises LayoutError if the sizes do not fit.
        """
        if whole.numel() != self.size * shard.numel():
            raise LayoutError(
                f"all_gather: whole has {whole.numel()} elements, which is not {self.size} ranks "
                f"times the shard's {shard.numel()}."
            )
        self.counts["all_gather"] += 1
        if self._data is None:
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
            return
        all_gather_flat(whole, shard, group=self._data)

    @waiting
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
            all_gather_flat(whole, shard, group=self._data, async_op=True)
        self._data._end_coalescing(self.device).wait()

    @waiting
    def reduce_scatter(self, partial: Tensor, out: Tensor) -> None:
        """Average `partial` over the ranks, leaving this rank's slice in `out`.

        partial: (size * n,), this rank's own gradients; scratch afterwards.
        out:     (n,), same dtype; may be this rank's slice of `partial`.
        Source: ZeRO (arXiv 1910.02054), section 5. Raises LayoutError if the sizes do not fit.
        """
        if partial.numel() != self.size * out.numel():
            raise LayoutError(
                f"reduce_scatter: partial has {partial.numel()} elements, which is not {self.size} "
                f"ranks times the output's {out.numel()}."
            )
        self.counts["reduce_scatter"] += 1
        if self._data is None:
            if partial.data_ptr() != out.data_ptr():
                out.copy_(partial)
            return
        _reduce_scatter(out, partial, op=dist.ReduceOp.AVG, group=self._reductions)

    @waiting
    def all_reduce_gradient(self, gradient: Tensor) -> None:
        """Average a gradient that every rank of the group holds as long, in place: a whole one, or what copies hold alike."""
        self.counts["all_reduce_gradient"] += 1
        if self._reductions is not None:
            dist.all_reduce(gradient, op=dist.ReduceOp.AVG, group=self._reductions)

    @waiting
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> None:
        """Combine `tensor` over the ranks, in place, on every rank. The largest and the smallest of what has a NaN is NaN."""
        self.counts["all_reduce"] += 1
        if self._data is None:
            return
        if op not in ("max", "min") or not tensor.is_floating_point():
            dist.all_reduce(tensor, op=_OPS[op], group=self._data)
            return
        # Backends compare, and no comparison with NaN is true: whether a rank's is kept depends on the order. It goes beside.
        is_nan = tensor.isnan()
        both = torch.stack([tensor.masked_fill(is_nan, 0), is_nan.to(tensor.dtype) * (1 if op == "max" else -1)])
        dist.all_reduce(both, op=_OPS[op], group=self._data)
        tensor.copy_(both[0].masked_fill(both[1] != 0, math.nan))

    @waiting
    def all_to_all(self, sent: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Give every rank of the group its own tensor, in their order; gives what each of them has sent here.

        sent: flat tensors of one dtype on the device, of any sizes. sizes: elements of what comes, by rank.
        """
        self.counts["all_to_all"] += 1
        if self._data is None:
            return list(sent)
        given = torch.cat(list(sent))
        got = torch.empty(sum(sizes), dtype=given.dtype, device=given.device)
        dist.all_to_all_single(got, given, list(sizes), [one.numel() for one in sent], group=self._data)
        return list(torch.split(got, list(sizes)))

    @waiting
    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite `tensor`, which is contiguous, with rank `source`'s on every rank. As bytes: backends lack some dtypes."""
        self.counts["broadcast"] += 1
        if self._data is not None and tensor.numel():
            sent = tensor.detach().view(-1).view(torch.uint8)
            dist.broadcast(sent, group=self._data, group_src=source)

    @waiting
    def fence(self) -> None:
        """Hold the current stream until every rank's has come to its own call."""
        self.counts["fence"] += 1
        if self._data is not None:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self._data)

    def map_shared(self, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """(numel,) zeros in the memory of every rank's device, all mapped into this process, in rank order. Collective.

        Needs ranks of one machine whose devices reach each other; raises what torch raises where they do not. In a group of one
        they are plain zeros.
        """
        if self._data is None:
            return [torch.zeros(numel, dtype=dtype, device=self.device)]
        return symmetric.map_shared(self._data, self.device, numel, dtype)
