"""Where the loaders of a run are, as a checkpoint keeps it, and which loader of a later start takes which position up.

A loader has no name. It is known by its data set (class and number of samples), by how its order is made, and by its place
among the others, which scripts keep: a start with other flags prepares some more or some fewer, seldom in another order.

    saved      train 800, shuffled    validation 100    test 100 (--do-test)
                      |                     |                |
    prepared   train 800, shuffled    validation 100         -           said in a warning: nothing was trained with it

Of a loader that is gone, its position matters if a backward came while it was read: the run would go on with other samples
than it would have, and `match` refuses. A checkpoint from before this was kept has no such facts: there the position of a
loader matters that was shuffled or stood in the middle of an epoch, and loaders are compared by their batch sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..ranks.ranks import Ranks
from .loader import PreparedLoader
from .workers import own_dataset

logger = logging.getLogger("shardwise")

Position = Mapping[str, Any]


def position(loader: PreparedLoader) -> dict[str, Any]:
    """Everything that `go_to` needs, and what the loader is known by."""
    return {**loader.state_dict(), "samples_at_a_time": loader.total_batch_size, "data": _facts(loader)}


def go_to(loader: PreparedLoader, saved: Position, saved_world: int, ranks: Ranks) -> None:
    """Put a loader where it was. With another number of ranks its batches are other ones, of the same samples."""
    then, now = saved["samples_at_a_time"] or saved_world, loader.total_batch_size or ranks.world_size
    batches, left = divmod(saved["batches"] * then, now)
    if left and ranks.rank == 0:
        logger.warning(
            "The run was saved after %d samples of an epoch, which is no whole number of this run's batches of %d: the "
            "last %d of them are read again.",
            saved["batches"] * then,
            now,
            left,
        )
    loader.load_state_dict({**saved, "batches": batches})


@dataclass(frozen=True)
class Matched:
    """pairs: prepared loaders with the positions that they take up. left: positions of no loader. new: loaders without one."""

    pairs: Sequence[tuple[PreparedLoader, Position]]
    left: Sequence[Position]
    new: Sequence[PreparedLoader]

    def say(self) -> None:
        """Warn of what is left out, and of what begins at its start."""
        for entry in self.left:
            logger.warning("The checkpoint has a position of %s, which this run has not prepared.", _words(entry))
        for loader in self.new:
            logger.warning(
                "The checkpoint has no position of %s: it begins with its first epoch.",
                _words({"data": _facts(loader)}),
            )


def match(saved: Sequence[Position], saved_world: int, loaders: Sequence[PreparedLoader], world: int) -> Matched:
    """Which loader takes up which position. The same on every rank, without communication.

    Raises CheckpointError if a position that matters is nobody's. A run without loaders needs none.
    """
    if not loaders:
        return Matched([], [], [])
    pairs = _align(saved, saved_world, loaders, world)
    taken, given = {number for number, _ in pairs}, {mine for _, mine in pairs}
    left = [entry for number, entry in enumerate(saved) if number not in taken]
    lost = next((entry for entry in left if _matters(entry)), None)
    if lost is not None:
        raise CheckpointError(
            f"was saved with {len(saved)} data loader(s), but this run has prepared {len(loaders)}, and none of them is "
            f"{_words(lost)}, which it trained with. Prepare it as it was; only others may be left out."
        )
    new = [loader for mine, loader in enumerate(loaders) if mine not in given]
    return Matched([(loaders[mine], saved[number]) for number, mine in pairs], left, new)


def _facts(loader: PreparedLoader) -> dict[str, Any]:
    data: Any = own_dataset(loader.dataset)
    try:
        samples = len(data)
    except TypeError:  # a stream
        samples = None
    return {"class": f"{type(data).__module__}.{type(data).__qualname__}", "samples": samples}


def _order(entry: Position) -> str:
    """How an order is made; a position of one kind cannot be taken up by another."""
    if "generator" in entry:
        return "a generator of its own"
    return "as it comes" if entry["seed"] is None else "shuffled"


def _matters(entry: Position) -> bool:
    trained: bool | None = entry.get("trained")
    return trained if trained is not None else _order(entry) != "as it comes" or entry["batches"] > 0


def _words(entry: Position) -> str:
    facts = entry.get("data")
    if facts is None:
        return f"a loader of {entry['samples_at_a_time']} samples a step, {_order(entry)}, in epoch {entry['epoch']}"
    name = str(facts["class"]).rsplit(".", 1)[-1]
    what = f"the loader over a {name}" + (f" of {facts['samples']} samples" if facts["samples"] is not None else "")
    if "epoch" not in entry:
        return what
    return f"{what} ({_order(entry)}, {entry['batches']} batches into epoch {entry['epoch']})"


def _align(
    saved: Sequence[Position], saved_world: int, loaders: Sequence[PreparedLoader], world: int
) -> list[tuple[int, int]]:
    """(number saved, number prepared) of the pairs: equal ones, in their order, and then what is left over in its order."""
    now = [position(loader) for loader in loaders]
    pairs: list[tuple[int, int]] = []
    free = list(range(len(loaders)))
    for number, entry in enumerate(saved):
        same = (mine for mine in free if "data" in entry and _identity(entry) == _identity(now[mine]))
        found = next(same, None)
        if found is not None:
            free.remove(found)
            pairs.append((number, found))
    taken = {number for number, _ in pairs}
    rest = [number for number in range(len(saved)) if number not in taken]
    as_many = len(saved) == len(loaders)
    alike = [[_likeness(saved[n], saved_world, now[m], world, as_many=as_many) for m in free] for n in rest]
    return sorted(pairs + [(rest[i], free[j]) for i, j in _in_order(alike)])


def _identity(entry: Position) -> tuple[Any, ...]:
    return (entry["data"]["class"], entry["data"]["samples"], _order(entry))


def _likeness(entry: Position, saved_world: int, now: Position, world: int, *, as_many: bool) -> int:
    """How much a loader that is not equal is like the one that was saved; 0 where it cannot be the one."""
    if _order(entry) != _order(now):
        return 0
    then = entry.get("data")
    if then is None:
        size, was = now["samples_at_a_time"], entry["samples_at_a_time"]
        same = size == was or (size is not None and was is not None and size * saved_world == was * world)
        return 3 if same else 1
    # With as many loaders as before, a data set of another class is the old one rewritten.
    return 3 if then["class"] == now["data"]["class"] else int(as_many)


def _in_order(alike: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs (i, j) with alike[i][j] > 0, ascending on both sides, that are together most alike; early ones first."""
    rows, columns = len(alike), len(alike[0]) if alike else 0
    # best[i][j]: of the rows from i on and the columns from j on, the sum over the pairs, and the pairs.
    best: list[list[tuple[int, list[tuple[int, int]]]]] = [
        [(0, []) for _ in range(columns + 1)] for _ in range(rows + 1)
    ]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            choices = [best[i + 1][j], best[i][j + 1]]
            if alike[i][j]:
                score, pairs = best[i + 1][j + 1]
                choices.insert(0, (score + alike[i][j], [(i, j), *pairs]))
            best[i][j] = max(choices, key=lambda choice: choice[0])
    return best[0][0][1]
