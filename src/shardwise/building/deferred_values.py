"""Weights that have no memory yet, read and written by a script before `prepare`: for that time they have it.

    enter   the record is replayed: the parameter, the same object, has its values on the CPU
    leave   what differs is one more entry of the record, and the memory goes

Code that already runs where everything is recorded (`deferring`) needs none of it: there the record itself is read and written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import WriteError
from ..files.writer import as_bytes
from ..ranks.ranks import Ranks
from .deferred_tensors import ordinary
from .initialising import deferring, value_of


@contextmanager
def in_memory(parameters: Sequence[Parameter], ranks: Ranks | None, source: int | None = None) -> Iterator[None]:
    """Inside, deferred `parameters` have memory. Collective where there are several ranks, on each the same parameters.

    ranks:  the run, if it has been joined. source: the rank whose values count in the end; None: every rank writes the same.
    Raises WriteError on every rank, without a source, if the ranks have written different values.
    """
    before = [value_of(parameter) for parameter in parameters]
    shells = [
        Parameter(values.clone(), requires_grad=p.requires_grad) for p, values in zip(parameters, before, strict=True)
    ]
    with ordinary(list(parameters)):
        _swap(parameters, shells)
        try:
            yield
            after = [parameter.detach().clone() for parameter in parameters]
        finally:
            _swap(parameters, shells)
    written = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    if ranks is not None and ranks.world_size > 1:
        written = ranks.any_of(written)
        _agree([values for values, new in zip(after, written, strict=True) if new], ranks, source)
    with torch.no_grad(), deferring():
        for parameter, values, new in zip(parameters, after, written, strict=True):
            if new:
                parameter.copy_(values)


def _swap(parameters: Sequence[Parameter], shells: Sequence[Parameter]) -> None:
    for parameter, shell in zip(parameters, shells, strict=True):
        torch._C._swap_tensor_impl(parameter, shell)


def _agree(written: Sequence[Tensor], ranks: Ranks, source: int | None) -> None:
    """Let what was written be the same on every rank."""
    for values in written:
        if source is not None:
            moved = values.to(ranks.device)
            ranks.broadcast(moved, source)
            values.copy_(moved)
        elif len(set(ranks.gather_numbers(zlib.crc32(as_bytes(values))))) > 1:
            raise WriteError(
                f"a weight of shape {tuple(values.shape)} that has no memory yet was written in another way on rank "
                f"{ranks.rank} than on others: the ranks would differ. Write the same on every rank, or name the rank whose "
                "values count."
            )
