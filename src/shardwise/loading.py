"""transformers and peft while a model is built without memory.

transformers' own loading runs as it is, key renamings and conversions included; only the files that it opens answer with
tensors that have no memory and know where their bytes lie. So what it does to them is recorded, and at prepare each rank
reads the bytes of its own interval.

    modeling_utils.safe_open, load_state_dict       files of deferred tensors, inside a building block
    PreTrainedModel.from_pretrained, _from_config   a building block each, under zero3_init_flag
    resize_token_embeddings, peft's adapters        recorded, for a model that has no memory yet

What is wrapped stays wrapped and calls on where there is nothing to do. Nothing of theirs is imported here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.stretches import TensorFile
from .checkpoint.tensor_file import dtype_name
from .initialising import deferred_cast, deferred_from, deferring, is_deferred, shapes_only, source_of
from .recording import Stretch

_CHUNK_NUMEL = 1 << 22  # by which two deferred tensors are compared


class _Switch:
    """by_flag: from_pretrained and from_config build without memory by themselves. blocks: open building blocks."""

    by_flag = False
    blocks = 0


def build_without_memory(enabled: bool) -> None:
    """From now on, or no longer, `from_pretrained` and `from_config` give models without memory."""
    if enabled:
        _connect()
    _Switch.by_flag = enabled


@contextmanager
def building() -> Iterator[None]:
    """Inside, models are built and loaded without memory. See `initialising.deferring`."""
    if _Switch.blocks:
        yield
        return
    _connect()
    _Switch.blocks += 1
    try:
        with _deferred_files(), deferring(gpu=True):
            yield
    finally:
        _Switch.blocks -= 1
        _connect()  # what was imported inside


# Files.


class _LazyTensor:
    """What a file's slice gives for `[...]`: transformers calls `.to` on it, on a thread where nothing is recorded."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return deferred_cast(self.tensor, dtype) if dtype is not None else self.tensor


class _Mapped:
    """The bytes of a tensor that torch.load has mapped: only what is read of it comes into memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._bytes = tensor.reshape(-1).view(torch.uint8)

    def read(self, begin: int, end: int) -> Tensor:
        return self._bytes[begin:end].clone()


class _LazySlice:
    """A tensor of a file. dtype, shape: as the file has them."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], stretch: Stretch) -> None:
        self.dtype, self.shape, self._stretch = dtype, torch.Size(shape), stretch

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return dtype_name(self.dtype)

    def tensor(self) -> Tensor:
        return deferred_from(self._stretch, self.dtype, self.shape)

    def __getitem__(self, key: Any) -> Any:
        tensor = self.tensor()
        return _LazyTensor(tensor) if key is Ellipsis else tensor[key]


class _LazyFile:
    """Stands in for safetensors' safe_open."""

    def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu", **options: Any) -> None:
        self._file = TensorFile(filename)

    def __enter__(self) -> _LazyFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._file.tensors)

    def metadata(self) -> dict[str, str]:
        return self._file.metadata

    def get_slice(self, name: str) -> _LazySlice:
        return _LazySlice(*self._file.tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name).tensor()


def _mapped_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' reader of state dicts, giving tensors of torch's own format as slices too."""

    def load_state_dict(file: Any, map_location: Any = "cpu", **options: Any) -> Any:
        state = original(file, map_location=map_location, **options)
        return {name: _slice_of(value) for name, value in state.items()} if map_location == "cpu" else state

    return load_state_dict


def _slice_of(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta or not value.is_contiguous() or not value.numel():
        return value
    return _LazySlice(value.dtype, value.shape, _Mapped(value))


@contextmanager
def _deferred_files() -> Iterator[None]:
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or library.safe_open is _LazyFile:
        yield
        return
    originals = library.safe_open, library.load_state_dict
    library.safe_open = _LazyFile  # type: ignore[attr-defined]
    library.load_state_dict = _mapped_state(library.load_state_dict)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        library.safe_open, library.load_state_dict = originals  # type: ignore[attr-defined]


# Methods.


def _connect() -> None:
    """Wrap what has been imported so far. Each once."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None:
        _wrap(library.PreTrainedModel, "from_pretrained", _load)
        _wrap(library.PreTrainedModel, "_from_config", _build)
        _wrap(library.PreTrainedModel, "get_init_context", _contexts)
        _wrap(library.PreTrainedModel, "resize_token_embeddings", _change)
    peft = sys.modules.get("peft")
    if peft is not None:
        for name in ("__init__", "add_adapter", "load_adapter"):
            _wrap(peft.PeftModel, name, _change)
        _wrap(peft.tuners.tuners_utils.BaseTuner, "inject_adapter", _change)


def _wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    kept = vars(cls).get(name)
    original = kept.__func__ if isinstance(kept, classmethod) else kept
    if original is None or getattr(original, "_shardwise_building", False):
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    method._shardwise_building = True  # type: ignore[attr-defined]
    setattr(cls, name, classmethod(method) if isinstance(kept, classmethod) else method)


def _load(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    if not (_Switch.by_flag or _Switch.blocks):
        return original(cls, *args, **kwargs)
    with _deferred_files(), deferring():
        loaded = original(cls, *args, **kwargs)
        _tie_what_is_equal(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def _contexts(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> list[Any]:
    """What from_pretrained constructs the model in: on the meta device, for the shapes."""
    return [*original(cls, *args, **kwargs), shapes_only()]


def _build(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    if not (_Switch.by_flag or _Switch.blocks):
        return original(cls, *args, **kwargs)
    with deferring():
        return original(cls, *args, **kwargs)


def _change(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    models = [item for item in (*args, *kwargs.values()) if isinstance(item, nn.Module) and "_modules" in vars(item)]
    if not any(is_deferred(parameter) for model in models for parameter in model.parameters()):
        return original(*args, **kwargs)
    with deferring():
        return original(*args, **kwargs)


def _tie_what_is_equal(model: Any) -> None:
    """Tie the weights that a file holds twice, as transformers does when it can compare them."""
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        ours, theirs = model.get_parameter(target), model.get_parameter(source)
        if ours is theirs or not (is_deferred(ours) and is_deferred(theirs)):
            continue
        if ours.shape == theirs.shape and _equal(ours, theirs):
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, theirs)
        else:
            model.all_tied_weights_keys.pop(target)


def _equal(one: Tensor, other: Tensor) -> bool:
    first, second = source_of(one), source_of(other)
    return all(
        torch.equal(
            first.read(begin, min(begin + _CHUNK_NUMEL, one.numel())),
            second.read(begin, min(begin + _CHUNK_NUMEL, one.numel())),
        )
        for begin in range(0, one.numel(), _CHUNK_NUMEL)
    )
