"""Rank processes for tests: started once a session, reused by every test, and honest about how they fail.

    from rig import World

    def add(ranks, x):                      # a module-level function; runs on every rank
        t = torch.full((2,), float(x + ranks.rank))
        ranks.all_reduce(t)
        return t

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_sums_agree(world, n):          # `world` is a fixture of tests/conftest.py
        results = world(n).run(add, 1)      # one result per rank, in rank order

A rank that raises gives its own exception here, with its traceback as a note. A rank that dies gives
`RankCrashedError` with the exit code or the signal. Ranks that never return give `RanksHungError` with the stack of
every rank. The pool that failed is thrown away and the next `world(n)` starts a fresh one.
"""

from .fresh import Outcome, fresh_ranks, torchrun
from .pool import RankCrashedError, RanksHungError, World, Worlds

__all__ = ["Outcome", "RankCrashedError", "RanksHungError", "World", "Worlds", "fresh_ranks", "torchrun"]
