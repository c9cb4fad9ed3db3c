"""The ranks of a run and what they do together. Beside it `group.py`, `control.py`, `doubling.py`, `joining.py`, `leaving.py`
and `symmetric.py` call torch.distributed.

    shards, copies   which ranks divide a model's buffers, and which hold the same part: values, see `group.py`; `divided`
                     gives the ranks in other groups
    all ranks        the processes of the run, whatever they hold: `rank` of `world_size`

Tensors move on the device (NCCL on CUDA, gloo on CPU), gradients over a communicator of their own. The control group is
always gloo and moves small facts between host processes: which error a rank met, an object, a barrier, which unit is needed
next. It never waits behind a gather, and agreement works while a GPU is busy.

With one rank no process group is made and every collective is a copy or nothing: the callers need no second path.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from ..config.agreement import Difference, disagreement
from ..errors import ConfigError
from . import assembling, leaving, watcher
from .activity import activity
from .agreeing import attempt_or_interrupt, compared, raise_first, words_of
from .control import Control, Vote
from .dividing import Division, ShardGroup, divide
from .doubling import control_over
from .group import Group, ReduceOp
from .joining import Joined, communicator, join_groups
from .nested import Nested
from .waiting import Attendance, waiting
from .words import Words, exchanged

T = TypeVar("T")


def _store() -> Any:
    """What the ranks found each other by."""
    return dist.distributed_c10d._get_default_store()


class Ranks:
    """This process, its device, and the collectives over all processes of the run.

    rank, world_size:             the processes of the run, over all machines; not how a buffer is divided.
    shards:                       the ranks that hold one copy of a model together: all of them, unless they are `divided`.
    copies:                       the ranks that hold the same shards as this one: itself alone, unless they are.
    owners, alike:                the same for masters, states and reduced gradients: these two, unless all ranks divide them.
    local_rank, local_world_size: on this machine.
    machines:                     by rank, the number of its machine; empty in a run of one rank.
    local_ranks:                  by rank, its number on its machine; empty in a run of one rank.
    device:                       cuda:local_rank or cpu.
    words:                        what a rank leaves for others without waiting for them.
    attendance:                   whether the other ranks are there.
    counts:                       how often each collective ran on this rank, by name; tests hold it against the design. What
                                  goes over copies, and over the shards of divided ranks, these count themselves.
    """

    def __init__(self, joined: Joined) -> None:
        self.rank = joined.rank
        self.world_size = joined.world_size
        self.local_rank = joined.local_rank
        self.local_world_size = joined.local_world_size
        self.device = joined.device
        self.machines = tuple(joined.machines)
        self.local_ranks = tuple(local_rank for local_rank, _, _ in joined.places)
        self.counts: Counter[str] = Counter()
        self._owns_group = joined.owned
        self._timeout = joined.timeout
        place = joined.rank, joined.world_size
        self._control = None if joined.control is None else control_over(joined.control, *place)
        self._is_aside = False
        self._divided: dict[tuple[Division, bool], Ranks] = {}
        self._asides: list[Ranks] = []
        self.attendance = Attendance(joined.rank)
        self._everyone = self._all_of(joined)
        self.shards = self._everyone
        self.copies = self.alike = self._alone = Group.alone(joined.device, self.attendance)
        self.owners: Group | Nested = self.shards
        self.words = Words(joined.rank, _store if self.world_size > 1 else None, joined.timeout, joined.world_size)
        if self.world_size > 1:
            leaving.remember(self, made_world=joined.owned)

    def _all_of(self, joined: Joined) -> Group:
        place = (joined.rank, joined.world_size, joined.device, self.attendance, self.counts)
        return Group(*place, joined.data, None if joined.data is None else dist.group.WORLD)

    @classmethod
    def join(
        cls,
        *,
        use_cpu: bool = False,
        timeout_s: float = 600.0,
        problem: Exception | None = None,
        wait_warning_s: float = 60.0,
    ) -> Ranks:
        """Join the run that the environment describes; a process that no launcher started is a run of one rank. Collective.

        Where the script has made torch's process group by itself, its ranks are the run.
        use_cpu:   take gloo and the CPU even where CUDA devices are visible.
        timeout_s: how long a collective may wait for the other ranks before it raises.
        problem:   why this rank cannot join: raised here, and told to the others, who raise RankError. With a group that the
                   script made nobody is told: that is for whoever compares next.
        wait_warning_s: how long a wait may take before a line says for whom; 0 for never.
        Raises ConfigError on every rank if ranks differ in what a process group needs, or a machine has fewer CUDA devices than
        ranks; RankError if a rank does not come in time.
        """
        joined = join_groups(use_cpu, timeout_s, problem)
        watcher.watch(wait_warning_s)
        return cls(joined)

    def leave(self) -> None:
        """Take the process groups down, if `join` made them. A script that ends without it does so at its end."""
        if self._owns_group and dist.is_initialized():
            watcher.leave_board()
            leaving.take_down(self.let_go()[0], world=True)
        self._owns_group = False

    @property
    def parted(self) -> bool:
        """Whether this process has left the run: nothing that needs the other ranks works any more."""
        return self._everyone.parted

    @property
    def lost(self) -> str | None:
        """What a collective said that another rank did not come to; None while all are there."""
        return self.attendance.lost

    def let_go(self) -> tuple[list[dist.ProcessGroup], Vote | None]:
        """Forget the process groups, those aside too; gives them, and a vote under way in the last. For `leaving` alone."""
        control, told = (None, None) if self._control is None else self._control.let_go()  # of those divided too
        groups = [group for other in (*self._asides, *self._divided.values()) for group in other.let_go()[0]]
        groups += [group for held in (self._everyone, self.shards, self.copies) for group in held.let_go()]
        groups += [control] if control is not None else []
        self._control = None
        return groups, told

    def aside(self) -> Ranks:
        """The same ranks with a control group of their own, for facts that another thread exchanges. Collective.

        It moves no tensors of the device.
        """
        other = copy.copy(self)
        other.counts = Counter()
        other._owns_group = False
        other._is_aside = True
        other._asides, other._divided = [], {}
        other.attendance = copy.copy(self.attendance)
        other.attendance.before = None
        other.attendance.beside = True
        other._everyone, other.shards, other.copies = (
            group.aside(other.attendance, other.counts) for group in (self._everyone, self.shards, self.copies)
        )
        other.owners, other.alike = other.shards, other.copies
        self._asides.append(other)
        if self._control is not None:
            control = dist.new_group(backend="gloo", timeout=self._timeout)
            other._control = control_over(control, self.rank, self.world_size)
        return other

    def division(self, shard_group: ShardGroup) -> Division:
        """How `shard_group` divides the ranks: the same on every rank, without a message. Raises ConfigError on every rank."""
        return divide(shard_group, self.world_size, self.machines)

    def divided(self, shard_group: ShardGroup, *, all_own: bool = False) -> Ranks:
        """The same ranks, in groups that hold a copy of a model each. Collective where these groups do not exist yet.

        all_own: masters, states and reduced gradients are divided over all ranks, and weights alone over a group.
        Everything else of the two is one: messages, counts, attendance. Gives these ranks themselves where they are one group.
        """
        division = self.division(shard_group)
        if len(division.groups) == 1:
            return self
        if (division, all_own) not in self._divided:
            other = copy.copy(self)
            other._owns_group = False
            other._asides, other._divided = [], {}
            mine, alike, timeout = division.shards(self.rank), division.copies(self.rank), self._timeout
            data, reductions = communicator(mine, "shards", timeout), communicator(mine, "gradients of shards", timeout)
            over = communicator(alike, "copies", timeout)
            other.shards, other.copies = self._among(mine, data, reductions), self._among(alike, over, over)
            other.owners, other.alike = other.shards, other.copies
            if all_own:
                other.owners, other.alike = Nested(other.shards, other.copies, self._everyone, division), self._alone
            leaving.remember(other, made_world=False)
            self._divided[division, all_own] = other
        return self._divided[division, all_own]

    def _among(
        self, members: tuple[int, ...], data: dist.ProcessGroup | None, reductions: dist.ProcessGroup | None
    ) -> Group:
        place = members.index(self.rank), len(members)
        return Group(*place, self.device, self.attendance, Counter(), data, reductions, members)

    @property
    def timeout_s(self) -> float:
        """How long a collective waits for the other ranks before it raises."""
        return self._timeout.total_seconds()

    @property
    def blocking(self) -> bool:
        """Whether a collective holds the host until every rank has come: gloo does, NCCL holds only its stream."""
        return self._everyone.blocking

    # Tensors, on the device, over all processes of the run; what shards and copies do, their groups have.

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """`Group.all_gather` over all ranks."""
        self._everyone.all_gather(whole, part)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> None:
        """`Group.all_reduce` over all ranks."""
        self._everyone.all_reduce(tensor, op)

    def all_reduce_gradient(self, gradient: Tensor) -> None:
        """`Group.all_reduce_gradient` over all ranks: of a gradient that none of them divide."""
        self._everyone.all_reduce_gradient(gradient)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """`Group.broadcast` over all ranks."""
        self._everyone.broadcast(tensor, source)

    # Facts, between host processes, over the control group.

    def _exchange(self) -> Control | None:
        """The control group, for an exchange among all ranks, which is counted: see `words.py`."""
        if self._control is not None and not self._is_aside:
            exchanged()
        return self._control

    @waiting
    def barrier(self) -> None:
        """Return once every rank has called it."""
        if (control := self._exchange()) is not None:
            control.barrier()

    def assemble(self, call: str, where: str = "", *, say_after_s: float = 5.0) -> None:
        """Return once every rank is in `call`: for a verb that scripts write under `if is_main_process`. Collective.

        call:  its name, such as "optimizer.state_dict()". where: when it is collective, such as "under zero_stage 2".
        A rank that waits for longer than `say_after_s` logs that the call is collective and which ranks have not come. Raises
        RankError, which says the same, after the timeout of all collectives. About 1 ms. The ranks leave marks in the store in
        which they met: a collective would get mixed up with what the ranks that are elsewhere do there.
        """
        if self.world_size > 1:
            place = (_store(), self.rank, self.world_size)
            with activity.waiting(call):
                assembling.assemble(*place, call, where, self._timeout, say_after_s=say_after_s)

    @waiting
    def gather_numbers(self, number: int) -> list[int]:
        """Every rank's whole number, in rank order. About 0.1 ms between processes of one machine."""
        self.counts["gather_numbers"] += 1
        control = self._exchange()
        return [number] if control is None else control.gather_numbers(number)

    @waiting
    def any_of(self, flags: list[bool]) -> list[bool]:
        """Element by element, whether the flag is set on any rank. Every rank passes as many flags.

        A rank whose flags are all set knows the answer: it tells the others and does not wait for them until the next call.
        """
        self.counts["any_of"] += 1
        if not flags or (control := self._exchange()) is None:
            return flags
        return control.any_of(flags)

    @waiting
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. The values are pickled."""
        control = self._exchange()
        return [value] if control is None else control.gather_objects(value)

    @waiting
    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Rank `source`'s `value`, on every rank."""
        control = self._exchange()
        return value if control is None else control.broadcast_object(value, source)

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
        with nullcontext() if self._is_aside else activity.call(where):
            return compared(self, facts, where, self._timeout, counted=not self._is_aside)

    def require_same(self, call: str, arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError on every rank unless all ranks make `call` with these arguments, plain JSON values. Collective."""
        differing = self.compare(lambda: arguments, call)
        if differing:
            remedy = "Call it in the same way on every rank."
            raise ConfigError(disagreement(f"{call} is called in another way on {{ranks}}", differing, remedy))


def collectives_of_scripts() -> int:
    """How many there were so far in the default group, which the engine leaves to scripts."""
    world: Any = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return 0 if world is None else int(world._get_sequence_number_for_group())
