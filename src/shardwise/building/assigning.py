"""`parameter.data = values` where one of both has memory and the other none yet, which torch refuses and models do.

    parameter     values        afterwards
    real          deferred      deferred, with the values' record
    deferred      real          real

PEFT's initialisations that look at the base weight do both: what they compute of a weight without memory has none either, and
what is small has memory in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

DATA_SETTER = Tensor.data.__set__  # type: ignore[attr-defined]


def exchange(target: Tensor, values: Tensor) -> None:
    """Exchange what is behind `target`, which stays the same object, for what is behind `values`."""
    shell = Parameter(values.detach(), requires_grad=target.requires_grad) if target.is_leaf else values.detach()
    torch._C._swap_tensor_impl(target, shell)


class Assigning(TorchFunctionMode):
    """Inside, such an assignment exchanges what is behind the parameter."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == DATA_SETTER and isinstance(args[1], Tensor) and args[0].is_meta is not args[1].is_meta:
            exchange(*args)
            return None
        return func(*args, **(kwargs or {}))
