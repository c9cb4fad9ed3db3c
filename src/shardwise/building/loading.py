"""transformers and peft while a model is built without memory.

transformers' own loading runs as it is, key renamings and conversions included; only the files that it opens answer with
tensors that have no memory and know where their bytes lie. So what it does to them is recorded, and at prepare each rank
reads the bytes of its own interval.

    modeling_utils.safe_open, load_state_dict       files of deferred tensors, inside a building block
    torch.load, safetensors.torch.load_file         the same, for code that loads a state dict by itself
    PreTrainedModel.from_pretrained, _from_config   a building block each, under zero3_init_flag
    resize_token_embeddings, peft's adapters        recorded, for a model that has no memory yet
    nn.Module._apply (.to, .half, .float)           the same

What is wrapped stays wrapped and calls on where there is nothing to do. Nothing of theirs is imported here.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..files.reader import TensorFile
from ..files.torch_file import OtherFormatError, TorchFile
from ..files.writer import dtype_name
from . import initialising
from .deferred_tensors import deferring_until_prepare
from .initialising import (
    deferred_cast,
    deferred_from,
    deferred_storage,
    is_deferred,
    is_deferring,
    shapes_only,
    source_of,
)

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
def built_without_memory(enabled: bool) -> Iterator[None]:
    """As `build_without_memory`, inside; behind it is what was before."""
    before = _Switch.by_flag
    build_without_memory(enabled)
    try:
        yield
    finally:
        build_without_memory(before)


@contextmanager
def building() -> Iterator[None]:
    """Inside, models are built and loaded without memory. See `deferring_until_prepare`."""
    if _Switch.blocks:
        yield
        return
    _connect()
    _Switch.blocks += 1
    try:
        with _deferred_files(), deferring_until_prepare(gpu=True):
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
    """A tensor of a file. dtype, shape: as the file has them. make: gives it, deferred."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor]) -> None:
        self.dtype, self.shape, self.tensor = dtype, torch.Size(shape), make

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return dtype_name(self.dtype)

    def __getitem__(self, key: Any) -> Any:
        tensor = self.tensor()
        return _LazyTensor(tensor) if key is Ellipsis else tensor[key]


class _LazyFile:
    """Stands in for safetensors' safe_open."""

    _shardwise_lazy = True

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
        dtype, shape, stretch = self._file.tensors[name]
        return _LazySlice(dtype, shape, lambda: deferred_from(stretch, dtype, shape))

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name).tensor()

    def get_tensors(self) -> dict[str, Tensor]:
        return {name: self.get_tensor(name) for name in self.keys()}

    def offset_keys(self) -> list[str]:
        return sorted(self.keys(), key=lambda name: self._file.tensors[name][2].offset)


def _lazy_open(original: Callable[..., Any]) -> Callable[..., Any]:
    def safe_open(filename: Any, framework: str = "pt", device: Any = "cpu", **options: Any) -> Any:
        ours = framework == "pt" and str(device) == "cpu"
        return (_LazyFile if ours else original)(filename, framework=framework, device=device, **options)

    return safe_open


def _lazy_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.load, where it is asked for weights alone from a file to the CPU. What it draws a line at, torch.load answers."""

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **options: Any) -> Any:
        plain = isinstance(f, (str, os.PathLike)) and not args and options.keys() <= {"weights_only", "mmap"}
        here = map_location is None or (isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu")
        if plain and here and options.get("weights_only") in (None, True):
            try:
                with shapes_only():
                    file = TorchFile(f, initialising.SMALL_NUMEL)
            except OtherFormatError:
                pass
            else:
                for storage, stretch in file.storages:
                    deferred_storage(storage, stretch)
                return file.content
        return original(f, map_location, *args, **options)

    return load


def _mapped_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' reader of state dicts, giving tensors of torch's own format as slices too."""

    def load_state_dict(file: Any, map_location: Any = "cpu", **options: Any) -> Any:
        state = original(file, map_location=map_location, **options)
        return {name: _slice_of(value) for name, value in state.items()} if map_location == "cpu" else state

    return load_state_dict


def _slice_of(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.numel():
        return value
    if is_deferred(value):
        return _LazySlice(value.dtype, value.shape, value.detach)
    if value.is_meta or not value.is_contiguous():
        return value
    return _LazySlice(value.dtype, value.shape, lambda: deferred_from(_Mapped(value), value.dtype, value.shape))


@contextmanager
def _deferred_files() -> Iterator[None]:
    """Inside, files answer with deferred tensors. Inside another such block it does nothing more than that."""
    library, safetensors = sys.modules.get("transformers.modeling_utils"), sys.modules.get("safetensors.torch")
    wanted: list[tuple[Any, str, Callable[[Any], Any]]] = [(torch, "load", _lazy_load)]
    if safetensors is not None:
        wanted.append((safetensors, "safe_open", _lazy_open))
    if library is not None:
        wanted += [(library, "safe_open", lambda original: _LazyFile), (library, "load_state_dict", _mapped_state)]
        if hasattr(library, "_is_on_hf_mount"):  # where it would read files whole
            wanted.append((library, "_is_on_hf_mount", lambda original: lambda path: False))
    originals = []
    for home, name, around in wanted:
        original = getattr(home, name)
        if not hasattr(original, "_shardwise_lazy"):
            replacement = around(original)
            replacement._shardwise_lazy = True
            originals.append((home, name, original))
            setattr(home, name, replacement)
    try:
        yield
    finally:
        for home, name, original in originals:
            setattr(home, name, original)


# Methods.


def _connect() -> None:
    """Wrap what has been imported so far. Each once."""
    _wrap(nn.Module, "_apply", _change)
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
    # Asked not to map files, which nobody does here, transformers reads them whole.
    kwargs = {name: value for name, value in kwargs.items() if name != "disable_mmap"}
    with _deferred_files(), deferring_until_prepare():
        loaded = original(cls, *args, **kwargs)
        _tie_what_is_equal(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def _contexts(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> list[Any]:
    """What from_pretrained constructs the model in: on the meta device, for the shapes."""
    return [*original(cls, *args, **kwargs), shapes_only()]


def _build(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    if not (_Switch.by_flag or _Switch.blocks):
        return original(cls, *args, **kwargs)
    with deferring_until_prepare():
        return original(cls, *args, **kwargs)


def _change(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_deferring():
        return original(*args, **kwargs)
    models = [item for item in (*args, *kwargs.values()) if isinstance(item, nn.Module) and "_modules" in vars(item)]
    if not any(is_deferred(parameter) for model in models for parameter in model.parameters()):
        return original(*args, **kwargs)
    with deferring_until_prepare():
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
