"""Which samples each rank reads: pure arithmetic over indices, no ranks, no tensors, no devices.

Ten samples, batches of 2, two ranks. `split=False`: rank r takes batches r, r + 2, ...; a round is one batch for each
rank, and the last round is completed with samples from the start of the epoch (`even`):

    sampler      [0 1] [2 3] [4 5] [6 7] [8 9]
    rank 0       [0 1]       [4 5]       [8 9]
    rank 1             [2 3]       [6 7]       [0 1]        <- repeats; last_round = (Share(2, 2), Share(2, 0))

`split=True`: every batch is cut into one slice per rank. The order and the completion are accelerate's, so that a run
sees the same samples; what is new is that the last round is described exactly, per rank, so that a metric can drop the
repeats whatever the sampler, and that batches of varying size are kept whole instead of being lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..errors import DataError


@dataclass(frozen=True)
class Share:
    """One rank's part of a round: how many samples it reads, and how many of them are not repeats (the first ones)."""

    rows: int
    real: int


Round = tuple[Share, ...]


def cut_round(sizes: Sequence[int], real: int) -> Round:
    """The shares of a round whose real samples come first, in rank order."""
    shares = []
    for rows in sizes:
        shares.append(Share(rows, max(0, min(rows, real))))
        real -= rows
    return tuple(shares)


class RankBatches:
    """This rank's batches of indices out of a batch sampler that all ranks iterate in the same order.

    batch_sampler: any iterable of lists of indices; its `batch_size` (None or absent: batches of any size) and
                   `drop_last` are respected.
    split:         cut each batch over the ranks instead of dealing whole batches.
    even:          complete the last round, so that all ranks read equally many samples.
    last_round:    after an iteration, every rank's share of the last round; None before.
    Raises DataError if `split` is asked for and the batch size does not divide by the ranks.
    """

    def __init__(
        self, batch_sampler: Any, world_size: int, rank: int, *, split: bool = False, even: bool = True
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = world_size
        self.process_index = rank
        self.split_batches = split
        self.even_batches = even
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)
        self.drop_last: bool = bool(getattr(batch_sampler, "drop_last", False))
        self.last_round: Round | None = None
        if split and (self.batch_size is None or self.batch_size % world_size != 0):
            raise DataError(
                f"split_batches: a batch size of {self.batch_size} cannot be cut into {world_size} equal parts. Use a "
                f"batch_size that is a round multiple of {world_size}, or split_batches=False."
            )

    @property
    def sampler(self) -> Any:
        """The sampler inside, where there is one."""
        return getattr(self.batch_sampler, "sampler", None)

    @property
    def total_length(self) -> int:
        """Batches of all ranks together."""
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """Tell the batch sampler and its sampler, if they want to know."""
        for part in (self.batch_sampler, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length_on(self.process_index)

    def length_on(self, rank: int) -> int:
        """How many batches `rank` reads in an epoch."""
        batches = len(self.batch_sampler)
        if self.split_batches:
            return batches
        rounds, rest = divmod(batches, self.num_processes)
        if rest == 0 or self.drop_last:
            return rounds
        return rounds + 1 if self.even_batches or rank < rest else rounds

    def __iter__(self) -> Iterator[list[Any]]:
        self.last_round = None
        rounds = self._split_rounds() if self.split_batches else self._dealt_rounds()
        for batches, shares in rounds:
            self.last_round = shares
            if self.process_index < len(batches):
                yield batches[self.process_index]

    def _dealt_rounds(self) -> Iterator[tuple[list[list[Any]], Round]]:
        world, size = self.num_processes, self.batch_size
        first: list[list[Any]] = []  # the batches of the first round, for completing the last one
        collected: list[list[Any]] = []
        held: list[list[Any]] | None = None  # a full round with a batch of another size: the last one, or sizes vary
        vary = size is None
        for entry in self.batch_sampler:
            batch = list(entry)
            if held is not None:
                vary = True
                yield held, _whole(held)
                held = None
            if collected and len(collected[-1]) != size:
                vary = True
            if len(first) < world:
                first.append(batch)
            collected.append(batch)
            if len(collected) == world:
                if vary or len(batch) == size:
                    yield collected, _whole(collected)
                else:
                    held = collected
                collected = []
        tail = held if held is not None else collected
        if not tail or (self.drop_last and not vary) or (self.drop_last and len(tail) < world):
            return
        if not self.even_batches:
            yield tail, _whole(tail, world)
        elif vary:
            # Batches whose size means something (a number of tokens, say) are repeated whole.
            real = len(tail)
            tail = tail + list(islice(cycle(first), world - real))
            yield tail, tuple(Share(len(b), len(b) if i < real else 0) for i, b in enumerate(tail))
        else:
            assert size is not None
            real = sum(len(batch) for batch in tail)
            # A short batch is filled up from the start of the epoch, and so are the ranks that got none.
            samples = chain(chain.from_iterable(tail), cycle(list(chain.from_iterable(first))))
            yield [list(islice(samples, size)) for _ in range(world)], cut_round([size] * world, real)

    def _split_rounds(self) -> Iterator[tuple[list[list[Any]], Round]]:
        world, size = self.num_processes, self.batch_size
        assert size is not None
        part = size // world
        first: list[Any] | None = None
        short: list[Any] | None = None
        for entry in self.batch_sampler:
            batch = list(entry)
            if first is None:
                first = batch
            if short is not None or len(batch) > size:
                raise DataError(
                    f"split_batches: the batch sampler gives batches of varying size ({len(short or batch)} "
                    f"where batch_size is {size}). Use split_batches=False."
                )
            if len(batch) < size:
                short = batch
                continue
            yield _cut(batch, part, world), cut_round([part] * world, size)
        if short is None or first is None or self.drop_last or not short:
            return
        if self.even_batches:
            batch = list(islice(chain(short, cycle(first)), size))
            yield _cut(batch, part, world), cut_round([part] * world, len(short))
        else:
            pieces = _cut(short, part, world)
            yield [piece for piece in pieces if piece], tuple(Share(len(piece), len(piece)) for piece in pieces)


def _whole(batches: list[list[Any]], world: int = 0) -> Round:
    shares = [Share(len(batch), len(batch)) for batch in batches]
    return tuple(shares + [Share(0, 0)] * (world - len(shares)))


def _cut(batch: list[Any], part: int, world: int) -> list[list[Any]]:
    return [batch[part * rank : part * (rank + 1)] for rank in range(world)]


class SingleIndices:
    """Each index of a sampler as a batch of its own, for a loader that does not batch (`batch_size=None`)."""

    batch_size = None
    drop_last = False

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        for index in self.sampler:
            yield [index]


class FirstOfEach:
    """The opposite of `SingleIndices`, after the ranks have been dealt their part."""

    def __init__(self, batches: RankBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch[0]


class LaterBatches:
    """A sampler without its first `skip` entries. Nothing is read from the data set for those."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self.inner = sampler
        self.skip = skip

    @property
    def batch_size(self) -> int | None:
        return getattr(self.inner, "batch_size", None)

    @property
    def drop_last(self) -> bool:
        return bool(getattr(self.inner, "drop_last", False))

    @property
    def sampler(self) -> Any:
        return getattr(self.inner, "sampler", None)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return max(0, len(self.inner) - self.skip)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.inner), self.skip, None)


class RankSamples(IterableDataset[Any]):
    """This rank's samples of an iterable data set that all ranks read in the same order.

    Rounds of `batch_size * world_size` samples (`split`: of `batch_size`) are read, and this rank gives its slice of
    each. The last round is completed with the first one's samples, or dropped with `drop_last`. Every rank reads the
    whole stream, also of a data set that could be divided by files: ranks whose files differ in length would end at
    different steps, and the others would wait for them in the next gather.

    last_round: as in RankBatches; valid in the process that iterates (not where loader workers do).
    """

    def __init__(
        self, dataset: Any, batch_size: int, world_size: int, rank: int, *, drop_last: bool = False, split: bool = False
    ) -> None:
        if split and batch_size % world_size != 0:
            raise DataError(
                f"split_batches: a batch size of {batch_size} cannot be cut into {world_size} equal parts. Use a batch_size "
                f"that is a round multiple of {world_size}, or split_batches=False."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_processes = world_size
        self.process_index = rank
        self.drop_last = drop_last
        self.split_batches = split
        self.last_round: Round | None = None

    @property
    def round_size(self) -> int:
        return self.batch_size if self.split_batches else self.batch_size * self.num_processes

    @property
    def part(self) -> int:
        return self.round_size // self.num_processes

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        rounds, rest = divmod(len(self.dataset), self.round_size)
        return (rounds + (rest > 0 and not self.drop_last)) * self.part

    def __iter__(self) -> Iterator[Any]:
        self.last_round = None
        first: list[Any] = []
        samples = iter(self.dataset)
        mine = slice(self.process_index * self.part, (self.process_index + 1) * self.part)
        while collected := list(islice(samples, self.round_size)):
            real = len(collected)
            if real < self.round_size:
                if self.drop_last:
                    return
                collected = list(islice(chain(collected, cycle(first or list(collected))), self.round_size))
            elif not first:
                first = list(collected)
            self.last_round = cut_round([self.part] * self.num_processes, real)
            yield from collected[mine]


def refuse_empty_stream(dataset: Any) -> None:
    inner = dataset.dataset if isinstance(dataset, RankSamples) else dataset
    if getattr(dataset, "drop_last", False):
        return
    raise DataError(
        f"the iterable data set {type(inner).__name__} gave no sample. It is empty, or it can be read only "
        "once: make its __iter__ start anew each time."
    )


def samplers_inside(sampler: Any) -> Iterable[Any]:
    """A sampler and those that it wraps, outermost first."""
    seen: set[int] = set()
    queue = [sampler]
    while queue:
        part = queue.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        queue += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "inner", "batches")]


def tell_epoch(sampler: Any, dataset: Any, epoch: int) -> None:
    """Call `set_epoch` of the script's own samplers inside of `sampler`, and of the data set, where they have one."""
    for part in (*samplers_inside(sampler), dataset):
        if hasattr(part, "set_epoch") and not isinstance(part, (RankBatches, LaterBatches)):
            part.set_epoch(epoch)


def fresh_generator(seed: int) -> torch.Generator:
    """A CPU generator at `seed`."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator
