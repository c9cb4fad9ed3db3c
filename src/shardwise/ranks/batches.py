"""Collectives on batches: tensors inside tuples, lists, dictionaries and model outputs.

The ranks first agree, over the control group, on what they are about to exchange (how many tensors, their shapes and
dtypes), and only then move tensors. A disagreement is therefore the same DataError on every rank, and never a hang or a
buffer overrun on one; the price is one small message between the hosts per call. Tensors travel as bytes, because gloo
and NCCL each lack some dtypes (bool, float8). This file knows the ranks but nothing of loaders, models or settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..errors import DataError
from .ranks import Ranks

Leaf = Callable[[Any], Any]


def map_leaves(function: Leaf, data: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`data` with `function` applied to each leaf; containers are rebuilt as their own type.

    Containers are tuples (named ones too), lists and mappings (`ModelOutput`, `BatchEncoding`, `defaultdict`, ...).
    is_leaf: stops the descent early where it returns True.
    """
    if is_leaf is not None and is_leaf(data):
        return function(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_leaves(function, item, is_leaf) for item in data))
    if isinstance(data, (list, tuple)):
        return type(data)(map_leaves(function, item, is_leaf) for item in data)
    if isinstance(data, Mapping):
        items = {key: map_leaves(function, value, is_leaf) for key, value in data.items()}
        if type(data) is dict or not isinstance(data, MutableMapping):  # torch.compile cannot trace a copy
            return items
        # Copying keeps what a constructor would lose: a default factory, a tokenizer's encodings, a class's fields.
        result = copy.copy(data)
        for key, value in items.items():
            result[key] = value
        return result
    return function(data)


def leaves(data: Any) -> list[Any]:
    """Every leaf of `data`, in the order in which `map_leaves` visits them."""
    found: list[Any] = []
    map_leaves(found.append, data)
    return found


def only_tensors(data: Any) -> bool:
    """True if every leaf is a tensor and there is at least one."""
    items = leaves(data)
    return bool(items) and all(isinstance(item, Tensor) for item in items)


def send_to_device(
    tensor: Any, device: torch.device | str, non_blocking: bool = False, skip_keys: str | Sequence[str] | None = None
) -> Any:
    """`tensor`, or a batch of any structure, with everything that has a `.to` moved to `device`; other leaves stay.

    skip_keys: names of entries of mappings, at any depth, that are left where they are.
    """
    skipped = {skip_keys} if isinstance(skip_keys, str) else set(skip_keys or ())

    def move(item: Any) -> Any:
        if isinstance(item, Mapping) and skipped & set(item):
            moved = {key: value if key in skipped else again(value) for key, value in item.items()}
            if type(item) is dict or not isinstance(item, MutableMapping):
                return moved
            result = copy.copy(item)
            result.update(moved)
            return result
        if isinstance(item, Tensor):  # apart, for torch.compile, which follows no try around it
            return item.to(device, non_blocking=non_blocking)
        if not _moves(item):
            return item
        try:
            return item.to(device, non_blocking=non_blocking)
        except TypeError:  # a `.to` of its own that takes only the device
            return item.to(device)

    def is_leaf(item: Any) -> bool:
        return _moves(item) or (isinstance(item, Mapping) and bool(skipped & set(item)))

    def again(item: Any) -> Any:
        return map_leaves(move, item, is_leaf)

    return again(tensor)


def _moves(item: Any) -> bool:
    return isinstance(item, Tensor) or callable(getattr(item, "to", None))


# What the ranks agree on before a collective.

Shape = tuple[int, ...]


def _shapes_over_ranks(ranks: Ranks, tensors: Sequence[Any], verb: str) -> list[list[Shape]]:
    """The shapes of `tensors` on every rank: result[rank][tensor].

    Raises DataError on every rank if one holds something that is no tensor, or the counts, dtypes or numbers of
    dimensions differ.
    """
    facts: Any
    stranger = next((item for item in tensors if not isinstance(item, Tensor)), None)
    if stranger is not None:
        facts = f"holds a {type(stranger).__name__}, which is no tensor (use gather_object for objects)"
    elif any(item.is_nested or item.layout != torch.strided for item in tensors):
        facts = "holds a sparse or nested tensor (convert it with .to_dense() or torch.nested.to_padded_tensor first)"
    else:
        facts = [(tuple(item.shape), str(item.dtype)) for item in tensors]
    table = ranks.gather_objects(facts)
    for rank, row in enumerate(table):
        if isinstance(row, str):
            raise DataError(f"{verb}: rank {rank} {row}.")
        kinds = [(len(shape), dtype) for shape, dtype in row]
        wanted = [(len(shape), dtype) for shape, dtype in table[0]]
        if kinds != wanted:
            raise DataError(
                f"{verb}: the ranks hold different tensors: rank 0 has {_say(table[0])}, rank {rank} has "
                f"{_say(row)}. Give the same number of tensors, with the same dtypes and numbers of "
                "dimensions, on every rank."
            )
    return [[shape for shape, _ in row] for row in table]


def _say(row: list[tuple[Shape, str]]) -> str:
    return ", ".join(f"{dtype.removeprefix('torch.')}{list(shape)}" for shape, dtype in row) or "no tensor"


def _same_shapes(table: list[list[Shape]], verb: str, advice: str) -> None:
    for rank, row in enumerate(table):
        if row != table[0]:
            raise DataError(
                f"{verb}: the shapes differ over the ranks: rank 0 has {[list(s) for s in table[0]]}, rank "
                f"{rank} has {[list(s) for s in row]}. {advice}"
            )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _gather_equal(ranks: Ranks, tensor: Tensor) -> Tensor:
    """(world_size * n, ...) from every rank's (n, ...), on the tensor's own device."""
    local = tensor.detach().to(ranks.device)
    rows = local.shape[0]
    whole = torch.empty((ranks.world_size * rows, *local.shape[1:]), dtype=local.dtype, device=local.device)
    if local.numel():
        ranks.all_gather(_as_bytes(whole), _as_bytes(local))
    return whole.to(tensor.device)


def gather(ranks: Ranks, data: Any) -> Any:
    """Every rank's tensors joined along dimension 0, in rank order, on every rank; a scalar gives one entry per rank.

    Raises DataError on every rank if the shapes differ; `pad_across_processes` makes them equal.
    """
    items = leaves(data)
    table = _shapes_over_ranks(ranks, items, "gather")
    _same_shapes(table, "gather", "Pad them first: pad_across_processes(tensor, dim=...).")
    return map_leaves(lambda item: _gather_equal(ranks, item.reshape(1) if item.ndim == 0 else item), data)


def gather_ragged(ranks: Ranks, data: Any) -> Any:
    """As `gather`, but each leaf becomes a list of the ranks' tensors, whose dimension 0 may differ.

    Raises DataError on every rank if another dimension differs.
    """
    items = leaves(data)
    table = _shapes_over_ranks(ranks, items, "gather_for_metrics")
    _same_shapes(
        [[shape[1:] for shape in row] for row in table],
        "gather_for_metrics",
        "Shown are the shapes without dimension 0. Pad them first: pad_across_processes(tensor, dim=1, pad_index=...).",
    )
    position = iter(range(len(items)))

    def one(item: Tensor) -> list[Tensor]:
        index = next(position)
        counts = [row[index][0] if row[index] else 1 for row in table]
        local = item.reshape(1) if item.ndim == 0 else item
        most = max(counts)
        if local.shape[0] < most:
            local = torch.cat([local, local.new_zeros((most - local.shape[0], *local.shape[1:]))])
        whole = _gather_equal(ranks, local)
        return [whole[rank * most : rank * most + count] for rank, count in enumerate(counts)]

    return map_leaves(one, data)


def gather_object(ranks: Ranks, value: Any) -> list[Any]:
    """The ranks' lists joined in rank order, on every rank; of anything else, the list of the ranks' values."""
    values = ranks.gather_objects(value)
    if all(isinstance(item, (list, tuple)) for item in values):
        return [entry for item in values for entry in item]
    return values


def reduce(ranks: Ranks, data: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """The tensors combined over the ranks elementwise, then multiplied by `scale`; `data` itself is left alone.

    reduction: "sum", "mean", "max" or "min". The mean of whole numbers is a float tensor; flags count as 0 and 1, and are
               flags again after "max" (any rank's) and "min" (all ranks') without a scale.
    Raises DataError on every rank if the shapes differ, or for the largest of complex numbers.
    """
    if reduction not in ("sum", "mean", "max", "min"):
        raise DataError(f"reduce: reduction is {reduction!r}; it can be 'sum', 'mean', 'max' or 'min'.")
    table = _shapes_over_ranks(ranks, leaves(data), "reduce")
    _same_shapes(table, "reduce", "Tensors that are combined elementwise need one shape.")
    orders = reduction in ("max", "min")
    if orders and any(item.is_complex() for item in leaves(data)):
        raise DataError(f"reduce: complex numbers have no {reduction}.")

    def one(item: Tensor) -> Tensor:
        total = item.detach().to(ranks.device, copy=True).contiguous()
        if total.dtype == torch.bool:
            total = total.to(torch.uint8 if orders else torch.int64)
        ranks.all_reduce(total, cast(Literal["sum", "max", "min"], reduction if orders else "sum"))
        if reduction == "mean":
            total = total / ranks.world_size
        total = total if scale == 1.0 else total * scale
        flags = orders and scale == 1.0 and item.dtype == torch.bool
        return total.to(device=item.device, dtype=torch.bool if flags else total.dtype)

    return map_leaves(one, data)


def broadcast(ranks: Ranks, data: Any, from_process: int = 0) -> Any:
    """Rank `from_process`'s tensors, on every rank, in the structure of `data`; `data` itself is left alone.

    Raises DataError on every rank if the shapes differ.
    """
    table = _shapes_over_ranks(ranks, leaves(data), "broadcast")
    _same_shapes(table, "broadcast", "Every rank needs tensors of the shape it is to receive.")
    return map_leaves(lambda item: broadcast_tensor(ranks, item, from_process), data)


def broadcast_tensor(ranks: Ranks, tensor: Tensor, source: int) -> Tensor:
    """Rank `source`'s tensor on every rank, as a new one. All ranks give the same shape and dtype, unchecked."""
    result = tensor.detach().to(ranks.device, copy=True).contiguous()
    if result.numel():
        flat = _as_bytes(result)
        ranks.broadcast(flat, source)
    return result.to(tensor.device)


def broadcast_object_list(ranks: Ranks, values: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite `values` with rank `from_process`'s, in place, and give it back."""
    values[:] = ranks.broadcast_object(list(values), from_process)
    return values


def pad_across_processes(
    ranks: Ranks, data: Any, dim: int = 0, pad_index: int | float = 0, pad_first: bool = False
) -> Any:
    """The tensors, padded along `dim` to the longest of any rank, so that they can be gathered.

    A tensor without that dimension stays as it is. pad_first puts the padding in front.
    """
    items = leaves(data)
    table = _shapes_over_ranks(ranks, items, "pad_across_processes")
    position = iter(range(len(items)))

    def one(item: Tensor) -> Tensor:
        index = next(position)
        if not -item.ndim <= dim < item.ndim:
            return item
        longest = max(row[index][dim] for row in table)
        missing = longest - item.shape[dim]
        if missing == 0:
            return item
        shape = list(item.shape)
        shape[dim] = missing
        padding = item.new_full(shape, pad_index)
        return torch.cat([padding, item] if pad_first else [item, padding], dim=dim)

    return map_leaves(one, data)


class UnlikeBatchesError(DataError, RuntimeError):
    """Tensors were to be joined whose shapes, dtypes or devices differ; also what torch raises then."""


class NotJoinableError(DataError, TypeError):
    """Something that has no rows was to be joined with its like."""


def concatenate(batches: Sequence[Any], dim: int = 0) -> Any:
    """Batches of one structure joined along `dim`, leaf by leaf; lists of plain objects are joined end to end.

    A single one is given back as it is, whatever it holds. Raises DataError if the structures differ or the tensors do not
    fit; also a RuntimeError for those, as torch's own, and a TypeError for what cannot be joined.
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        try:
            return torch.cat(list(batches), dim=dim)
        except (RuntimeError, TypeError) as error:
            raise UnlikeBatchesError(
                f"batches of shapes {[list(b.shape) for b in batches]} cannot be joined: {error}"
            ) from error
    if is_column(first):
        return type(first)(entry for batch in batches for entry in batch)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(concatenate(column, dim) for column in zip(*batches, strict=True)))
    if isinstance(first, (list, tuple)):
        if any(len(batch) != len(first) for batch in batches):
            raise DataError("batches of different structures cannot be joined.")
        return type(first)(concatenate(column, dim) for column in zip(*batches, strict=True))
    if isinstance(first, Mapping):
        if any(set(batch) != set(first) for batch in batches):
            raise DataError(f"batches with different keys cannot be joined: {[sorted(batch) for batch in batches]}")
        joined = {key: concatenate([batch[key] for batch in batches], dim) for key in first}
        if not isinstance(first, MutableMapping):
            return joined
        result = copy.copy(first)
        for key, value in joined.items():
            result[key] = value
        return result
    raise NotJoinableError(
        f"a batch holds a {type(first).__name__}; only tensors and lists of plain objects can be joined."
    )


def is_column(data: Any) -> bool:
    """True for a list or tuple of plain objects (texts, numbers): one entry per sample, as collators give them."""
    return (
        isinstance(data, (list, tuple))
        and not hasattr(data, "_fields")
        and len(data) > 0
        and not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in data)
    )


def slice_batch(data: Any, rows: slice) -> Any:
    """The samples `rows` of a batch: of tensors along dimension 0, and of lists of plain objects."""
    return map_leaves(
        lambda item: item[rows] if is_column(item) or (isinstance(item, Tensor) and item.ndim > 0) else item,
        data,
        is_column,
    )
