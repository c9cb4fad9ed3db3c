"""A prepared model to files, one unit at a time: no rank ever holds the model, rank 0 writes as the units come by.

The names, shapes and dtypes are known without gathering anything, so the files' headers are written first. Every rank goes
through all units, whatever happens on rank 0: an error there waits for the end and is then everybody's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..zero.collectives import attempt
from ..zero.sharded import ShardedModel
from .export import WeightFiles
from .tensor_file import Spec


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
    error: Exception | None = None
    weights: WeightFiles | None = None
    named = _names(model, rename)

    def open_files() -> WeightFiles:
        specs = [
            Spec(names[0], _cast(member.dtype, dtype), member.shape)
            for member in model.whole.members()
            if (names := named.get(member.name))
        ]
        buffers = [Spec(name, _cast(b.dtype, dtype), tuple(b.shape)) for name, b in _buffers(model, rename)]
        aliases = {other: names[0] for names in named.values() for other in names[1:]}
        return WeightFiles(folder, [*specs, *buffers], max_shard_size=max_shard_size, aliases=aliases)

    main = model.ranks.rank == 0 and here
    if main:
        weights, error = attempt(open_files)
    # Nobody gathers a model for files that cannot be opened.
    model.ranks.agree(error)

    def write(name: str, give: Callable[[], Tensor]) -> None:
        assert weights is not None
        tensor = give().to("cpu")
        weights.write(name, tensor.to(_cast(tensor.dtype, dtype)))

    for name, give in model.whole.stream(lambda name: bool(named.get(name))):
        if main and error is None and give is not None:
            _, error = attempt(lambda: write(named[name][0], give))  # noqa: B023 - called at once

    def finish() -> list[Path]:
        assert weights is not None
        for name, buffer in _buffers(model, rename):
            write(name, buffer.detach)
        return weights.finish()

    written: list[Path] | None = []
    if main and error is None:
        written, error = attempt(finish)
    if error is not None and weights is not None:
        weights.abandon()
    model.ranks.agree(error)
    return written or []


def _cast(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point and own.itemsize > 1 else own


def _names(model: ShardedModel, rename: Callable[[str], str | None]) -> dict[str, list[str]]:
    """The engine's name of each parameter -> the names in the files, the one it is written under first."""
    firsts = {id(p): name for name, p in model.model.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        new = rename(name)
        if new is not None:
            found.setdefault(firsts[id(parameter)], []).append(new)
    return found


def _buffers(model: ShardedModel, rename: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                new = rename(f"{prefix}.{name}" if prefix else name)
                if new is not None:
                    yield new, buffer
