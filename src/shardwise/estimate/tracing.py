"""What a model computes in a forward and its backward, counted by running it without memory: no table of models.

    the model on the meta device, in the dtype that it computes in
        |  a mode sees every operation of the forward, and of autograd's backward
        v
    operations of each unit: matrix products, attention, and kernels that read and write memory; calls of the host

Attention is taken at `scaled_dot_product_attention`, and dropout at its own function, because what a tensor without memory does
there is not what a GPU does. Views are calls of the host alone. A number that the model asks a tensor for is 1, or True.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .activations import Batch
from .terms import Terms

# A softmax over a row that the cores' own memory cannot hold reads it for its largest, for its sum and for its result.
_LONG_ROW_NBYTES = 100_000
_NO_KERNELS = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "alias",
    "_local_scalar_dense",
}


@dataclass
class Operations:
    """What one unit does in one pass. Keys are single operations, values how many there are of them.

    products:  (floating point operations, bytes that are read and written). attention: the same.
    streams:   bytes of kernels that compute little. calls: operations that the host issues, views among them.
    around:    bytes of activations that go into products and come out of them: what kernels between them must move at least.
    """

    products: Counter[tuple[int, int]] = field(default_factory=Counter)
    attention: Counter[tuple[int, int]] = field(default_factory=Counter)
    streams: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    around: int = 0

    def add(self, other: Operations) -> None:
        self.products += other.products
        self.attention += other.attention
        self.streams += other.streams
        self.calls += other.calls
        self.around += other.around

    def products_s(self, terms: Terms) -> float:
        """Products and attention: as fast as the arithmetic, or as the memory of their operands, and a kernel's start each."""
        rates = ((self.products, terms.matrix), (self.attention, terms.attention * terms.matrix))
        return sum(
            count * (max(flops / rate, nbytes / terms.memory) + terms.kernel)
            for found, rate in rates
            for (flops, nbytes), count in found.items()
        )

    def streams_s(self, terms: Terms, *, compiled: bool) -> float:
        """All other kernels. compiled: one between two products, which reads the first's and writes the next's."""
        if not compiled:
            rate = terms.eager * terms.memory
            return sum(count * (nbytes / rate + terms.kernel) for nbytes, count in self.streams.items())
        kernels = self.products.total() + self.attention.total()
        return min(self.around / terms.memory + kernels * terms.kernel, self.streams_s(terms, compiled=False))


@dataclass
class Traced:
    """forward, backward: operations by unit; "" is what belongs to none: losses, masks, norms.

    kept:    bytes that autograd keeps for the backward, by unit. outputs: bytes of what a unit's modules give.
    """

    forward: dict[str, Operations] = field(default_factory=dict)
    backward: dict[str, Operations] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)


def trace(model: nn.Module, entries: Mapping[str, Sequence[str]], batch: Batch, dtype: torch.dtype | None) -> Traced:
    """Run `model`'s forward and backward without memory, and count.

    model:   on the meta device; a copy of it is run. entries: of each unit the paths of the modules that it runs in.
    dtype:   what weights are cast to, None for what they are.
    Raises whatever the model raises without numbers: it may take other input, or ask for what only numbers have.
    """
    model = copy.deepcopy(model).train()
    if dtype is not None:
        model = model.to(dtype)
    config: Any = model.config
    config.use_cache = False
    counting = _Counting(model, entries)
    counting.watch()
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64, device="meta")
    forward: Any = model.forward
    given = {"input_ids": ids, "labels": ids}
    with warnings.catch_warnings(), _GpuForms(counting), counting:
        warnings.simplefilter("ignore")
        with torch.autograd.graph.saved_tensors_hooks(counting.keep, lambda tensor: tensor):
            loss = forward(**given).loss
        counting.turn()
        torch.autograd.backward(loss)
    return counting.found


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds each operation to the unit whose module runs, and in a backward to the one whose gradient came last."""

    def __init__(self, model: nn.Module, entries: Mapping[str, Sequence[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Traced()
        self._model = model
        self._entries = entries
        self._weights = {p.untyped_storage()._cdata: True for p in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, Any] = {}
        self._within: list[str] = []
        self._last = ""
        self._backward = False

    def watch(self) -> None:
        """Have the modules of units say when they run, and their outputs when their gradients come. The model is a copy."""
        for unit, paths in self._entries.items():
            for path in paths:
                module: Any = self._model.get_submodule(path)
                module.forward = partial(self._run, unit, module.forward)

    def turn(self) -> None:
        """The backward begins."""
        self._backward = True

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps `tensor`; each memory counts once, weights not at all."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that no other gets its number
            self.found.kept[self._unit] = self.found.kept.get(self._unit, 0) + storage.nbytes()
        return tensor

    def attend(self, flops: int, nbytes: int) -> None:
        mine = self._mine
        mine.attention[flops, nbytes] += 1
        mine.around += nbytes
        mine.calls += 1

    def _run(self, unit: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._within.append(unit)
        try:
            out = forward(*args, **kwargs)
        finally:
            self._within.pop()
        first, *rest = out if isinstance(out, tuple) else (out,)
        if not isinstance(first, Tensor):
            return out
        self.found.outputs[unit] = self.found.outputs.get(unit, 0) + first.nbytes
        mark: Any = _Mark.apply
        first = mark(first, unit, self)
        return (first, *rest) if isinstance(out, tuple) else first

    def reach(self, unit: str) -> None:
        """The backward comes to a unit."""
        self._last = unit

    @property
    def _unit(self) -> str:
        return self._last if self._backward else self._within[-1] if self._within else ""

    @property
    def _mine(self) -> Operations:
        return (self.found.backward if self._backward else self.found.forward).setdefault(self._unit, Operations())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        out = func(*args, **kwargs)
        mine, name = self._mine, func._overloadpacket.__name__
        mine.calls += 1
        if name in _NO_KERNELS or func.is_view:
            return out
        inputs = list(_tensors((args, tuple(kwargs.values()))))
        nbytes = sum(_nbytes(tensor) for tensor in (*inputs, *_tensors(out)))
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            mine.products[int(counted(*args, **kwargs, out_val=out)), nbytes] += 1
            mine.around += nbytes - sum(_nbytes(tensor) for tensor in inputs if self._is_weight(tensor))
            return out
        if name == "_log_softmax" and _row_nbytes(out) > _LONG_ROW_NBYTES:
            nbytes += 2 * _nbytes(args[0])
        elif name == "_log_softmax_backward_data" and _row_nbytes(out) > _LONG_ROW_NBYTES:
            nbytes += _nbytes(args[0])
        elif name == "embedding":
            nbytes = 2 * _nbytes(out)  # the rows that are looked up
        mine.streams[nbytes] += 1
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights


class _GpuForms(TorchFunctionMode):
    """Gives attention and dropout the forms that they have on a GPU."""

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value, *rest = args
            causal = kwargs.get("is_causal", rest[2] if len(rest) > 2 else False)
            attend: Any = _Attention.apply
            return attend(query, key, value, bool(causal), self._counting)
        if func is torch.nn.functional.dropout:
            x, p = args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            return torch.native_dropout(x, float(p), True)[0] if training and p > 0 else x
        return func(*args, **kwargs)


class _Mark(torch.autograd.Function):
    """What a unit gives, as it is; says when its gradient has come."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, unit: str, counting: _Counting) -> Tensor:
        ctx.unit, ctx.counting = unit, counting
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.counting.reach(ctx.unit)
        return *grads, None, None


class _Attention(torch.autograd.Function):
    """Of (batch, heads, n, d) and (batch, heads, m, d): two products forward, five backward; causal: half of each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, counting: _Counting) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.counting = counting
        rows = math.prod(query.shape[:-1])
        ctx.flops = 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1]) // (2 if causal else 1)
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.nbytes = query.nbytes + key.nbytes + value.nbytes + out.nbytes
        counting.attend(ctx.flops, ctx.nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        ctx.counting.attend(5 * ctx.flops // 2, 2 * ctx.nbytes)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _nbytes(tensor: Tensor) -> int:
    """Bytes in memory: a dimension that is only expanded has none of its own."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.itemsize


def _row_nbytes(tensor: Tensor) -> int:
    return tensor.shape[-1] * tensor.itemsize if tensor.ndim else 0
