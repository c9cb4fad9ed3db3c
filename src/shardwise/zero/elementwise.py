"""Which optimizers can work on flat shards: those that treat every element by itself.

torch's own are known. Any other is tried on a small matrix, whole and in flat pieces: equal numbers mean that it does not look
at rows, norms or neighbours. Where states rest off the device it is tried once more, each piece in a call of its own, because
an optimizer that keeps a count for a whole group would count the calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..errors import OptimizerError

_ELEMENTWISE = {
    "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
}  # fmt: skip
_NOT_ELEMENTWISE = {
    "LBFGS": "it takes dot products over all parameters",
    "SparseAdam": "it needs sparse gradients",
    "Adafactor": "it keeps one number per row and column of a matrix",
    "Muon": "it orthogonalises whole matrices",
}
_INSTEAD = f"Use an elementwise optimizer: {', '.join(sorted(_ELEMENTWISE))}, or one like them."


def check_elementwise(optimizer: Optimizer, *, visits: bool) -> None:
    """Raise OptimizerError for one that cannot work on shards.

    visits: some states rest off the device and are stepped piece by piece.
    """
    name = type(optimizer).__name__
    if name in _NOT_ELEMENTWISE:
        raise OptimizerError(f"{name} cannot work on shards: {_NOT_ELEMENTWISE[name]}. {_INSTEAD}")
    if _is_torchs(optimizer):
        return
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    gradients = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    try:
        whole, pieces, apart = (_tried(optimizer, start, gradients, way) for way in (_in_one, _in_pieces, _apart))
    except Exception as error:
        raise OptimizerError(
            f"{name} could not be tried on a small flat tensor ({type(error).__name__}: {error}). {_INSTEAD}"
        ) from error
    if not torch.allclose(whole, pieces, rtol=1e-5, atol=1e-7):
        raise OptimizerError(
            f"{name} cannot work on shards: it gives other numbers for a matrix than for the same elements "
            f"in flat pieces. {_INSTEAD}"
        )
    if visits and not torch.allclose(whole, apart, rtol=1e-5, atol=1e-7):
        raise OptimizerError(
            f"{name} cannot be offloaded: it keeps something for a whole parameter group, such as a count of its steps, and "
            "offloaded states are stepped piece by piece. Set offload_optimizer_device: none, or take an optimizer that keeps "
            "everything with its parameters."
        )


def steps_in_parts(optimizer: Optimizer) -> bool:
    """Whether several calls of its step, each for some of its parameters, do what one call does.

    torch's own keep everything with their parameters. Another may count its calls where no trial sees it; and hooks on the
    step, which look at all gradients or weights, would run in each call.
    """
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    return _is_torchs(optimizer) and not any(hooks)


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.split(".")[0] == "torch" and type(optimizer).__name__ in _ELEMENTWISE


# How the parts of the matrix are stepped: each gives groups of parts, and the parts of a group share a call.
Way = Callable[[Tensor], list[list[Tensor]]]


def _in_one(matrix: Tensor) -> list[list[Tensor]]:
    return [[matrix]]


def _in_pieces(matrix: Tensor) -> list[list[Tensor]]:
    return [[matrix.view(-1)[:10], matrix.view(-1)[10:]]]


def _apart(matrix: Tensor) -> list[list[Tensor]]:
    return [[part] for part in _in_pieces(matrix)[0]]


def _tried(optimizer: Optimizer, start: Tensor, gradients: Sequence[Tensor], way: Way) -> Tensor:
    """`start` after a step with each of the gradients."""
    values = start.clone()
    calls = [[Parameter(part) for part in parts] for parts in way(values)]
    state: dict[Tensor, Any] = defaultdict(dict)
    groups = [{**optimizer.param_groups[0], "params": parts} for parts in calls]
    for gradient in gradients:
        for parts, grads, group in zip(calls, way(gradient), groups, strict=True):
            for part, grad in zip(parts, grads, strict=True):
                part.grad = grad.clone()
            trial: Any = object.__new__(type(optimizer))
            trial.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in ("step", "zero_grad")})
            trial.state = state
            # In a call of its own a group starts from what the user set, as in `Visits`.
            trial.param_groups = [dict(group) if way is _apart else group]
            type(optimizer).step(trial)
    return values.detach().clone()
