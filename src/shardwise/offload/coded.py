"""A slab of fp32 numbers that rest as codes: its parts are slabs of a store, and all that travels is those.

    up     parts --copy--> room on the device --decode--> fp32 numbers, which the optimizer steps
    down   fp32 numbers --encode--> parts on the device --copy--> parts at rest

Blocks of 256 are never cut: chunks begin at multiples of them. Only what is loaded comes in intervals of parameters, which may
share a block: see `write_part`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan.compressed import BLOCK
from ..plan.state_dtypes import PIECE
from .codes import Chance, Coding
from .store import Arrival, Slab, Store


class CodedSlab(Slab):
    """`numel` fp32 numbers at rest on `store`, as `coding` has them; zeros at first. name: what errors and files call it.

    stored: the slabs of its parts.
    """

    def __init__(self, store: Store, numel: int, coding: Coding, name: str) -> None:
        super().__init__(store, store.tier, numel, torch.float32)
        self.coding = coding
        self.stored = [store.allocate(-(-numel // each), dtype, name) for dtype, each in coding.parts]
        # Blocks of which a part was written by itself, as numbers: block -> (up to 256,), until all of them are coded anew.
        self._edges: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.stored)

    # Moving, in parts.

    def room(self, numel: int, device: torch.device) -> list[Tensor]:
        return self.coding.room(numel, device)

    def fetch_parts(self, parts: Sequence[Tensor], begin: int = 0) -> list[Arrival]:
        return [slab.fetch(part, at) for slab, part, at in self._each(parts, begin)]

    def unpacked(self, parts: Sequence[Tensor], numel: int) -> Tensor:
        return self.coding.decode(parts, torch.empty(numel, device=parts[0].device))

    def packed(self, values: Tensor, begin: int = 0, step: Tensor | None = None) -> list[Tensor]:
        return self.coding.encode(values, None if step is None else Chance(begin, step))

    def put_parts(self, parts: Sequence[Tensor], begin: int = 0, *, given: bool = False) -> torch.Event | None:
        if self._edges:
            last = begin // BLOCK + -(-parts[0].numel() // BLOCK)
            self._edges = {n: edge for n, edge in self._edges.items() if not begin // BLOCK <= n < last}
        event = None
        for slab, part, at in self._each(parts, begin):
            event = slab.put_parts([part], at, given=given)
        return event

    def _each(self, parts: Sequence[Tensor], begin: int) -> list[tuple[Slab, Tensor, int]]:
        assert begin % BLOCK == 0, "blocks are never cut"
        places = [begin // each for _, each in self.coding.parts]
        return list(zip(self.stored, parts, places, strict=True))

    # Reading and writing at once.

    def read_part(self, begin: int, numel: int) -> Tensor:
        first = begin // BLOCK * BLOCK
        count = begin + numel - first
        parts = [
            slab.read_part(first // each, -(-count // each))
            for slab, (_, each) in zip(self.stored, self.coding.parts, strict=True)
        ]
        return self.unpacked(parts, count)[begin - first :]

    @torch.no_grad()
    def write_part(self, begin: int, values: Tensor) -> None:
        """Numbers that share a block with others are coded anew with them: the others then may change by a rounding.

        So the numbers themselves of such blocks are kept until the next step. When all of a block has been written, in whatever
        parts, its codes are those of the numbers, as if it had been written at once.
        """
        for at in range(0, values.numel(), PIECE):
            self._write(begin + at, values[at : at + PIECE])

    def _write(self, begin: int, values: Tensor) -> None:
        first, end = begin // BLOCK * BLOCK, begin + values.numel()
        last = min(-(-end // BLOCK) * BLOCK, self.numel)
        whole = self.read_part(first, last - first)
        edges = {place // BLOCK for place, cut in ((first, begin > first), (end - 1, end < last)) if cut}
        for block in edges & self._edges.keys():
            whole[block * BLOCK - first :][:BLOCK].copy_(self._edges[block])
        whole[begin - first : end - first].copy_(values)
        for block in edges:
            self._edges[block] = whole[block * BLOCK - first :][:BLOCK].to("cpu", copy=True)
        for slab, part, at in self._each(self.packed(whole), first):
            slab.write_part(at, part)
