"""What an optimizer keeps of a parameter that is neither a number nor a plain tensor, but made of them.

    Shampoo   [rows (8, 8), columns (512, 512)]         containers: lists, tuples, dictionaries, deques
    GaLore    Projector(rank=2, basis=(8, 2))           objects of a class of the optimizer's own package
    torchao   OptimState8bit(codes, scale)              tensors that wrap others, and say so by torch's `__tensor_flatten__`

All go with whole parameters. Here they are walked, moved, and put into plain data for a checkpoint and back, without pickle: a
class is looked up among what the optimizer's package has imported, and of its code only `__tensor_unflatten__` is run.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CheckpointError

_KIND = "kept"
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_DICTIONARIES = (dict, OrderedDict, defaultdict)
_DEEPEST = 8


def is_wrapper(value: Any) -> bool:
    """Whether it is a tensor that is made of others: it has a parameter's shape, and no number for each element."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def packages_of(optimizer: Any) -> set[str]:
    """Whose classes an optimizer may keep objects of: its own package, and those of the classes that it derives from."""
    return {cls.__module__.split(".")[0] for cls in type(optimizer).__mro__} - {"torch", "builtins"}


def cannot_keep(value: Any, packages: set[str], depth: int = _DEEPEST) -> str | None:
    """The class of what is in `value` and neither tensor, number, container nor an object of these; None if nothing is."""
    if isinstance(value, (*_NUMBERS, torch.dtype, torch.device)) or (
        isinstance(value, Tensor) and not is_wrapper(value)
    ):
        return None
    kind = type(value)
    known = isinstance(value, (list, tuple, deque, set, *_DICTIONARIES)) or is_wrapper(value) or _is_object(value)
    own = kind.__module__.split(".")[0] in packages
    if not known or not depth or not (own or kind.__module__ in ("builtins", "collections", "torch")):
        return kind.__name__
    return next((found for _, part in _parts(value) if (found := cannot_keep(part, packages, depth - 1))), None)


def pieces(value: Any, words: str) -> Iterator[tuple[str, Any]]:
    """(words, value) of every number and plain tensor in `value`."""
    if isinstance(value, _NUMBERS) or (isinstance(value, Tensor) and not is_wrapper(value)):
        yield words, value
        return
    for name, part in _parts(value):
        yield from pieces(part, f"{words}{name}")


def nbytes_of(value: Any) -> int:
    """Bytes of the tensors in `value`; numbers are none."""
    return sum(leaf.nbytes for _, leaf in pieces(value, "") if isinstance(leaf, Tensor))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy in which every plain tensor is what `change` gives for it."""
    if isinstance(value, Tensor) and not is_wrapper(value):
        return change(value)
    return _rebuilt(value, [mapped(part, change) for _, part in _parts(value)])


def packed(value: Any) -> Any:
    """As numbers, texts, containers and plain tensors, for a checkpoint.

    Of a tensor the order of its dimensions in memory goes with it: products of matrices have other last bits in another.
    """
    if isinstance(value, Tensor) and not is_wrapper(value) and not value.is_contiguous():
        order = sorted(range(value.ndim), key=lambda dim: value.stride()[dim], reverse=True)
        return {_KIND: "permuted", "order": order, "values": value.permute(order).contiguous()}
    if isinstance(value, _NUMBERS) or (isinstance(value, Tensor) and not is_wrapper(value)):
        return value
    if isinstance(value, torch.dtype):
        return {_KIND: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {_KIND: "device", "name": str(value)}
    if is_wrapper(value):
        wrapper: Any = value
        names, context = wrapper.__tensor_flatten__()
        inner = {name: packed(getattr(value, name)) for name in names}
        shape = {"size": list(value.size()), "stride": list(value.stride())}
        return {_KIND: "wrapper", "class": _path(value), "inner": inner, "context": packed(context), **shape}
    if type(value) is deque:
        return {_KIND: "deque", "items": [packed(item) for item in value], "maxlen": value.maxlen}
    if type(value) is dict and _KIND not in value:
        return {name: packed(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(packed(item) for item in value)
    if _is_object(value):
        return {_KIND: "object", "class": _path(value), "fields": {n: packed(v) for n, v in vars(value).items()}}
    return value


def unpacked(value: Any, packages: set[str]) -> Any:
    """What was `packed`. packages: whose classes may be made. Raises CheckpointError for others."""
    if type(value) in (list, tuple):
        return type(value)(unpacked(item, packages) for item in value)
    if type(value) is not dict:
        return value
    kind = value.get(_KIND)
    if kind == "dtype":
        found = getattr(torch, str(value.get("name")), None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(
                f"an optimizer's state is saved with {value.get('name')!r}, which is no dtype of torch."
            )
        return found
    if kind == "device":
        return torch.device(value["name"])
    if kind == "permuted":
        order = value["order"]
        return value["values"].permute([order.index(dim) for dim in range(len(order))])
    if kind == "deque":
        return deque((unpacked(item, packages) for item in value["items"]), value["maxlen"])
    if kind == "wrapper":
        cls = _class(value["class"], packages)
        if not (issubclass(cls, Tensor) and hasattr(cls, "__tensor_unflatten__")):
            raise CheckpointError(f"an optimizer's state is saved as a {value['class']}, which is no tensor here.")
        inner = {name: unpacked(item, packages) for name, item in value["inner"].items()}
        context = unpacked(value["context"], packages)
        return cls.__tensor_unflatten__(inner, context, torch.Size(value["size"]), tuple(value["stride"]))
    if kind == "object":
        made = object.__new__(_class(value["class"], packages))
        made.__dict__.update({name: unpacked(item, packages) for name, item in value["fields"].items()})
        return made
    return {name: unpacked(item, packages) for name, item in value.items()}


def _path(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _class(path: str, packages: set[str]) -> Any:
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module) if module.split(".")[0] in packages else None
    for part in name.split("."):
        found = getattr(found, part, None)
    if (
        not isinstance(found, type)
        or found.__module__ != module
        or issubclass(found, (nn.Module, torch.optim.Optimizer))
    ):
        raise CheckpointError(
            f"an optimizer's state is saved as a {path.replace(':', '.')}, and the package of the optimizer that loads it "
            f"({', '.join(sorted(packages))}) has no such class. Load it with the optimizer that was saved, of a like version."
        )
    return found


def _is_object(value: Any) -> bool:
    """Whether it is an object whose fields say all of it."""
    odd = isinstance(value, (Tensor, nn.Module, torch.optim.Optimizer, type, torch.Generator)) or callable(value)
    plain = isinstance(value, (list, tuple, set, deque, Mapping, *_NUMBERS))
    return not odd and not plain and hasattr(value, "__dict__") and not hasattr(type(value), "__slots__")


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What is in a container, object or wrapper, each with words for its place."""
    if isinstance(value, Mapping):
        return [(f"[{name!r}]", item) for name, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{place}]", item) for place, item in enumerate(value)]
    if is_wrapper(value):
        return [(f".{name}", getattr(value, name)) for name in value.__tensor_flatten__()[0]]
    return [(f".{name}", item) for name, item in vars(value).items()] if _is_object(value) else []


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    """`value` once more, with these in the place of `_parts`."""
    if isinstance(value, _DICTIONARIES):
        made: Any = copy.copy(value)
        made.update(zip(value, parts, strict=True))
        return made
    if isinstance(value, deque):
        return deque(parts, value.maxlen)
    if type(value) in (list, tuple):
        return type(value)(parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts)
    if is_wrapper(value):
        names, context = value.__tensor_flatten__()
        return type(value).__tensor_unflatten__(
            dict(zip(names, parts, strict=True)), context, value.size(), value.stride()
        )
    if _is_object(value):
        made = copy.copy(value)
        made.__dict__.update(zip(vars(value), parts, strict=True))
        return made
    return value
