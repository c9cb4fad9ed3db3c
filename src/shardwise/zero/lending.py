"""Weights for a script that reads them between passes, as a script for DDP does: the other ranks gather with it.

A rank cannot gather alone. So while a window is open every rank votes before it does anything else with the others: which unit
it reads, that it evaluates, or that it goes on. Ranks that go on gather what the others read, and wait until all go on:

    rank 0   wait_for_everyone . reads w1 . reads w2 . model(x) without gradients . a step
    rank 1   wait_for_everyone . a step
    votes                        w1, on     w2, on     evaluates, on: w3, w4, ...   on, on: the window is closed

`wait_for_everyone` opens one; so does a read that every rank comes to, as an EMA of `model.parameters()` after a step: those
who read meet by marks in the store (nobody else pays), and a read that not all come to within `LIMIT_S` is an error. What a
rank has read stays with it until the window closes; the others free it at once.

A forward without gradients on some ranks alone has all of the model there first, and asks nobody then. What is written must be
the same on all ranks, or be undone before the window closes (an average that is swapped in and out): else it is a WriteError.
"""

from __future__ import annotations

import atexit
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from enum import IntEnum

import torch
from torch import Tensor

from ..errors import ReleasedParameterError, WriteError
from ..ranks.ranks import Ranks
from .schedule import Lends, Mode, Schedule
from .unit import Unit, Weights

log = logging.getLogger("shardwise")

# How long a read waits for the other ranks to come to one, and after what time it says so.
LIMIT_S, SAY_AFTER_S = 60.0, 5.0


# How often all ranks have met in a read, whichever run it was in: their marks stay in the store.
_meetings: Counter[str] = Counter()


class Vote(IntEnum):
    """What a rank does next. With it goes a number: a checksum of the names that it has written, or which unit it reads."""

    GOES_ON = 0
    EVALUATES = 1
    READS = 2


class Lending(Lends):
    """Of all models of a run.

    schedules: gives those of the prepared models, in the same order on every rank.
    """

    def __init__(self, ranks: Ranks, schedules: Callable[[], Sequence[Schedule]]) -> None:
        self._ranks = ranks
        self._schedules = schedules
        self._open = False
        self._lent: dict[Unit, Schedule] = {}  # to this rank, in the open window
        self._written: list[tuple[Unit, str]] = []  # what it has written of them
        self._alone: list[Schedule] = []  # of models that are whole here, for forwards that ask nobody
        self._held = ExitStack()
        self._told = self._leaves_in_order = False

    # Windows.

    def open(self) -> None:
        """Every rank is here: from now on each votes before it does anything else with the others."""
        if any(unit.leaves for schedule in self._schedules() for unit in schedule.units):
            self._open = True
            self._ranks.attendance.before = self.close
            if not self._leaves_in_order:
                self._leaves_in_order = True
                atexit.register(self._leave)

    def _leave(self) -> None:
        """The script has ended without a word, on this rank: another one may still read."""
        if self._open and getattr(sys, "last_value", None) is None and not self._ranks.parted:
            with suppress(Exception):
                self.close()

    def close(self) -> None:
        """Go on with the others, once all do: gather until then what they read. Does nothing if no window is open.

        Raises WriteError, on every rank, for weights that some ranks have written and others not.
        """
        if self._open:
            checksum = self._written_here()
            while self._open:
                self._vote(Vote.GOES_ON, checksum)

    def forget(self) -> None:
        """The ranks part: nobody votes any more, and what is lent stays."""
        self._open = False
        self._ranks.attendance.before = None

    def _written_here(self) -> int:
        """A checksum of the names of what was written in this window on this rank; 0 for nothing."""
        for unit in self._lent:
            self._written += [(unit, name) for name in unit.written()]
        names = sorted({name for _, name in self._written})
        return zlib.crc32("\n".join(names).encode()) if names else 0

    def _vote(self, vote: Vote, number: int) -> set[int]:
        """One round; gathers what is read, and closes the window where all do the same and nobody reads. Gives all votes."""
        self._ranks.attendance.before = None
        said = [divmod(word, len(Vote)) for word in self._ranks.gather_numbers(number * len(Vote) + vote)]
        schedules = self._schedules()
        places = [(schedule, i) for schedule in schedules for i in range(len(schedule.units))]
        for place in sorted({number for number, voted in said if voted == Vote.READS}):
            schedule, index = places[place]
            unit = schedule.units[index]
            schedule.lanes.gather.wait(schedule.lanes.mark_compute())  # what the optimizer wrote must be there
            if vote == Vote.READS and place == number:
                unit.gather()
                unit.arrive()
                self._lent[unit] = schedule
            else:
                with schedule.gathers.exactly():
                    schedule.gathers.gather_for_others([index])
        votes = {voted for _, voted in said}
        if Vote.READS in votes or len(votes) > 1:
            self._ranks.attendance.before = self.close
        else:
            self._open = False
            self._end([checksum for checksum, _ in said])
        return votes

    def _end(self, checksums: Sequence[int]) -> None:
        """The window is closed: settle what was written in it, and free what was lent."""
        lent, self._lent = self._lent, {}
        written, self._written = {unit for unit, _ in self._written}, []
        self._held.close()
        self._alone.clear()
        problem = None
        for unit in written:
            unit.strayed = True
        if len(set(checksums)) > 1:
            problem = self._not_undone(lent)
        elif written:
            self._keep(written)
        for unit, schedule in lent.items():
            unit.written()
            schedule.gathers.release(unit)
        if problem is not None:
            raise WriteError(problem)

    def _keep(self, written: set[Unit]) -> None:
        """Every rank has written the same into these: it goes into the shards. Collective."""
        units = [unit for schedule in self._schedules() for unit in schedule.units if unit in written]
        engines = {id(unit.engine): unit.engine for unit in units}.values()
        for engine in engines:
            engine.meet()
        for unit in units:
            unit.put_own()
        for engine in engines:
            engine.meet()

    @torch.no_grad()
    def _not_undone(self, lent: dict[Unit, Schedule]) -> str | None:
        """Some ranks have written what was lent to them: what is wrong, unless it is what the shards have. Collective."""
        schedules = self._schedules()
        units = [(schedule, unit) for schedule in schedules for unit in schedule.units if unit.leaves]
        mine = [i for i, (_, unit) in enumerate(units) if unit in lent]
        differing: list[str] = []
        for i in sorted({i for row in self._ranks.gather_objects(mine) for i in row}):
            schedule, unit = units[i]
            if unit not in lent:
                with schedule.gathers.exactly():
                    schedule.gathers.gather_for_others([schedule.index[id(unit)]])
                continue
            found = [part.whole.clone() for part in unit.parts]
            unit.gather()
            unit.arrive()
            if not all(_same(one, part.whole) for one, part in zip(found, unit.parts, strict=True)):
                differing.append(unit.name)
        rows = self._ranks.gather_objects(differing)
        if not any(rows):
            return None
        who = ", ".join(str(rank) for rank, row in enumerate(rows) if row)
        return (
            f"weights of {next(row[0] for row in rows if row) or 'the model'} were written between passes on rank {who}, and "
            "not on all ranks: what was written is lost. Write on every rank, or in `with shardwise.gathered(model, "
            "modify=True):`, which takes rank 0's; what is swapped in for an evaluation has to be swapped out before the "
            "ranks go on."
        )

    # What a script does in one.

    def lend(self, schedule: Schedule, unit: Unit, name: str) -> bool:
        """A script reads `name`, of `unit`, between passes. Whether it may: it is gathered, here until the window closes.

        Raises ReleasedParameterError if other ranks do something else.
        """
        schedules = self._schedules()
        places = [known for owner in schedules for known in owner.units]
        # Where ranks generate, each runs forwards of its own.
        if unit not in places or self._ranks.parted or not all(map(self._is_plain, schedules)):
            return False
        if not self._open:
            self._meet(name)
            self.open()
        # What a forward has left here for its backward may be rounded.
        while unit.state is Weights.RELEASED or unit.rounded:
            self._vote(Vote.READS, places.index(unit))
        return True

    def _is_plain(self, schedule: Schedule) -> bool:
        return schedule.mode is Mode.PLAIN or schedule in self._alone

    def evaluates(self, schedule: Schedule) -> None:
        """A forward without gradients begins. Where other ranks do something else, the whole model is gathered for it."""
        if not self._open:
            return
        checksum = self._written_here()
        while Vote.READS in (votes := self._vote(Vote.EVALUATES, checksum)):  # who reads may evaluate next
            pass
        if len(votes) == 1:  # all do, and the window is closed
            return
        for unit in schedule.units:
            if unit.leaves:
                self.lend(schedule, unit, unit.name)
        self._alone.append(schedule)
        self._held.enter_context(schedule.in_mode(Mode.HELD))

    def _meet(self, name: str) -> None:
        """Return once every rank reads; told once. Raises ReleasedParameterError if one does not come to a read."""
        ranks = self._ranks
        _meetings["reads"] += 1
        if ranks.world_size > 1 and not ranks.words.meet(f"reads/{_meetings['reads']}", LIMIT_S, SAY_AFTER_S):
            _meetings["reads"] -= 1  # nobody has met
            raise ReleasedParameterError(
                f"parameter {name!r} was read while it is sharded, and not on every rank within {LIMIT_S:.0f} s: this rank "
                "holds only its shard, and the others do something else. Read it on every rank, best in "
                "`with shardwise.gathered(model):`; or on one rank alone right behind accelerator.wait_for_everyone(), where "
                "the others wait. accelerator.save_model and model.save_pretrained save weights."
            )
        if not self._told and ranks.rank == 0:
            log.warning(
                "%r is read between passes while it is sharded: what is read is gathered on every rank and stays until the "
                "next pass or step. Gathered in one go, or by parts, it is faster and smaller: "
                "`with shardwise.gathered(...):`. An average of the weights needs no gather: accelerator.ema(model, decay).",
                name,
            )
        self._told = True


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same bits."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
