"""Python state as JSON plus named tensors, and back: what a scheduler or a registered object keeps, without pickle.

Numbers, texts, None, lists, tuples, sets, dictionaries with any such keys, Counters, bytes, numpy arrays and numbers,
tensors. Anything else is an error when it is saved, with the path to it, and not a surprise when it is loaded. Tensors
and arrays stay binary: the JSON holds their names.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.documents import shown

_KIND = "!"
_KINDS = "biufc"  # of numpy's dtypes: numbers
_INT_BITS = 996  # 10^300, beyond which no number of a JSON file is read back


def encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON can hold it; its tensors are put into `tensors`, on the CPU, under `path` and their way to it.

    The tensors are copies: what is changed afterwards does not reach them. Raises CheckpointError.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return encode(value.value, tensors, path)
    if isinstance(value, numpy.generic):
        return {_KIND: "number", "dtype": str(value.dtype), "value": encode(value.item(), tensors, path)}
    if isinstance(value, int):
        if value.bit_length() > _INT_BITS:
            raise CheckpointError(f"{path} is a number of more than 300 digits, which a checkpoint cannot hold.")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_KIND: "float", "value": repr(value)}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, (Tensor, numpy.ndarray)):
        return _encode_tensor(value, tensors, path)
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, path)
    if isinstance(value, list):
        return [encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
    if isinstance(value, range):
        return {_KIND: "range", "items": [value.start, value.stop, value.step]}
    for cls, kind in ((tuple, "tuple"), (set, "set"), (frozenset, "set"), (deque, "deque")):
        if isinstance(value, cls):
            return {_KIND: kind, "items": [encode(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]}
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold. Let state_dict "
        "give numbers, texts, lists, dictionaries, tensors and arrays."
    )


def _encode_tensor(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, numpy.ndarray):
        if value.dtype == object or value.dtype.kind not in _KINDS:
            raise CheckpointError(f"{path} is an array of {value.dtype}, which a checkpoint cannot hold.")
        found = {_KIND: "array", "dtype": str(value.dtype), "shape": list(value.shape)}
        tensor = torch.from_numpy(numpy.frombuffer(numpy.ascontiguousarray(value).tobytes(), numpy.uint8).copy())
    elif value.ndim == 0 and not value.is_complex():
        # A step count, one for each parameter: as an entry of a file of its own it would cost more than it holds.
        item = encode(value.item(), tensors, path)
        return {_KIND: "scalar", "dtype": str(value.dtype).removeprefix("torch."), "value": item}
    else:
        found = {_KIND: "tensor", "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        tensor = value.detach().to("cpu", copy=True).contiguous().reshape(-1)
    if tensor.numel():
        tensors[path] = tensor
        found["name"] = path
    return found


def _encode_mapping(value: Mapping[Any, Any], tensors: dict[str, Tensor], path: str) -> Any:
    kind = {Counter: "counter", OrderedDict: "ordered"}.get(type(value), "dict")
    if kind == "dict" and all(isinstance(key, str) and key != _KIND for key in value):
        return {key: encode(item, tensors, f"{path}/{key}") for key, item in value.items()}
    items = [
        [encode(key, tensors, f"{path}/key{index}"), encode(item, tensors, f"{path}/{key}")]
        for index, (key, item) in enumerate(value.items())
    ]
    return {_KIND: kind, "items": items}


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """What was encoded. tensor: gives the 1-d tensor of a name; it becomes the result's own.

    Raises CheckpointError for JSON that `encode` does not make.
    """
    try:
        return _decode(value, tensor)
    except CheckpointError:
        raise
    except Exception as error:  # a field that is not there, of another kind, or out of range
        raise CheckpointError(
            f"the state holds something that no save writes ({type(error).__name__}: {shown(str(error))}): the file was "
            "changed by hand, or by a fault."
        ) from error


def _decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: _decode(item, tensor) for key, item in value.items()}
    if kind == "float":
        return float(value["value"])
    if kind == "bytes":
        return base64.b64decode(value["value"])
    if kind == "number":
        return _plain(value["dtype"]).type(_decode(value["value"], tensor))
    if kind == "scalar":
        return torch.tensor(_decode(value["value"], tensor), dtype=_dtype(value["dtype"]))
    if kind == "array":
        raw = tensor(value["name"]).numpy().tobytes() if "name" in value else b""
        kept = _plain(value["dtype"])
        array: Any = numpy.frombuffer(raw, kept) if raw else numpy.empty((0,), kept)
        return array.reshape(value["shape"]).copy()
    if kind == "tensor":
        dtype = _dtype(value["dtype"])
        flat = tensor(value["name"]) if "name" in value else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    items = [_decode(item, tensor) for item in value["items"]]
    if kind in ("dict", "ordered", "counter"):
        pairs = [(_hashable(key), item) for key, item in items]
        return Counter(dict(pairs)) if kind == "counter" else OrderedDict(pairs) if kind == "ordered" else dict(pairs)
    makers: dict[str, Callable[[list[Any]], Any]] = {
        "tuple": tuple,
        "set": set,
        "deque": deque,
        "range": lambda found: range(*found),
    }
    if kind not in makers:
        raise CheckpointError(f"the state holds something of the unknown kind {kind!r}: a newer version wrote it.")
    return makers[kind](items)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return found


def _plain(name: str) -> numpy.dtype[Any]:
    found = numpy.dtype(name)
    if found.kind not in _KINDS:
        raise TypeError(f"{name} is no dtype of numbers")
    return found


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
