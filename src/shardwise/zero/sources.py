"""Where the values of a parameter without memory come from, and how one rank's region of a flat buffer is filled from them.

A model that was built inside `accelerator.init()` has parameters on the meta device: shapes without values. Beside each
stands a Source, which can say any stretch of its elements: it reads them from a file, or computes them anew. So a rank asks
only for the stretches that lie in its own interval, and no rank ever holds the whole.

    unit      [ q q q q k k | o o o o up up ]        rank 1 asks: o.read(0, 4), up.read(0, 2)

This file does arithmetic on intervals; what a Source does to answer is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from .collectives import Ranks
from .scratch import give_back_free_memory

if TYPE_CHECKING:
    from .flat import FlatBuffer


class Source(Protocol):
    """The values of one parameter."""

    def read(self, begin: int, end: int) -> Tensor:
        """(end - begin,) elements from `begin` on, in row-major order, in the parameter's dtype, on any device."""
        ...

    def facts(self) -> list[Tensor]:
        """What the values depend on besides files: states of random generators, constants. Small; in a fixed order."""
        ...

    def adopt(self, facts: Sequence[Tensor]) -> None:
        """Take another rank's facts for one's own."""
        ...


# id(parameter) -> its source. The parameters are the model's, which outlives the table.
Sources = Mapping[int, Source]


def fill_region(buffer: FlatBuffer, sources: Sources, ranks: Ranks, out: Tensor) -> None:
    """Write this rank's interval of `buffer` into `out`: from sources, and rank 0's values of the real parameters.

    out: (shard_numel,) bytes for a buffer of bytes, else numbers of any dtype; the padding stays as it is.
    Collective; nothing larger than one parameter that has memory is sent. A source that fails is every rank's error.
    """
    give_back_free_memory()  # of the unit before this one
    members = buffer.members
    own = [sources.get(id(member.parameter)) for member in members]
    told = ranks.broadcast_object([source.facts() if source is not None else [] for source in own])
    values: dict[int, Tensor] = {}
    for index, (member, source) in enumerate(zip(members, own, strict=True)):
        if source is None:
            value = member.parameter.data.to(ranks.device).contiguous()
            if ranks.world_size > 1:
                value = value.clone() if value.data_ptr() == member.parameter.data_ptr() else value
                ranks.broadcast(value)
            values[index] = value.reshape(-1)
    error: Exception | None = None
    try:
        for source, facts in zip(own, told, strict=True):
            if source is not None:
                source.adopt(facts)
        for piece in buffer.layout.pieces(buffer.rank):
            member, source = members[piece.slot], own[piece.slot]
            target = out[piece.in_shard : piece.in_shard + piece.numel]
            begin, end = piece.in_slot, piece.in_slot + piece.numel
            if buffer.dtype == torch.uint8:
                # Intervals are cut at multiples of the alignment, so an element never lies in two of them.
                target = target.view(member.dtype)
                begin, end = begin // member.dtype.itemsize, end // member.dtype.itemsize
            target.copy_(values[piece.slot][begin:end] if source is None else source.read(begin, end))
    except Exception as caught:
        error = caught
    ranks.agree(error)


def give_memory(parameter: Parameter, view: Tensor) -> None:
    """Make `parameter` a view of real memory. torch refuses `.data =` from meta, so what is behind the object is exchanged."""
    if not parameter.is_meta:
        parameter.data = view
        return
    # Not torch.utils.swap_tensors, which refuses a parameter that somebody knows weakly, as nn.LSTM knows its own.
    torch._C._swap_tensor_impl(parameter, Parameter(view.data, requires_grad=parameter.requires_grad))
