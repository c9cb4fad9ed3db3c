"""What a Parameter is while its weights are not here: it answers for its shape and dtype, and refuses to be read.

A released parameter is a view into a storage of size 0. Reading such a view crashes the process, and saving it writes
nothing, so the parameter's class is swapped for a subclass that raises and says how to read it; gathering swaps it back.
torch's UninitializedParameter is the precedent for the swap. What autograd and modules ask of a parameter that they do not
compute with (shape, dtype, device, requires_grad, grad, hooks) is answered as always.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ReleasedParameterError

# Parameter -> the name its owner gave it. Side table: nothing is hung on the user's Parameter.
_names: dict[int, str] = {}

_PROPERTIES = [
    "shape",
    "device",
    "dtype",
    "requires_grad",
    "grad",
    "is_leaf",
    "ndim",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "is_mkldnn",
    "is_mps",
    "is_xla",
    "is_xpu",
    "is_ipu",
    "is_nested",
    "is_sparse_csr",
    "is_vulkan",
    "is_maia",
    "itemsize",
    "nbytes",
    "names",
    "grad_fn",
    "_version",
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "output_nr",
    "retains_grad",
    "_grad",
    "grad_dtype",
]
_METHODS = [
    "numel",
    "nelement",
    "size",
    "dim",
    "ndimension",
    "stride",
    "storage_offset",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "is_contiguous",
    "requires_grad_",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "is_inference",
    "is_pinned",
    "type",
    "__len__",
    "__hash__",
    "get_device",
    "is_shared",
    "has_names",
    "dim_order",
]


def _metadata_functions() -> frozenset[Any]:
    found: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor}
    for name in _PROPERTIES:
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            found.add(attribute.__get__)
            if hasattr(attribute, "__set__"):
                found.add(attribute.__set__)
            if hasattr(attribute, "__delete__"):
                found.add(attribute.__delete__)
    found.update(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name))
    return frozenset(found)


_METADATA = _metadata_functions()


class Released:
    """Mixed in before the parameter's own class while its unit is released."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Released):
                    _refuse(item, getattr(func, "__name__", str(func)))
        _refuse(None, getattr(func, "__name__", str(func)))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Parameter({_names.get(id(self), 'unnamed')}, released, shape={tuple(self.shape)}, dtype={self.dtype})"  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: object) -> NoReturn:
        _refuse(self, "deepcopy")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse(self, "save")


def unasked() -> AbstractContextManager[None]:
    """Inside, released parameters answer without a call into Python each time, which costs 1 us. For what reads no value."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


_released_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def released_class(cls: type) -> type:
    """The subclass of `cls`, a Parameter class, that its released instances take."""
    if cls not in _released_classes:
        _released_classes[cls] = type("Released" + cls.__name__, (Released, cls), {"__slots__": ()})
    return _released_classes[cls]


def name_parameter(parameter: Parameter, name: str) -> None:
    """Let errors about `parameter` call it by `name`, until forget_parameter."""
    _names[id(parameter)] = name


def forget_parameter(parameter: Parameter) -> None:
    _names.pop(id(parameter), None)


def _refuse(parameter: Any, action: str) -> NoReturn:
    name = "a parameter" if parameter is None else f"parameter {_names.get(id(parameter), '(unnamed)')!r}"
    raise ReleasedParameterError(
        f"{name} was read ({action}) while it is sharded: this rank holds only its shard. Read weights inside "
        "`with shardwise.gathered(model):` (on every rank), save them with accelerator.save_model or "
        "model.save_pretrained, and pass the module that reads them outside its own forward in `units`."
    )
