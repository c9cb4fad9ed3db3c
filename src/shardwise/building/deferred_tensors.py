"""What a tensor without memory is between the block that it was built in and `prepare`: it still records what is done to it.

    a write (zero_, copy_, w[3:5] = 0, .data =)   one more entry of the record, replayed at prepare
    a view, a cast, a copy                        without memory too, with a record
    anything else that reads it                   its values are made for that call: a real result
    a backward through what was read              an error, since no engine would take the gradients

torch gives meta tensors nothing for a write, and no error. So their class is swapped for a subclass that sees each call, as
`zero.guard` does with released weights, and swapped back at prepare. Reading every weight so is slow, and right: nothing is
kept of what was read.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..errors import PrepareError
from ..zero.flat import give_memory
from ..zero.guard import METADATA
from ..zero.sources import Source
from .assigning import DATA_SETTER, exchange
from .initialising import (
    FACTORIES,
    deferring,
    is_deferred,
    is_deferring,
    note,
    source_of,
    value_of,
    with_values,
    written_by,
)
from .recording import CPU, tensors_in

aten = torch.ops.aten

_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
# Modules of torch whose functions do nothing for a tensor on the meta device: for them it is none.
_PASSING_META_BY = ("torch.nn.init", "torch.nn.modules.module")
_ANSWERED = METADATA - {Tensor.type, Tensor.backward}
# What leaves torch is given in memory of its own.
_ARRAYS = (Tensor.numpy, Tensor.__array__)
_LEAVING = (*_ARRAYS, Tensor.tolist, Tensor.__reduce_ex__)
# Operations whose result has no memory either.
_COPIES = (aten._to_copy.default, aten.clone.default, aten.cat.default, aten.stack.default)
# Writes that no record can hold: of another size, and those that torch does not dispatch.
_UNRECORDED = (Tensor.resize_, Tensor.resize_as_, Tensor.apply_, Tensor.map_, Tensor.map2_)


class Deferred:
    """Mixed in before the class of a tensor that has no memory yet."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == _IS_META and sys._getframe(1).f_globals.get("__name__") in _PASSING_META_BY:
                return not is_deferred(args[0])
            if func in _ANSWERED or is_deferring():
                return func(*args, **kwargs)
            if func == DATA_SETTER:
                return _set_data(*args)
            if func == Tensor.backward:
                _refuse_backward()
            if func in _UNRECORDED and is_deferred(args[0]):
                _refuse_write(func.__name__, args[0])
            if func in _LEAVING:
                found = func(*tree_map(with_values, args), **tree_map(with_values, kwargs))
                if func in _ARRAYS:
                    found.flags.writeable = False  # a write would be lost
                return found
            with _Recording():  # type: ignore[no-untyped-call]
                found = func(*args, **kwargs)
            _watch_results(found)
            if func == Tensor.detach and sys._getframe(1).f_globals.get("__name__") == "torch.nn.parameter":
                found.__class__ = type(args[0])  # Parameter(w) insists on it
            return found


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations of one call that has a deferred tensor among its arguments."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in FACTORIES:
            # Someone who works on such tensors makes new ones where they are.
            device = kwargs.get("device") or (args[0].device if args and isinstance(args[0], Tensor) else CPU)
            where = CPU if torch.device(device).type == "meta" else device
            return func(*tree_map(_shell, args), **{**kwargs, "device": where})
        if not any(is_deferred(tensor) for tensor in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        changed = written_by(func, args, kwargs)
        if any(tensor.is_meta for tensor in changed):
            return note(func, args, kwargs, changed)
        to_device = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta"
        if (func in _COPIES and not to_device) or _is_view(func):
            return note(func, args, kwargs, changed)
        result = func(*tree_map(with_values, args), **tree_map(with_values, kwargs))
        return changed[0] if changed and isinstance(result, Tensor) else result


def _is_view(func: OpOverload) -> bool:
    return any(found.alias_info is not None for found in func._schema.returns)


def _shell(item: Any) -> Any:
    """For a factory's example: a real tensor of its shape, which is not looked at."""
    if isinstance(item, Tensor) and item.is_meta:
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=CPU)
    return item


def _set_data(target: Tensor, values: Tensor) -> None:
    """`target.data = values`."""
    if target.is_meta is values.is_meta:
        DATA_SETTER(target, values)
    else:
        exchange(target, values)
    _sort(target)


def _watch_results(found: Any) -> None:
    for tensor in tensors_in(found):
        if is_deferred(tensor):
            _watch(tensor)
        elif tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(_refuse_backward)  # type: ignore[no-untyped-call]


def _refuse_backward(*grads: Any) -> NoReturn:
    raise PrepareError(
        "a backward through a weight that has no memory yet: before prepare (or deepspeed.initialize) such weights can be "
        "read and written, and not trained. Prepare the model first."
    )


def _refuse_write(name: str, tensor: Tensor) -> NoReturn:
    raise PrepareError(
        f"{name} of a weight that has no memory yet, of shape {tuple(tensor.shape)}, cannot be recorded. Assign what it is to "
        "be to .data."
    )


# Which tensors are of these classes.


_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def _deferred_class(cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type("Deferred" + cls.__name__, (Deferred, cls), {"__slots__": ()})
    return _classes[cls]


def _watch(tensor: Tensor) -> None:
    if not isinstance(tensor, Deferred):
        tensor.__class__ = _deferred_class(type(tensor))


def _leave(tensor: Tensor) -> None:
    if isinstance(tensor, Deferred):
        cls = type(tensor).__mro__[2]
        # torch makes no Parameter of another class's tensor, but one of that class that says it is one.
        tensor.__class__ = Parameter if cls is Tensor and getattr(tensor, "_is_param", False) else cls


def _sort(tensor: Tensor) -> None:
    """Give it the class of those with memory or without, whichever it is."""
    _watch(tensor) if is_deferred(tensor) else _leave(tensor)


@contextmanager
def deferring_until_prepare(*, gpu: bool = False) -> Iterator[None]:
    """As `deferring`; and what was made without memory inside records what is done to it afterwards too."""
    if is_deferring():
        yield
        return
    try:
        with deferring(gpu=gpu):
            yield
    finally:
        # Whoever holds them: parameters, buffers, what a script has kept.
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                _sort(item)


@contextmanager
def ordinary(parameters: list[Parameter]) -> Iterator[None]:
    """Inside, `parameters` are of their own classes; at the end those that have no memory are deferred again."""
    for parameter in parameters:
        _leave(parameter)
    try:
        yield
    finally:
        for parameter in parameters:
            _sort(parameter)


# At prepare.


def sources_of(model: nn.Module) -> dict[int, Source]:
    """The source of every parameter of `model` that has no memory, by id; its buffers without memory get theirs.

    The parameters are of their own classes again, and what is done to them from here on is the engine's matter.

    Raises PrepareError for one whose values nobody knows.
    """
    found: dict[int, Source] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            if not is_deferred(parameter):
                raise PrepareError(
                    f"{name} is on the meta device and has no values. Load the model inside `with accelerator.init():`, "
                    "or, if it was, change its weights there too (dtype, copies, own initialisation): outside of it "
                    "nothing can be done to weights that have no memory yet."
                )
            if parameter.numel():
                found[id(parameter)] = source_of(parameter)
            else:
                give_memory(parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if not is_deferred(buffer):
                    raise PrepareError(
                        f"buffer {prefix + '.' if prefix else ''}{name} is on the meta device and has no values. Load or "
                        "build the model inside `with accelerator.init():`."
                    )
                module._buffers[name] = value_of(buffer)
    for parameter in model.parameters():
        _leave(parameter)
    return found


@contextmanager
def deferred_if_it_fails(model: nn.Module) -> Iterator[None]:
    """Around a prepare: when it fails, what has no memory yet goes on recording."""
    try:
        yield
    except BaseException:
        for parameter in model.parameters():
            _sort(parameter)
        raise
