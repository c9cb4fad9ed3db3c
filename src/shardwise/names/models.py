"""What scripts ask of a model: is it wrapped, compiled or of PEFT, what does it hold, how large is it; models without memory.

Sizes are bytes. A prepared model is asked as it is on this rank: weights that are sharded say their whole shapes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..config.kinds import CustomDtype
from ..run.accelerator_state import AcceleratorState
from ..run.plugins import AutocastKwargs
from ..run.process import DistributedType
from .structures import ConvertOutputsToFp32

logger = logging.getLogger("shardwise")

_UNITS = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3}


def is_compiled_module(module: nn.Module) -> bool:
    """Whether it is what `torch.compile(model)` gives."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def is_peft_model(model: nn.Module) -> bool:
    """Whether it is a PeftModel, also inside of `torch.compile` and of torch's wrappers for several devices."""
    if "peft" not in sys.modules:  # nobody has made one
        return False
    from peft import PeftModel

    return isinstance(extract_model_from_parallel(model, keep_torch_compile=False), PeftModel)


def extract_model_from_parallel(
    model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """The model inside of torch's DistributedDataParallel and DataParallel; a prepared model is itself.

    keep_fp32_wrapper:  False takes `convert_outputs_to_fp32` off its forward.
    keep_torch_compile: False gives the model inside of `torch.compile`, too.
    recursive:          also look for wrappers among its children, and for a `.module` inside of what is found.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    outside = None
    if is_compiled_module(model):
        outside, model = model, model._orig_mod
    while isinstance(model, wrappers):
        model = model.module
    if recursive:
        model = _unwrapped(model)
    if not keep_fp32_wrapper and isinstance(vars(model).get("forward"), (MethodType, ConvertOutputsToFp32)):
        forward = model.forward
        while isinstance(forward, ConvertOutputsToFp32):
            forward = forward.__wrapped__
        model.forward = forward
    if outside is not None and keep_torch_compile:
        outside._orig_mod = model
        return outside
    return model


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    for name, child in module.named_children():
        setattr(module, name, _unwrapped(child))
    return module


def model_has_dtensor(model: nn.Module) -> bool:
    """Whether a parameter of it is one of torch's DTensors, which shardwise does not make."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether another library's device map has put this module's weights elsewhere until its forward."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def get_module_children_bottom_up(model: nn.Module, return_fqns: bool = False) -> list[Any]:
    """All modules of a model, each after those inside of it; return_fqns: as (name, module)."""
    named = list(model.named_modules(remove_duplicate=False))[::-1]
    return named if return_fqns else [module for _, module in named]


# What a model holds.


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by name. recurse: those of modules inside, too."""
    yield from module.named_parameters(recurse=recurse)
    if not include_buffers:
        return
    left_out = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else set()
    yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=recurse) if name not in left_out)


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Names of buffers that a state_dict leaves out. fqns: as they are from `module` on."""
    modules = module.named_modules() if recurse else [("", module)]
    return {
        f"{path}.{name}" if fqns and path else name
        for path, inner in modules
        for name in inner._non_persistent_buffers_set
    }


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """The names of each parameter that has several, sorted."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [sorted(found) for found in names.values() if len(found) > 1]


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """(device, address, bytes) of the memory of a tensor: equal for tensors that share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def clean_state_dict_for_safetensors(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The entries as contiguous tensors, of those that share their memory only the first by name; the others are told."""
    kept: OrderedDict[str, Tensor] = OrderedDict()
    first: dict[Any, str] = {}
    for name in sorted(state_dict):
        first.setdefault(id_tensor_storage(state_dict[name]), name)
    left_out = []
    for name, tensor in state_dict.items():
        owner = first[id_tensor_storage(tensor)]
        if tensor.numel() and owner != name:
            left_out.append(f"{name} (it is in {owner})")
        else:
            kept[name] = tensor.contiguous()
    if left_out:
        logger.warning("A safetensors file has no tensors that share their memory. Left out: %s.", ", ".join(left_out))
    return kept


# How large it is.


def dtype_byte_size(dtype: Any) -> float:
    """Bytes of one element: `dtype_byte_size(torch.float32)` is 4, of bool 1/8, of CustomDtype.INT4 1/2.

    Raises ValueError for what has no number of bits in its name.
    """
    if dtype == torch.bool:
        return 1 / 8
    bits = {CustomDtype.INT2: 2, CustomDtype.INT4: 4, CustomDtype.FP8: 8}.get(dtype)
    if bits is not None:
        return bits / 8
    found = re.search(r"[^\d](\d+)(_\w+)?$", str(dtype))
    if found is None:
        raise ValueError(f"`dtype` is not a valid dtype: {dtype}.")
    return int(found.group(1)) // 8


def compute_module_sizes(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, float]:
    """Bytes of each module, parameter and buffer by name; "" is the whole model.

    dtype: count floating tensors of more bits as if they were of this type. special_dtypes: the same by name, always.
    """

    def size_of(kind: Any) -> float:
        return dtype_byte_size(getattr(torch, kind.removeprefix("torch.")) if isinstance(kind, str) else kind)

    sizes: dict[str, float] = defaultdict(int)
    tensors = model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True)
    for name, tensor in tensors:
        own = dtype_byte_size(tensor.dtype)
        if special_dtypes is not None and name in special_dtypes:
            own = size_of(special_dtypes[name])
        elif dtype is not None and (tensor.is_floating_point() or tensor.is_complex()):
            own = min(own, size_of(dtype))
        parts = name.split(".")
        for end in range(len(parts) + 1):
            sizes[".".join(parts[:end])] += tensor.numel() * own
    return sizes


def compute_module_total_buffer_size(model: nn.Module, dtype: Any = None, special_dtypes: Any = None) -> float:
    """Bytes of a model's buffers."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def convert_file_size_to_int(size: int | str) -> int:
    """Bytes of a text such as "5GB" or "300MiB"; "Gb" is bits. Raises ValueError for another text."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]+)\s*", size)
    unit = None if found is None else _UNITS.get(found.group(2).upper())
    if found is None or unit is None:
        raise ValueError(
            f"`size` {size!r} is not in a valid format. Use an integer for bytes, or a string such as '5GB'."
        )
    bits = found.group(2).endswith("b") and not found.group(2).upper().endswith("IB")
    return int(float(found.group(1)) * unit) // (8 if bits else 1)


# Precision.


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: AutocastKwargs | None = None
) -> AbstractContextManager[Any]:
    """torch's autocast in the precision of the Accelerator that was made last; without `native_amp`, or in fp32, nothing."""
    state = AcceleratorState()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(state.mixed_precision)
    if not native_amp or dtype is None:
        return contextlib.nullcontext()
    said = {} if autocast_kwargs is None else autocast_kwargs.to_kwargs()
    return torch.autocast(device_type=state.device.type, dtype=dtype, **said)


def get_grad_scaler(distributed_type: DistributedType | None = None, **kwargs: Any) -> torch.amp.GradScaler:
    """torch's scaler, for a loop of one's own; a prepared optimizer has the engine's."""
    return torch.amp.GradScaler("cuda" if torch.cuda.is_available() else "cpu", **kwargs)


# Models without memory.


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside, parameters that modules are given are on the meta device: they have a shape and no memory, for good.

    include_buffers: buffers too. A model to train that shall have weights later is built in `with accelerator.init():`.
    """
    with init_on_device(torch.device("meta"), include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """Inside, parameters that modules are given are moved to `device`. include_buffers: tensors are made there, buffers too."""
    device = torch.device(device)
    if include_buffers:
        with device:
            yield
        return
    original = nn.Module.register_parameter
    nn.Module.register_parameter = _moving(original, device)  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _moving(original: Callable[..., None], device: torch.device) -> Callable[..., None]:
    @functools.wraps(original)
    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and param.device != device:
            said = dict(vars(param))
            moved = type(param)(param.to(device), requires_grad=param.requires_grad)
            vars(moved).update(said)
            module._parameters[name] = moved

    return register_parameter
