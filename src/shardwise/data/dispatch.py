"""The loader whose batches rank 0 reads and hands out (`dispatch_batches`), for data that only one process should read.

At every step rank 0 joins one batch per rank (`split_batches`: takes one batch), tells the others its structure over
the control group, and broadcasts its tensors; each rank keeps its slice. Rank 0 reads one round ahead, so its message
also says which round is the last and how many of its samples are real. An error on rank 0 travels the same way: the
others raise RankError with its words instead of waiting for a batch that never comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterDataPipe

from ..errors import DataError, RankError
from ..ranks.agreeing import attempt_or_interrupt, words_of
from ..ranks.batches import broadcast_tensor, concatenate, is_column, leaves, map_leaves, send_to_device, slice_batch
from .loader import PreparedLoader
from .order import Round, cut_round, refuse_empty_stream


@dataclass(frozen=True)
class _Hole:
    """Where a tensor belongs in a batch that is announced before its tensors are sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Message:
    """What rank 0 says before each round; `skeleton` is the batch with holes."""

    skeleton: Any = None
    rows: int = 0
    last: bool = False
    end: bool = False
    error: str | None = None


class DispatchedLoader(PreparedLoader):
    """What `prepare` makes of a DataLoader whose batches rank 0 hands out; mixed in before the user's own class."""

    dispatches = True
    _split: bool
    _slice_fn: Callable[..., Any] | None

    @property
    def total_batch_size(self) -> int | None:
        size = self._batch_size_of_reader
        return size if size is None or self._split else size * self._ranks.world_size

    @property
    def _batch_size_of_reader(self) -> int | None:
        return self.batch_size if self.batch_size is not None else getattr(self.batch_sampler, "batch_size", None)

    @property
    def split_batches(self) -> bool:
        return self._split

    def _full_length(self) -> int:
        batches = super()._full_length()
        if self._split:
            return batches
        rounds, rest = divmod(batches, self._ranks.world_size)
        return rounds + (rest > 0 and not self._drops_last)

    def _entries(self, batches: int) -> int:
        return batches if self._split else batches * self._ranks.world_size

    @property
    def _drops_last(self) -> bool:
        return bool(self.drop_last or getattr(self.batch_sampler, "drop_last", False))

    def _read(self) -> Iterator[tuple[Any, bool, Round | None]]:
        world, rank = self._ranks.world_size, self._ranks.rank
        first: Any = None
        for batch, message in self._receive():
            if first is None:
                first = batch
            whole = batch
            part, rest = divmod(message.rows, world)
            if rest and not message.last:
                raise DataError(
                    f"dispatch_batches: a round of {message.rows} samples in mid-epoch cannot be cut into "
                    f"{world} equal parts. Only the last one may be of another size."
                )
            if rest and not self._drops_last:
                part += 1
                whole = _complete(batch, first, part * world)
            shares = cut_round([part] * world, message.rows) if message.last else None
            yield self._slice(whole, slice(rank * part, (rank + 1) * part)), message.last, shares

    def _slice(self, batch: Any, rows: slice) -> Any:
        if self._slice_fn is None:
            return slice_batch(batch, rows)
        return self._slice_fn(batch, rows, process_index=self._ranks.rank, num_processes=self._ranks.world_size)

    def _receive(self) -> Iterator[tuple[Any, _Message]]:
        """Each round's whole batch, on the device of every rank."""
        ranks = self._ranks
        reader = self._announce() if ranks.rank == 0 else None
        # A data pipe's iterator begins with a collective of its own, which every rank must join.
        joined = self._inner_iterator() if reader is None and isinstance(self.dataset, IterDataPipe) else None
        count = 0
        while True:
            error: BaseException | None = None
            batch, message = None, _Message()
            if reader is not None:
                read, error = attempt_or_interrupt(lambda: next(reader))  # the others wait for this batch
                batch, message = read or (None, _Message(error=words_of(error)))
            message = ranks.broadcast_object(message)
            if error is not None:
                raise error
            if message.error is not None:
                raise RankError(f"rank 0 failed while reading a batch for all ranks: {message.error}")
            if message.end:
                break
            count += 1
            device = ranks.device

            def fill(item: Any) -> Any:
                if not isinstance(item, (_Hole, Tensor)):
                    return item
                if isinstance(item, _Hole):
                    item = torch.empty(item.shape, dtype=item.dtype, device=device)  # noqa: B023 - called at once
                return broadcast_tensor(ranks, item, 0)

            batch = message.skeleton if batch is None else send_to_device(batch, device, self._non_blocking)
            yield map_leaves(fill, batch), message
            if message.last:
                break
        del joined
        if count == 0 and not self._drops_last:
            refuse_empty_stream(self.dataset)

    def _announce(self) -> Iterator[tuple[Any, _Message]]:
        """On rank 0: each round with its message; one round is read ahead."""
        rounds = self._rounds()
        current = next(rounds, None)
        while current is not None:
            following = next(rounds, None)
            skeleton = map_leaves(
                lambda item: _Hole(tuple(item.shape), item.dtype) if isinstance(item, Tensor) else item, current
            )
            yield current, _Message(skeleton, _rows(current), last=following is None)
            current = following
        yield None, _Message(end=True)

    def _rounds(self) -> Iterator[Any]:
        batches = self._inner_iterator()
        if self._split:
            yield from batches
            return
        collected: list[Any] = []
        for batch in batches:
            collected.append(batch)
            if len(collected) == self._ranks.world_size:
                yield _join(collected)
                collected = []
        if collected and not self._drops_last:
            yield _join(collected)


def _join(batches: list[Any]) -> Any:
    try:
        return concatenate(batches)
    except DataError as error:
        raise DataError(
            f"dispatch_batches joins one batch per rank, and these do not fit together: {error} Pad them to one "
            "shape in the collate function, or use dispatch_batches=False or split_batches=True."
        ) from error


def _rows(batch: Any) -> int:
    """The samples in a batch. Raises DataError if its parts do not agree."""
    found: set[int] = set()
    columns: list[Any] = []
    map_leaves(columns.append, batch, is_column)
    for item in columns:
        if isinstance(item, Tensor) and item.ndim > 0:
            found.add(int(item.shape[0]))
        elif is_column(item):
            found.add(len(item))
    if len(found) != 1:
        raise DataError(
            f"dispatch_batches cuts batches along dimension 0, but this one has parts of lengths "
            f"{sorted(found)} (leaves: {[type(leaf).__name__ for leaf in leaves(batch)]})."
        )
    return found.pop()


def _complete(batch: Any, first: Any, rows: int) -> Any:
    """`batch` with samples of `first` added until it has `rows`."""
    have = _rows(batch)
    while have < rows:
        more = slice_batch(first, slice(0, rows - have))
        batch = concatenate([batch, more])
        have += _rows(more)
    return batch
