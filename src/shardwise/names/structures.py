"""Functions over tensors inside of tuples, lists and mappings, as scripts import them from accelerate's `utils.operations`.

The collectives among accelerate's operations are in `run/process.py`; here is what one process does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ranks.batches import leaves, map_leaves
from ..zero.access import gathered


@dataclass
class TensorInformation:
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype


class CannotPadNestedTensorWarning(UserWarning):
    """For filters of warnings; here a nested tensor is an error in `pad_across_processes`."""


def is_torch_tensor(tensor: Any) -> bool:
    """Whether it is a torch tensor."""
    return isinstance(tensor, Tensor)


def is_torch_xpu_tensor(tensor: Any, *expected: type) -> bool:
    """False: shardwise does not use XPUs."""
    return False


def is_tensor_information(tensor_info: Any) -> bool:
    """Whether it is a TensorInformation."""
    return isinstance(tensor_info, TensorInformation)


def is_namedtuple(data: Any) -> bool:
    """Whether it is an instance of a named tuple."""
    return isinstance(data, tuple) and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Iterator[Any]) -> Any:
    """A sequence of the type of `obj` from what `generator` gives; of a named tuple, by position."""
    if is_namedtuple(obj):
        return type(obj)(*generator)
    return type(obj)(generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] | None = None,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """`data` with `func(item, *args, **kwargs)` in the place of each item that `test_type` is true of: of each tensor.

    error_on_other_type: TypeError for an item that is neither that nor a container; otherwise it stays.
    """
    wanted = test_type or is_torch_tensor

    def one(item: Any) -> Any:
        if wanted(item):
            return func(item, *args, **kwargs)
        if error_on_other_type:
            raise TypeError(
                f"Unsupported types ({type(item)}) passed to `{getattr(func, '__name__', func)}`. Give nested "
                f"lists, tuples and dictionaries of what `{getattr(wanted, '__name__', wanted)}` is true of."
            )
        return item

    return map_leaves(one, data, wanted)


def get_data_structure(data: Any) -> Any:
    """`data` with a TensorInformation for each tensor."""
    return recursively_apply(lambda tensor: TensorInformation(shape=tensor.shape, dtype=tensor.dtype), data)


def get_shape(data: Any) -> Any:
    """`data` with the shape, as a list, of each tensor."""
    return recursively_apply(lambda tensor: list(tensor.shape), data)


def initialize_tensors(data_structure: Any) -> Any:
    """The inverse of `get_data_structure`: tensors on the CPU whose values are not set."""
    return recursively_apply(
        lambda info: torch.empty(*info.shape, dtype=info.dtype), data_structure, test_type=is_tensor_information
    )


def listify(data: Any) -> Any:
    """`data` with numbers in lists for each tensor."""

    def one(tensor: Tensor) -> Any:
        tensor = tensor.detach().cpu()
        # numpy has no bfloat16.
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).tolist()

    return recursively_apply(one, data)


def find_batch_size(data: Any) -> int:
    """The length of dimension 0 of the first tensor. Raises ValueError if there is nothing, TypeError for what is no tensor."""
    if isinstance(data, (tuple, list, Mapping)):
        if not data:
            raise ValueError(f"Cannot find the batch size from empty {type(data)}.")
        return find_batch_size(next(iter(data.values())) if isinstance(data, Mapping) else data[0])
    if not isinstance(data, Tensor):
        raise TypeError(f"Can only find the batch size of tensors but got {type(data)}.")
    return int(data.shape[0])


def ignorant_find_batch_size(data: Any) -> int | None:
    """As `find_batch_size`; None where that cannot be said."""
    try:
        return find_batch_size(data)
    except (ValueError, TypeError, IndexError, KeyError):
        return None


def slice_tensors(
    data: Any, tensor_slice: slice, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """`data` with `tensor[tensor_slice]` for each tensor. process_index, num_processes: for cutters of a script's own."""
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """`tensor`, of `batch_size` rows, with rows of zeros behind, so that they can be cut into `num_processes` equal parts.

    The next multiple of num_processes, in each nested tensor along `dim`. Raises TypeError for what is no tensor.
    """

    def padded(item: Tensor) -> Tensor:
        shape = list(item.shape)
        shape[dim] = -batch_size % num_processes
        return torch.cat([item, item.new_zeros(shape)], dim=dim)

    return recursively_apply(padded, tensor, error_on_other_type=True)


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor, in the order of `map_leaves`; None without any."""
    return next((item.device for item in leaves(data) if isinstance(item, Tensor)), None)


def convert_to_fp32(tensor: Any) -> Any:
    """`tensor` with each tensor of 16 bits as fp32."""

    def is_half(item: Any) -> bool:
        return isinstance(item, Tensor) and item.dtype in (torch.float16, torch.bfloat16)

    return recursively_apply(lambda item: item.float(), tensor, test_type=is_half)


class ConvertOutputsToFp32:
    """A forward whose outputs come in fp32; it can be pickled, which a function made in a function cannot."""

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        self.__wrapped__ = model_forward
        self.__name__ = getattr(model_forward, "__name__", type(model_forward).__name__)
        self.__doc__ = getattr(model_forward, "__doc__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(self.model_forward(*args, **kwargs))


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> ConvertOutputsToFp32:
    """`model_forward`, whose outputs are then converted by `convert_to_fp32`."""
    return ConvertOutputsToFp32(model_forward)


@contextmanager
def GatheredParameters(  # noqa: N802 - the name that scripts use
    params: nn.Parameter | Sequence[nn.Parameter],
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """As `shardwise.gathered(params)`; with modifier_rank 0, what rank 0 writes inside is kept. Collective if `enabled`.

    fwd_module changes nothing. Raises ConfigError for another modifier_rank.
    """
    if not enabled:
        yield
        return
    if modifier_rank not in (None, 0):
        raise ConfigError(
            f"GatheredParameters: modifier_rank is {modifier_rank}; it can be 0, whose values every rank gets, or None."
        )
    with gathered(params, modify=modifier_rank == 0):
        yield
