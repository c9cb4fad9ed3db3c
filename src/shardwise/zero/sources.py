"""Where the values of a parameter without memory come from, and how one rank's region of a flat buffer is filled from them.

A model that was built inside `accelerator.init()` has parameters on the meta device: shapes without values. Beside each
stands a Source, which can say any stretch of its elements: it reads them from a file, or computes them anew. So a rank asks
only for the stretches that lie in its own interval, and no rank ever holds the whole.

    unit      [ q q q q k k | o o o o up up ]        rank 1 asks: o.read(0, 4), up.read(0, 2)

Where a stretch costs as much as all of the tensor, one rank makes it and sends it, a few MiB at a time; each keeps what lies
in its interval. The ranks take turns, tensor by tensor, so that each reads its share of the files.

    unit      [ t t t t t t ]                        rank 0 makes t, sends t t t | t t t; rank 1 keeps the second half

This file does arithmetic on intervals; what a Source does to answer is not known here.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ..files.reader import FileStretch
from ..files.scratch import give_back_free_memory
from ..offload.borrowed import Loan
from ..plan.blueprint import Member
from ..plan.layout import Layout
from ..plan.units import UnitSpec
from ..ranks.ranks import Ranks
from .flat import FlatBuffer

# Of a tensor that one rank makes, this much is sent at a time: what the others hold besides their interval.
_SENT_NBYTES = 8 << 20

# Of a unit whose weights are read in their files at most so large a part may be without one, and stays in host memory.
_LITTLE = 16

MadeBy = Literal["each rank", "one rank", "rank 0"]


class Source(Protocol):
    """The values of one parameter."""

    @property
    def made_by(self) -> MadeBy:
        """Who reads from it: each rank its own stretch, one rank all of it for the others, or rank 0, who alone has it."""
        ...

    def leave_to_rank_0(self) -> None:
        """Rank 0 alone has the values from here on."""
        ...

    def read(self, begin: int, end: int) -> Tensor:
        """(end - begin,) elements from `begin` on, in row-major order, in the parameter's dtype, on any device."""
        ...

    def in_file(self) -> FileStretch | None:
        """The bytes of a file that are all of its values, in row-major order and the parameter's dtype; None without such."""
        ...

    def facts(self) -> list[Tensor]:
        """What the values depend on besides files: states of random generators, constants. Small; in a fixed order."""
        ...

    def history(self) -> int:
        """A number for what the values are made by, without facts and files: equal where a rank can stand in for another."""
        ...

    def adopt(self, facts: Sequence[Tensor]) -> None:
        """Take another rank's facts for one's own."""
        ...


# id(parameter) -> its source. The parameters are the model's, which outlives the table.
Sources = Mapping[int, Source]


# id(parameter) -> the rank that makes all of it for all ranks. What is not here each rank makes in its own stretches.
Makers = Mapping[int, int]


def choose_makers(specs: Sequence[UnitSpec], sources: Sources, whole: Container[int], ranks: Ranks) -> Makers:
    """Who makes each of the weights that are made whole: the largest first, each by the rank with the fewest bytes so far.

    whole: ids of weights that are made whole, whatever their source says. Collective: how it is made is rank 0's word.
    """
    parameters = {id(p): p for spec in specs for p in spec.parameters.values()}
    sized = [(p, p.numel() * p.dtype.itemsize) for key, p in parameters.items() if key in sources]
    own = [sources[id(p)] for p, _ in sized]
    mine = [(source.made_by, source.history()) for source in own]
    told = ranks.broadcast_object(mine)
    ways = [way for way, _ in told]
    # A script may have written on one rank alone, or another number on each: then rank 0's count, as for any model.
    for place, differs in enumerate(ranks.any_of([one != other for one, other in zip(mine, told, strict=True)])):
        if differs:
            own[place].leave_to_rank_0()
            ways[place] = "rank 0"
    found: dict[int, int] = {}
    made = [0] * ranks.world_size
    for (parameter, nbytes), way in sorted(zip(sized, ways, strict=True), key=lambda item: -item[0][1]):
        if way != "each rank" or id(parameter) in whole:
            rank = 0 if way == "rank 0" else made.index(min(made))
            found[id(parameter)] = rank
            made[rank] += nbytes
    return found


def agree_on_facts(sources: Sequence[Source], ranks: Ranks) -> None:
    """Let every source stand for rank 0's numbers. Collective; one that cannot is every rank's error."""
    told = ranks.broadcast_object([source.facts() for source in sources])

    def adopt() -> None:
        for source, facts in zip(sources, told, strict=True):
            source.adopt(facts)

    ranks.together(adopt)


def fill_region(
    buffer: FlatBuffer,
    sources: Sources,
    makers: Makers,
    ranks: Ranks,
    out: Tensor,
    only: Container[int] | None = None,
) -> None:
    """Write this rank's interval of `buffer` into `out`: from sources, and rank 0's values of the real parameters.

    out: (shard_numel,) bytes for a buffer of bytes, else numbers of any dtype; the padding stays as it is.
    only: which members, the same on every rank; None: all.
    Collective. A rank holds at most one tensor of those it makes whole. A source that fails is every rank's error.
    """
    give_back_free_memory()  # of the unit before this one
    own = [sources.get(id(member.parameter)) for member in buffer.members]
    agree_on_facts([source for source in own if source is not None], ranks)
    targets = _targets(buffer, out)
    for index, (member, source) in enumerate(zip(buffer.members, own, strict=True)):
        if only is not None and index not in only:
            targets.pop(index, None)
        elif source is None or id(member.parameter) in makers:
            begin, target = targets.pop(index, (0, out[:0]))
            end = begin + target.numel()
            maker = makers[id(member.parameter)] if source is not None else 0
            for first, values in _from_one_rank(member.parameter, source, maker, ranks):
                low, high = max(begin, first), min(end, first + values.numel())
                if low < high:
                    target[low - begin : high - begin].copy_(values[low - first : high - first])

    def read() -> None:
        for index, (begin, target) in targets.items():
            source = own[index]
            assert source is not None
            target.copy_(source.read(begin, begin + target.numel()))

    ranks.together(read)


@dataclass(frozen=True)
class Lying:
    """Where a rank's interval lies in the files that its weights come from.

    without: the numbers of the members that no file has. kept: (begin, end) of what is theirs of the interval.
    """

    loans: list[Loan]
    kept: list[tuple[int, int]]
    without: frozenset[int]


def lying(members: Sequence[Member], layout: Layout, rank: int, sources: Sources, makers: Makers) -> Lying | str:
    """Where the bytes of a rank's interval lie; the name of a weight that no file has where that is more than a little.

    layout: in bytes.
    """
    found: dict[int, FileStretch] = {}
    missing: list[int] = []
    for index, member in enumerate(members):
        source = sources.get(id(member.parameter))
        stretch = source.in_file() if source is not None and id(member.parameter) not in makers else None
        if stretch is None or member.dtype != member.parameter.dtype:
            missing.append(index)
        else:
            found[index] = stretch
    if sum(layout.slots[index].numel for index in missing) > layout.numel // _LITTLE:
        return members[missing[0]].name
    pieces = layout.pieces(rank)
    loans = [
        Loan(p.in_shard, p.in_shard + p.numel, found[p.slot].path, found[p.slot].offset + p.in_slot)
        for p in pieces
        if p.slot in found
    ]
    kept = [(p.in_shard, p.in_shard + p.numel) for p in pieces if p.slot not in found]
    return Lying(loans, kept, frozenset(missing))


def _targets(buffer: FlatBuffer, out: Tensor) -> dict[int, tuple[int, Tensor]]:
    """Of every member that has a part in this rank's interval: its first element there, and where the part goes."""
    found = {}
    for piece in buffer.layout.pieces(buffer.rank):
        target, begin = out[piece.in_shard : piece.in_shard + piece.numel], piece.in_slot
        if buffer.dtype == torch.uint8:
            # Intervals are cut at multiples of the alignment, so an element never lies in two of them.
            dtype = buffer.members[piece.slot].dtype
            target, begin = target.view(dtype), begin // dtype.itemsize
        found[piece.slot] = begin, target
    return found


def _from_one_rank(
    parameter: Parameter, source: Source | None, maker: int, ranks: Ranks
) -> Iterator[tuple[int, Tensor]]:
    """All of what `maker` makes or has, in parts: (the first element, the elements from there on, flat, on the device)."""
    numel, dtype = parameter.numel(), parameter.dtype
    whole: Tensor | None = None
    if source is not None:
        whole = ranks.together(lambda: source.read(0, numel) if ranks.rank == maker else None)
    elif ranks.rank == maker:
        whole = parameter.data.reshape(-1)
    step = _SENT_NBYTES // dtype.itemsize
    for first in range(0, numel, step):
        size = min(step, numel - first)
        if whole is not None:
            part = whole[first : first + size].to(ranks.device)
        else:
            part = torch.empty(size, dtype=dtype, device=ranks.device)
        ranks.broadcast(part, maker)
        yield first, part
