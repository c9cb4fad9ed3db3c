"""A prepared model to files, one unit at a time: no rank ever holds the model, rank 0 writes as the units come by.

The names, shapes and dtypes are known without gathering anything, so the files' headers are written first. Every rank goes
through all units, whatever happens on rank 0: an error there waits for the end and is then everybody's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files.writer import Spec
from ..ranks.agreeing import FirstError
from ..zero.sharded import ShardedModel
from ..zero.whole import persistent_buffers
from .export import WeightFiles


def save_streamed(
    model: ShardedModel,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str | None] = lambda name: name,
    here: bool = True,
) -> list[Path]:
    """Write the model's state dict below `folder` as safetensors, on rank 0; the files (elsewhere an empty list).

    dtype:  floating weights are written in it; None writes trained ones as the user gave them and frozen ones as they
            compute.
    rename: name in the model -> name in the files, or None to leave it out.
    here:   False on rank 0 writes nothing: the script says that it is not a main process.
    Tied weights are written once. Collective; an error is raised on every rank. Raises PrepareError for a quantised base.
    """
    model.refuse_whole_state()
    named, others = _names(model, rename)
    buffers, shared = _buffers(model, rename)
    local = {**others, **buffers}

    def open_files() -> WeightFiles:
        specs = [
            Spec(names[0], _cast(member.dtype, dtype), member.shape)
            for member in model.whole.members()
            if (names := named.get(member.name))
        ]
        specs += [Spec(name, _cast(b.dtype, dtype), tuple(b.shape)) for name, b in local.items()]
        aliases = {**shared, **{other: names[0] for names in named.values() for other in names[1:]}}
        return WeightFiles(folder, specs, max_shard_size=max_shard_size, aliases=aliases)

    first = FirstError()
    weights = first.attempt(open_files) if model.ranks.rank == 0 and here else None
    # Nobody gathers a model for files that cannot be opened.
    model.ranks.agree(first.error)

    def write(name: str, give: Callable[[], Tensor]) -> None:
        assert weights is not None
        tensor = give().to("cpu")
        weights.write(name, tensor.to(_cast(tensor.dtype, dtype)))

    for name, give in model.whole.stream(lambda name: bool(named.get(name))):
        if weights is not None and give is not None:
            first.attempt(lambda: write(named[name][0], give))  # noqa: B023 - called at once

    def finish() -> list[Path]:
        assert weights is not None
        for name, tensor in local.items():
            write(name, tensor.detach)
        return weights.finish()

    written = first.attempt(finish) if weights is not None else []
    if first.error is not None and weights is not None:
        weights.abandon()
    model.ranks.agree(first.error)
    return written or []


def _cast(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point and own.itemsize > 1 else own


def _names(model: ShardedModel, rename: Callable[[str], str | None]) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """The engine's name of each parameter -> the names in the files, the one it is written under first.

    And by name in the files those that came after the model was prepared: they are whole.
    """
    members = {id(member.parameter): member.name for member in model.whole.members()}
    found: dict[str, list[str]] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        new = rename(name)
        if new is None:
            continue
        if id(parameter) in members:
            found.setdefault(members[id(parameter)], []).append(new)
        elif parameter.numel():
            others[new] = parameter
    return found, others


def _buffers(model: ShardedModel, rename: Callable[[str], str | None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The buffers by their names in the files, each tensor once, and {other name of one: the name it is written under}."""
    found: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, buffer in persistent_buffers(model.model, every_name=True).items():
        new = rename(name)
        if new is None:
            continue
        if first.setdefault(id(buffer), new) == new:
            found[new] = buffer
        else:
            aliases[new] = first[id(buffer)]
    return found, aliases
