"""Reading and writing whole weights of a prepared model: `gathered`, and what becomes of what a script writes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch.nn import Parameter

from ..errors import WriteError
from .asking import asking
from .engine import Engine
from .hooks import Hooks
from .schedule import Schedule
from .unit import Unit
from .writing import follow, has_strayed, write_back


class Reading:
    """Of one model.

    units:  all of its, as they are at the time. writes: how often a script has written into its weights.
    takes_first_ranks: inside of `gathered(modify=True)` on several ranks.
    """

    def __init__(self, units: list[Unit], engine: Engine, schedule: Schedule, hooks: Hooks) -> None:
        self.writes = 0
        self.takes_first_ranks = False
        self._units = units
        self._engine = engine
        self._ranks = engine.ranks
        self._schedule = schedule
        self._hooks = hooks

    @contextmanager
    def gathered(self, parameters: Sequence[Parameter] | None, *, modify: bool) -> Iterator[None]:
        """See `ShardedModel.gathered`."""
        self._hooks.finish_interrupted()
        units = self._units
        if parameters is not None:
            wanted = {id(p) for p in parameters}
            units = [u for u in self._units if any(id(m.parameter) in wanted for b in u.buffers for m in b.members)]
        if self._hooks.in_pass:
            with asking(self._hooks, units, modify=modify):
                yield
            return
        self._ranks.require_same(
            "gathered", {"modify": modify, "what is gathered": ", ".join(unit.name for unit in units)}
        )
        with self._schedule.hold(units):
            try:
                # What is computed of the weights here may have its backward when they are released again.
                self.takes_first_ranks = modify and self._ranks.world_size > 1
                with self._ranks.agreeing() if modify else nullcontext(), self._hooks.saved.following():
                    yield
                if modify:
                    self.writes += 1
                    self._engine.meet()
                    write_back(units, self._ranks, self._engine.fetched, self._engine.put_to_rest)
                    self._engine.meet()
                else:
                    self._keep_written(units)
            finally:
                self.takes_first_ranks = False
                for unit in units:
                    unit.written()  # what nobody has kept goes with the block

    def _keep_written(self, units: Sequence[Unit]) -> None:
        """What every rank has written into gathered weights goes into the shards. Collective.

        Raises WriteError on every rank if some have written and others not, or not the same weights.
        """
        names = [name for unit in units for name in unit.written()]
        said = self._ranks.gather_numbers(zlib.crc32("\n".join(names).encode()) if names else 0)
        if len(set(said)) > 1:
            who = ", ".join(str(rank) for rank, number in enumerate(said) if number)
            raise WriteError(
                f"weights were written inside `gathered` on rank {who}, and not the same ones on all ranks: the ranks would "
                f"differ. On this rank: {', '.join(names[:3]) or 'none'}. Write on every rank, or in gathered(model, "
                "modify=True), which takes rank 0's."
            )
        if any(said):
            self.writes += 1
            self._engine.meet()
            for unit in units:
                unit.put_own()
            self._engine.meet()

    def follow(self) -> None:
        """Let masters follow what a script has written into trained weights. Raises WriteError for what cannot count."""
        self._engine.doubts.settle()
        for unit in self._units:
            if has_strayed(unit) and unit.trained is not None:
                self._engine.lanes.join()  # what was written inside of a pass goes into the shards on a lane
                follow(unit, self._engine.look_at, self._engine.put_to_rest)
