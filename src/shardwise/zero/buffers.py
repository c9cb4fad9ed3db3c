"""A model's buffers: on every rank rank 0's, whatever their dtype and layout, and in a form that files can hold.

A buffer is a few plain tensors. They are sent as bytes, because gloo and NCCL each lack some dtypes.

    strided                 its elements; those that repeat (stride 0) once
    sparse COO              indices, values
    sparse CSR CSC BSR BSC  compressed indices, plain indices, values
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PrepareError
from ..ranks.ranks import Ranks

_COMPRESSED = {
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices),
}
_LAYOUTS = {str(layout): layout for layout in (torch.strided, torch.sparse_coo, *_COMPRESSED)}


def named_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name in the model, the module that has it, its name there, the buffer); what several modules have comes for each."""
    # The order of `named_modules`, whose generators take each name through every level above it.
    seen: set[int] = set()
    coming: list[tuple[str, nn.Module]] = [("", model)]
    while coming:
        prefix, module = coming.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield f"{prefix}{name}", module, name, buffer
        if module._modules:
            inner = [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
            coming += reversed(inner)


def replace_buffers(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Exchange buffers, by id; what several modules have stays one object."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if id(buffer) in new:
                module._buffers[name] = new[id(buffer)]


# One buffer in its parts.


def parts_of(buffer: Tensor) -> list[Tensor]:
    """The plain tensors that `buffer` consists of, in its own memory. Raises TypeError for one of another kind."""
    if is_strided(buffer):
        return [_once(buffer)]
    if buffer.layout == torch.sparse_coo:
        return [buffer._indices(), buffer._values()]
    if buffer.layout in _COMPRESSED:
        return [*(indices(buffer) for indices in _COMPRESSED[buffer.layout]), buffer.values()]
    kind = "quantised" if buffer.is_quantized else "nested" if buffer.is_nested else str(buffer.layout)
    raise TypeError(f"is a {type(buffer).__name__} of a kind without plain parts ({kind})")


def is_strided(buffer: Tensor) -> bool:
    """Whether it is nothing but elements at strides."""
    several = hasattr(buffer, "__tensor_flatten__") or buffer.is_nested or buffer.is_quantized
    return buffer.layout == torch.strided and not several


def _of_parts(layout: torch.layout, shape: tuple[int, ...], parts: list[Tensor], coalesced: bool) -> Tensor:
    if layout == torch.strided:
        return parts[0].expand(shape)
    if layout == torch.sparse_coo:
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
    compressed, plain, values = parts
    return torch.sparse_compressed_tensor(compressed, plain, values, shape, layout=layout, check_invariants=True)


def _once(buffer: Tensor) -> Tensor:
    """The elements of a strided tensor, those that repeat only once: a view that can be written."""
    repeat = [size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)]
    return buffer[tuple(slice(1) if once else slice(None) for once in repeat)] if any(repeat) else buffer


def bytes_of(part: Tensor) -> Tensor:
    """The bytes of a plain tensor, 1-d: its own memory where it is contiguous."""
    return part.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def packed(buffer: Tensor, plain: Container[torch.dtype]) -> Tensor | dict[str, Any]:
    """`buffer` itself where it is strided and of a `plain` dtype, else what it is made of, as texts, numbers and bytes."""
    if buffer.layout == torch.strided and buffer.dtype in plain:
        return buffer
    return {
        "layout": str(buffer.layout),
        "shape": list(buffer.shape),
        "coalesced": buffer.layout == torch.sparse_coo and buffer.is_coalesced(),
        "parts": [
            {"shape": list(part.shape), "dtype": str(part.dtype).removeprefix("torch."), "bytes": bytes_of(part)}
            for part in parts_of(buffer)
        ],
    }


def unpacked(found: Tensor | Mapping[str, Any]) -> Tensor:
    """What was packed."""
    if isinstance(found, Tensor):
        return found
    parts = [part["bytes"].view(getattr(torch, part["dtype"])).view(part["shape"]) for part in found["parts"]]
    return _of_parts(_LAYOUTS[found["layout"]], tuple(found["shape"]), parts, found["coalesced"])


@torch.no_grad()
def written(buffer: Tensor, value: Tensor) -> Tensor:
    """`buffer` with the content of `value`, of its shape: in its own memory where it is strided, else a new one."""
    if buffer.layout != torch.strided:
        return value.to(buffer.device, buffer.dtype, copy=True)
    own = _once(buffer)
    whole = value if value.layout == torch.strided else value.to_dense()
    own.copy_(whole[tuple(slice(size) for size in own.shape)])
    return buffer


# All of a model.


@dataclass(frozen=True)
class _Described:
    """What the ranks tell each other of a buffer. parts: shape and dtype of each."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout
    coalesced: bool
    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    def __str__(self) -> str:
        layout = "" if self.layout == torch.strided else f" {self.layout}"
        return f"{self.name} {self.shape} {self.dtype}{layout}"


@torch.no_grad()
def place_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Move every buffer to the device and give it rank 0's values: in its own memory, if it is strided and on the device.

    Collective. Raises PrepareError on every rank if buffers differ in name, shape, dtype or layout, or cannot be sent.
    """
    held = {id(buffer): (name, buffer) for name, _, _, buffer in named_buffers(model)}
    placed = {key: _moved(buffer, ranks.device) for key, (_, buffer) in held.items()}
    if ranks.world_size > 1:
        mine = ranks.together(lambda: [_describe(held[key][0], buffer) for key, buffer in placed.items()])
        told: list[_Described] = ranks.broadcast_object(mine)
        ranks.together(lambda: _compare(mine, told, ranks.rank))
        placed = {
            key: _from_first(buffer, entry, ranks) for (key, buffer), entry in zip(placed.items(), told, strict=True)
        }
    replace_buffers(model, placed)


def _moved(buffer: Tensor, device: torch.device) -> Tensor:
    if buffer.device == device or not is_strided(buffer):
        return buffer.to(device)
    once = _once(buffer)
    return once.to(device).expand(buffer.shape) if once is not buffer else buffer.to(device)


def _describe(name: str, buffer: Tensor) -> _Described:
    try:
        parts = parts_of(buffer)
        for part in parts:
            bytes_of(part[:0] if part.ndim else part)
    except (TypeError, RuntimeError) as error:
        raise PrepareError(
            f"the buffer {name} cannot be sent to the other ranks: it {error}. Keep it as a plain tensor, or outside of the "
            "model's buffers."
        ) from error
    coalesced = buffer.layout == torch.sparse_coo and buffer.is_coalesced()
    made_of = tuple((tuple(part.shape), part.dtype) for part in parts)
    return _Described(name, tuple(buffer.shape), buffer.dtype, buffer.layout, coalesced, made_of)


def _compare(mine: Sequence[_Described], told: Sequence[_Described], rank: int) -> None:
    for own, first in zip_longest(mine, told):
        if str(own) != str(first):
            raise PrepareError(
                f"the buffers of the ranks differ: rank {rank} has {own or 'no more'}, rank 0 has {first or 'no more'}. Build "
                "the same model in the same way on every rank."
            )


def _from_first(buffer: Tensor, told: _Described, ranks: Ranks) -> Tensor:
    """`buffer` with rank 0's content. Its parts may have other sizes here: sparse ones, and what repeats on one rank only."""
    own = parts_of(buffer)
    fits = [(tuple(part.shape), part.dtype) for part in own] == list(told.parts)
    if not fits:
        own = [torch.empty(shape, dtype=dtype, device=ranks.device) for shape, dtype in told.parts]
    for part in own:
        flat = bytes_of(part)
        if flat.numel():
            ranks.broadcast(flat)
        if ranks.rank and flat.data_ptr() != part.data_ptr():
            part.copy_(flat.view(part.dtype).view(part.shape))
    if fits and buffer.layout == torch.strided:
        return buffer
    return buffer if ranks.rank == 0 else _of_parts(told.layout, told.shape, own, told.coalesced)
