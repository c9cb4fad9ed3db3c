"""What a Parameter is while its weights are not here: it answers for its shape and dtype, and refuses to be read.

A released parameter is a view into a storage of size 0. Reading such a view crashes the process, and saving it writes
nothing, so the parameter's class is swapped for a subclass that raises and says how to read it; gathering swaps it back.
torch's UninitializedParameter is the precedent for the swap. What autograd and modules ask of a parameter that they do not
compute with (shape, dtype, device, requires_grad, grad, hooks) is answered as always.

Autograd keeps tensors of its own of a weight that a forward has read, which no class swap reaches. They share the weight's
version, the count of writes by which autograd tells that what it kept is out of date; so a released weight has a version that
no write gives it, and its own again when it is gathered. A backward that comes to a released weight then ends in torch's
error, before a kernel reads memory that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ReleasedParameterError
from .handed import Handed

# The version of a released weight, one for each: far above what counting writes comes to.
_released_versions = count(1 << 30)


class Known(NamedTuple):
    """A guarded parameter, what its owner calls it, and its guard."""

    parameter: ref[Parameter]
    name: str
    guard: ref[Guard]


# id(parameter), and that version -> the parameter. Side table: nothing is hung on Parameters.
_known: dict[int, Known] = {}

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
    # They take weights only to say whose gradients are wanted.
    found |= {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
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


METADATA = _metadata_functions()


class Released:
    """Mixed in before the parameter's own class while its unit is released."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        released = [
            item
            for value in (*args, *(kwargs or {}).values())
            for item in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(item, Released)
        ]
        for item in released:
            # Reading the next one may have released this one again: all of them must be open at once.
            if not _fetched(item):
                _refuse(item, getattr(func, "__name__", str(func)))
        if not released or any(isinstance(item, Released) for item in released):
            _refuse(released[0] if released else None, getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Parameter({name_of(self) or 'unnamed'}, released, shape={tuple(self.shape)}, dtype={self.dtype})"  # type: ignore[attr-defined]

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


class Guard:
    """Closes the parameters of one buffer while they are released, opens them again, and tells which a script has written.

    names:   what errors call them. They begin open, and are known from here on until `forget`.
    on_read: asked when a released one is read, by its name; true if it is open now, and as long as it is needed.
    """

    def __init__(self, parameters: Sequence[Parameter], names: Sequence[str]) -> None:
        self._parameters = tuple(parameters)
        self.names = tuple(names)
        self._open_classes = [type(parameter) for parameter in parameters]
        self._closed_classes = [released_class(cls) for cls in self._open_classes]
        self._versions = tuple(parameter._version for parameter in parameters)
        self._closed_versions = tuple(next(_released_versions) for _ in parameters)
        self.handed = Handed(parameters, names)
        self.on_read: Callable[[str], bool] | None = None
        Parameter.__reduce_ex__ = _reduced  # type: ignore[assignment, method-assign]
        entries = {
            key: Known(ref(parameter), name, ref(self))
            for parameter, name, version in zip(parameters, names, self._closed_versions, strict=True)
            for key in (id(parameter), version)
        }
        _known.update(entries)
        self._forget = finalize(self, _unknow, entries)

    def close(self) -> None:
        """From now on reading a parameter raises ReleasedParameterError, and so does a backward that kept one."""
        _set_versions(self._parameters, self._closed_versions)
        for parameter, cls in zip(self._parameters, self._closed_classes, strict=True):
            parameter.__class__ = cls

    def open(self) -> None:
        for parameter, cls in zip(self._parameters, self._open_classes, strict=True):
            parameter.__class__ = cls
        _set_versions(self._parameters, self._versions)

    @property
    def touched(self) -> bool:
        """Whether a script may have written any since `written`. They must be open."""
        return tuple(map(_version, self._parameters)) != self._versions or bool(self.handed)

    def written(self) -> list[int]:
        """Those whose version says that a script has written them since the last time. They must be open."""
        versions = tuple(map(_version, self._parameters))
        before, self._versions = self._versions, versions
        if versions == before:
            return []
        return [i for i, (now, then) in enumerate(zip(versions, before, strict=True)) if now != then]

    def forget(self) -> None:
        """The parameters are no longer guarded; they must be open."""
        self._forget()
        self.handed.stop()


_version = attrgetter("_version")

# torch's own, which knows nothing of this file.
_reduce = Parameter.__reduce_ex__


def _reduced(parameter: Parameter, protocol: Any) -> Any:
    """What pickle takes of any Parameter; of a guarded one its own elements, where torch takes the whole unit's storage."""
    found = _reduce(parameter, protocol)  # type: ignore[no-untyped-call]
    if name_of(parameter) is None:
        return found
    rebuild, (value, *more) = found
    return rebuild, (value.clone(), *more)


def _unknow(entries: Mapping[int, Known]) -> None:
    for key, entry in entries.items():
        if _known.get(key) is entry:
            del _known[key]


def _set_versions(parameters: tuple[Parameter, ...], versions: tuple[int, ...]) -> None:
    torch._C._autograd._unsafe_set_version_counter(parameters, versions)


def name_of(parameter: Any) -> str | None:
    """What errors call a guarded parameter; None for any other."""
    known = _known.get(id(parameter))
    return known.name if known is not None and known.parameter() is parameter else None


def _fetched(parameter: Any) -> bool:
    """Whether the weights of a released parameter could be had where it is read."""
    known = _known.get(id(parameter))
    guard = known.guard() if known is not None and known.parameter() is parameter else None
    return known is not None and guard is not None and guard.on_read is not None and guard.on_read(known.name)


def explain(error: RuntimeError) -> RuntimeError | None:
    """A backward's error in words, if it came to a weight that is released; None for any other error."""
    found = re.search(r"is at version (\d+)", str(error))
    known = _known.get(int(found[1])) if found is not None else None
    if known is None:
        return None
    return ReleasedParameterError(
        f"a backward needs {known.name!r}, which is released: it did not come there through an output of the module that read "
        "it, as in the steps before. Return what the loss is made of from the model's forward, or keep the weights until the "
        "backward is over: `with shardwise.gathered(model):` (on every rank) around the forward and the backward."
    )


@contextmanager
def explained() -> Iterator[None]:
    """Around a backward: an error of a weight that is released is raised as `explain` says it."""
    try:
        yield
    except RuntimeError as error:
        told = explain(error)
        if told is None:
            raise
        raise told from error


def _refuse(parameter: Any, action: str) -> NoReturn:
    name = "a parameter" if parameter is None else f"parameter {name_of(parameter) or '(unnamed)'!r}"
    if torch._guards.TracingContext.try_get() is not None:
        raise ReleasedParameterError(
            f"torch.compile met {name} while it is sharded: it cannot look at a prepared model as a whole. Set dynamo_backend "
            "in the configuration (for example dynamo_backend: inductor), which compiles it block by block."
        )
    raise ReleasedParameterError(
        f"{name} was read ({action}) while it is sharded: this rank holds only its shard. Read weights inside "
        "`with shardwise.gathered(model):` (on every rank), save them with accelerator.save_model or "
        "model.save_pretrained, and pass the module that reads them outside its own forward in `units`."
    )
