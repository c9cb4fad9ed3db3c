"""safe_get_full_* and safe_set_full_*: one parameter's whole gradient, fp32 master and optimizer state. Collective.

The optimizer's names for Adam's moments are "exp_avg" and "exp_avg_sq". A parameter of no engine is read and written as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ...step.full import full, set_full


def safe_get_full_fp32_param(param: Parameter) -> Tensor | None:
    """The whole master in fp32; None for a weight that is not trained."""
    return full(param, "master")


def safe_get_full_grad(param: Parameter) -> Tensor | None:
    """The whole gradient between a backward and the step; None without one. In fp16 without the loss scale."""
    return full(param, "gradient")


def safe_get_full_optimizer_state(param: Parameter, optim_state_key: str) -> Tensor | None:
    """A whole state; None before the first step, or where the optimizer keeps none of that name."""
    return full(param, optim_state_key)


def safe_set_full_fp32_param(param: Parameter, value: Tensor) -> None:
    """Write the master, and with it the weight."""
    set_full(param, "master", value)


def safe_set_full_grad(param: Parameter, value: Tensor) -> None:
    """Write the gradient that the coming step uses."""
    set_full(param, "gradient", value)


def safe_set_full_optimizer_state(param: Parameter, value: Tensor, optim_state_key: str) -> None:
    """Write a state that there is."""
    set_full(param, optim_state_key, value.to(torch.float32))


def safe_update_full_grad_vectorized(
    params: Sequence[Parameter], update_func: Callable[[Tensor, Parameter], Tensor]
) -> None:
    """Write what `update_func` makes of each gradient; parameters without one are passed over. Collective."""
    for parameter in params:
        found = safe_get_full_grad(parameter)
        if found is not None:
            safe_set_full_grad(parameter, update_func(found, parameter))
