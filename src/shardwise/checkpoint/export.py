"""Full weights to the files that transformers, PEFT and diffusers read: safetensors, in parts, with an index.

Tensors that share memory (tied weights) are written once, under the first name, and the metadata says which names they
also go by. A file is written under another name and then renamed, so that a kill leaves no half file.
This file knows nothing of ranks: the caller has full tensors and writes on one of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError

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


def split_by_size(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in order, in parts of at most `limit` bytes; a larger tensor is a part of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if parts[-1] and used + tensor.nbytes > limit:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += tensor.nbytes
    return parts


def save_weights(
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> list[Path]:
    """Write `tensors` below `folder` and give the files: one, or numbered parts and their index.

    safe_serialization: model.safetensors; else pytorch_model.bin.
    Parts of an earlier save that this one does not overwrite are removed: an index must not find old parts.
    """
    target = Path(folder)
    if target.is_file():
        raise ConfigError(f"cannot save to {target}: it is a file, not a directory.")
    target.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", ".safetensors") if safe_serialization else ("pytorch_model", ".bin")
    kept, aliases = without_shared(tensors)
    parts = split_by_size(kept, parse_size(max_shard_size))
    names = [f"{stem}{suffix}"]
    if len(parts) > 1:
        names = [f"{stem}-{number:05d}-of-{len(parts):05d}{suffix}" for number in range(1, len(parts) + 1)]
    written = [target / name for name in names]
    for path, part in zip(written, parts, strict=True):
        partial = path.with_name(path.name + ".partial")
        if safe_serialization:
            save_file(part, partial, metadata={"format": "pt", **aliases})
        else:
            # Pickles can say that names share memory, so a reader of the whole file finds all of them.
            shared = {name: part[first] for name, first in aliases.items() if first in part}
            torch.save({**part, **shared}, partial)
        partial.replace(path)
    index = target / f"{stem}{suffix}.index.json"
    for old in target.glob(f"{stem}-*-of-*{suffix}"):
        if old not in written:
            old.unlink()
    if len(parts) > 1:
        (target / f"{stem}{suffix}").unlink(missing_ok=True)
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        where |= {} if safe_serialization else {name: where[first] for name, first in aliases.items()}
        total = sum(tensor.nbytes for tensor in kept.values())
        text = json.dumps({"metadata": {"total_size": total, **aliases}, "weight_map": where}, indent=2, sort_keys=True)
        partial = index.with_name(index.name + ".partial")
        partial.write_text(text + "\n")
        partial.replace(index)
        return [*written, index]
    index.unlink(missing_ok=True)
    return written
