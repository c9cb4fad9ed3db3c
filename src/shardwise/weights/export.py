"""Full weights to the files that transformers, PEFT and diffusers read: safetensors, in parts, with an index.

Tensors that share memory (tied weights) are written once, under the first name, and the metadata says which names they
also go by. A file is written under another name and then renamed, so that a kill leaves no half file. What is in memory is
the tensor being written: the caller brings one after another, and need not have them all.
This file knows nothing of ranks: the caller writes on one of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files import disk
from ..files.writer import Spec, TensorFile

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "10GB" or "512MiB". Raises ConfigError."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(
            f"max_shard_size is {size!r}; write a number of bytes, or a number with KB, MB, GB, KiB, MiB or GiB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def without_shared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with each stretch of memory once, contiguous, and the other names: {left out: kept}.

    Only tensors of one shape that are the very same memory count as shared; a view of a part is written as a copy.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        kept[name] = tensor.contiguous()
        if kept[name].untyped_storage().nbytes() != kept[name].nbytes:
            kept[name] = kept[name].clone()  # a view would drag its whole storage into the file
    return kept, aliases


T = TypeVar("T", Tensor, Spec)


def split_by_size(tensors: Mapping[str, T], limit: int) -> list[dict[str, T]]:
    """The tensors in order, in parts of at most `limit` bytes; a larger tensor is a part of its own."""
    parts: list[dict[str, T]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if parts[-1] and used + tensor.nbytes > limit:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += tensor.nbytes
    return parts


class WeightFiles:
    """safetensors files of one model being written, tensor by tensor, in any order: one file, or parts and an index.

    specs:   every tensor, in the order in which they will mostly come. aliases: {another name: name in specs}.
    Nothing has its final name before `finish`. Raises CheckpointError for a tensor without elements.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        specs: Sequence[Spec],
        *,
        max_shard_size: int | str = "10GB",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._aliases = dict(aliases or {})
        _check_folder(self.folder)
        parts = split_by_size({spec.name: spec for spec in specs}, parse_size(max_shard_size))
        self._names = part_names("model", ".safetensors", len(parts))
        self._parts = [list(part.values()) for part in parts]
        self._home = {name: number for number, part in enumerate(parts) for name in part}
        self._left = [len(part) for part in parts]
        self._open: dict[int, TensorFile] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; a part is closed when its last one is there."""
        number = self._home[name]
        if number not in self._open:
            self._open[number] = TensorFile(self._partial(number), self._parts[number], self._aliases)
        self._open[number].write(name, tensor)
        self._left[number] -= 1
        if self._left[number] == 0:
            self._open.pop(number).close()

    def finish(self) -> list[Path]:
        """Give all files their names, write the index, remove parts of an earlier save. The disk."""
        for file in self._open.values():
            file.close()  # raises: something announced was not written
        written = [self.folder / name for name in self._names]
        for number, path in enumerate(written):
            disk.move_over(self._partial(number), path)
        total = sum(spec.nbytes for part in self._parts for spec in part)
        where = {name: self._names[number] for name, number in self._home.items()}
        return _finish("model", ".safetensors", written, where, {"total_size": total, **self._aliases})

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._open.values():
            file.discard()
        for number in range(len(self._names)):
            disk.remove(self._partial(number))

    def _partial(self, number: int) -> Path:
        return self.folder / (self._names[number] + ".partial")


def part_names(stem: str, suffix: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}{suffix}"]
    return [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"cannot save to {folder}: it is a file, not a directory.")
    folder.mkdir(parents=True, exist_ok=True)


def _finish(stem: str, suffix: str, written: list[Path], where: dict[str, str], facts: dict[str, Any]) -> list[Path]:
    """Write the index if there are parts, and remove what an earlier save has left: an index must not find old parts."""
    folder = written[0].parent
    index = folder / f"{stem}{suffix}.index.json"
    for old in folder.glob(f"{stem}-*-of-*{suffix}"):
        if old not in written:
            old.unlink()
    if len(written) == 1:
        index.unlink(missing_ok=True)
        return written
    (folder / f"{stem}{suffix}").unlink(missing_ok=True)
    partial = index.with_name(index.name + ".partial")
    disk.write_text(partial, json.dumps({"metadata": facts, "weight_map": where}, indent=2, sort_keys=True) + "\n")
    disk.move_over(partial, index)
    return [*written, index]


def save_weights(
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> list[Path]:
    """Write `tensors` below `folder` and give the files: one, or numbered parts and their index.

    safe_serialization: model.safetensors; else pytorch_model.bin.
    Raises CheckpointError for a tensor without elements.
    """
    kept, aliases = without_shared(tensors)
    refuse_empty(kept)
    if safe_serialization:
        specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()]
        weights = WeightFiles(folder, specs, max_shard_size=max_shard_size, aliases=aliases)
        try:
            for name, tensor in kept.items():
                weights.write(name, tensor)
            return weights.finish()
        except BaseException:
            weights.abandon()
            raise
    target = Path(folder)
    _check_folder(target)
    parts = split_by_size(kept, parse_size(max_shard_size))
    names = part_names("pytorch_model", ".bin", len(parts))
    written = [target / name for name in names]
    for path, part in zip(written, parts, strict=True):
        partial = path.with_name(path.name + ".partial")
        # Pickles can say that names share memory, so a reader of the whole file finds all of them.
        shared = {name: part[first] for name, first in aliases.items() if first in part}
        torch.save({**part, **shared}, partial)
        partial.replace(path)
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    where |= {name: where[first] for name, first in aliases.items()}
    total = sum(tensor.nbytes for tensor in kept.values())
    return _finish("pytorch_model", ".bin", written, where, {"total_size": total, **aliases})


def refuse_empty(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor without elements: in a file it would be an adapter of 40 bytes."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{name} has no elements (shape {tuple(tensor.shape)}): it is not written. A sharded weight looks like "
                "that; save through the accelerator or model.save_pretrained."
            )
