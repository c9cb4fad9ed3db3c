"""How a rank's file comes about in a save that does not wait: what is copied at once, what stays, what is written now.

    copied   what rests on the device, or is stepped in place                into one pinned buffer, in the file's order
    kept     slabs in host memory that visit the device for a step           written from where they are, see `keeping.py`
    written  what rests on a drive or as codes                               before the call returns, one tensor at a time
    given    what the save owns already                                      with the rest

    file    | header | a | b | c | d | e | f |      each tensor summed up in blocks
    buffer           | a | b | c |   | f |          spans: a to c, d to e, f; one write for each
    slab                         | d | e |

A span is consecutive bytes of the file that lie together where they come from, of at most SPAN_NBYTES. It is arithmetic on
pieces, made once and used for as long as these stand; nothing here copies or writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from ..files.past_cache import PAGE
from ..files.writer import BLOCK_NBYTES, Layout
from ..offload.coded import CodedSlab
from ..offload.store import Slab
from .manifest import row_head
from .pieces import Given, Piece, Resting

SPAN_NBYTES = 8 << 20


class Way(Enum):
    """How a piece comes into the file."""

    COPIED = "copied"
    KEPT = "kept"
    WRITTEN = "written"
    GIVEN = "given"


@dataclass
class Span:
    """Bytes [offset, offset + nbytes) of the file. begin: where they are in the buffer, or in the slab of piece `source`.

    source: None for the buffer. parts: (piece, number of its block, bytes), in order.
    """

    offset: int
    begin: int
    source: int | None
    nbytes: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Transfer:
    """Elements [begin, begin + count) of what piece `source` rests in, which go to `target` bytes into the buffer."""

    source: int
    begin: int
    count: int
    target: int
    nbytes: int
    dtype: torch.dtype
    is_state: bool


class FilePlan:
    """Of the pieces of one rank, which must stand.

    layout: of the file. rows: of each piece its row in the index, up to the sums of its blocks. blocks: of each piece how many
    there are. ways: of each piece. spans: of what is copied and kept. transfers: what fills the buffer of `nbytes`.
    """

    def __init__(self, pieces: Sequence[Piece], file: str) -> None:
        self.pieces = list(pieces)
        self.layout = Layout([piece.spec for piece in pieces], file)
        offsets = self.layout.offsets
        self.rows = [row_head(p.address, p.shape, p.begin, p.spec, offsets[p.address]) for p in pieces]
        self.blocks = [-(-piece.spec.nbytes // BLOCK_NBYTES) for piece in pieces]
        self.ways = [way_of(piece.source) for piece in pieces]
        self.spans: list[Span] = []
        self.transfers: list[Transfer] = []
        self.nbytes = 0
        self._buffer: Tensor | None = None
        self._targets: dict[bool, list[Tensor]] = {}
        number = {piece.address: n for n, piece in enumerate(pieces)}
        for spec in self.layout.in_order:
            n = number[spec.name]
            if self.ways[n] is Way.COPIED:
                self._copy(n)
            elif self.ways[n] is Way.KEPT:
                self._keep(n)
        self.pieces = []  # those that are given are of one save, and may be large

    def targets(self, buffer: Tensor, *, are_states: bool) -> list[Tensor]:
        """Where the transfers of states, or the others, go: views of `buffer`, each in the dtype of what it comes from."""
        if self._buffer is not buffer:
            self._buffer, self._targets = buffer, {True: [], False: []}
            for one in self.transfers:
                self._targets[one.is_state].append(buffer[one.target : one.target + one.nbytes].view(one.dtype))
        return self._targets[are_states]

    def numbers(self, way: Way) -> list[int]:
        """The pieces that come in this way."""
        return [n for n, found in enumerate(self.ways) if found is way]

    def _copy(self, n: int) -> None:
        piece = self.pieces[n]
        source, nbytes = piece.source, piece.spec.nbytes
        assert isinstance(source, Resting)
        last = self.transfers[-1] if self.transfers else None
        # In the buffer as in the file, counted from a page: so whole pages go from one to the other as they are.
        apart = (self.layout.offsets[piece.spec.name] - self.nbytes) % PAGE
        self.nbytes += apart
        follows = (
            last is not None
            and not apart
            and last.is_state == source.is_state
            and last.begin + last.count == source.begin
            and self._is_same(last.source, source)
        )
        if last is not None and follows:
            last.count += source.count
            last.nbytes += nbytes
        else:
            dtype = memory_of(source.held()).dtype
            self.transfers.append(Transfer(n, source.begin, source.count, self.nbytes, nbytes, dtype, source.is_state))
        self._span(n, self.nbytes, None)
        self.nbytes += nbytes

    def _keep(self, n: int) -> None:
        source = self.pieces[n].source
        assert isinstance(source, Resting)
        slab = source.held()
        assert isinstance(slab, Slab)
        self._span(n, source.begin * slab.dtype.itemsize, n)

    def _span(self, n: int, begin: int, source: int | None) -> None:
        """Let the bytes of piece `n`, from `begin` on where they come from, go on with the last span, or begin one."""
        offset, left = self.layout.offsets[self.pieces[n].address], self.pieces[n].spec.nbytes
        for block in range(self.blocks[n]):
            nbytes = min(BLOCK_NBYTES, left)
            span = self.spans[-1] if self.spans else None
            if (
                span is None
                or span.offset + span.nbytes != offset
                or span.begin + span.nbytes != begin
                or span.nbytes + nbytes > SPAN_NBYTES
                or (span.source is None) != (source is None)
                or (span.source is not None and not self._is_same(span.source, self.pieces[n].source))
            ):
                span = Span(offset, begin, source)
                self.spans.append(span)
            span.parts.append((n, block, nbytes))
            span.nbytes += nbytes
            offset, begin, left = offset + nbytes, begin + nbytes, left - nbytes

    def _is_same(self, n: int, other: Given | Resting) -> bool:
        """Whether piece `n` rests in what the other rests in."""
        mine = self.pieces[n].source
        return isinstance(mine, Resting) and isinstance(other, Resting) and mine.held() is other.held()


def way_of(source: Given | Resting) -> Way:
    """How a piece from there comes into the file."""
    if isinstance(source, Given):
        return Way.GIVEN
    flat = source.held()
    if isinstance(flat, Slab) and (isinstance(flat, CodedSlab) or not flat.in_memory):
        return Way.WRITTEN
    return Way.KEPT if source.visits else Way.COPIED


def memory_of(flat: Tensor | Slab) -> Tensor:
    """The 1-d tensor that can be read in place."""
    found = flat.tensor if isinstance(flat, Slab) else flat
    return found if found.ndim == 1 else found.view(-1)
