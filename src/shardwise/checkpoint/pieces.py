"""One tensor of a checkpoint, and where a rank takes it from.

    Given      a tensor that the save owns already: an encoded state, a copy of a buffer
    Resting    elements of what the engine has: a slab, or a state of an optimizer

What rests is known weakly: the pieces of a save are used again in the next one (`standing.py`), and an optimizer may have
let go of its states meanwhile. Who writes them keeps `Resting.flat()` for as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.writer import Spec
from ..offload.store import Slab
from ..ranks.ranks import Ranks
from ..step import intervals
from ..step.intervals import Interval, seen


@dataclass(frozen=True)
class Given:
    """A tensor in host memory that nobody changes. make: gives its elements, (numel,)."""

    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        return self.make()


@dataclass(frozen=True, eq=False)
class Resting:
    """Elements [begin, begin + count) of what `flat` gives.

    flat:    a slab or a contiguous tensor; None where it is gone.
    dtype:   what its bytes are, where it is of bytes. visits: see `Rest`.
    is_state: it is an optimizer's state, which only a step changes.
    """

    flat: Callable[[], Tensor | Slab | None]
    begin: int
    count: int
    dtype: torch.dtype | None
    visits: bool
    is_state: bool

    def held(self) -> Tensor | Slab:
        """What it rests in, for as long as the caller keeps it."""
        found = self.flat()
        assert found is not None, "pieces are made anew when what they rest in is gone"
        return found

    def read(self) -> Tensor:
        """(numel,) on the CPU, the caller's own."""
        return seen(self.held(), self.begin, self.count, self.dtype).to("cpu", copy=True)


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its address, the whole's shape, which elements of it from `begin` on, and where they are."""

    address: str
    shape: tuple[int, ...]
    begin: int
    spec: Spec
    source: Given | Resting


def given_piece(address: str, shape: tuple[int, ...], begin: int, spec: Spec, make: Callable[[], Tensor]) -> Piece:
    """A piece whose (numel,) elements `make` gives."""
    return Piece(address, shape, begin, spec, Given(make))


def whole_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Pieces of tensors in host memory that are the caller's, each whole and under its own name."""

    def holder(value: Tensor) -> Given:
        return Given(lambda: value)

    return [
        Piece(name, tuple(t.shape), 0, Spec(name, t.dtype, (t.numel(),)), holder(t.reshape(-1)))
        for name, t in tensors.items()
    ]


def pieces_of(
    ranks: Ranks, prefix: str, held: Sequence[Interval], *, are_states: bool = False, apart: bool = False
) -> Iterator[Piece]:
    """This rank's part of intervals, which several ranks may hold, as pieces at `prefix/<name>`. ranks: their model's.

    apart: see `intervals.share`.
    """
    for interval in intervals.share(held, ranks, apart=apart):
        address = f"{prefix}/{interval.name}"
        rest, begin, count = interval.place
        # A view of a frozen weight's bytes is nobody's but the piece's.
        flat = _strongly(rest.flat) if interval.frozen else weakref.ref(rest.flat)
        source = Resting(flat, begin, count, rest.dtype, rest.visits, are_states)
        yield Piece(address, interval.shape, interval.begin, Spec(address, interval.dtype, (interval.numel,)), source)


def _strongly(flat: Tensor | Slab) -> Callable[[], Tensor | Slab | None]:
    return lambda: flat
