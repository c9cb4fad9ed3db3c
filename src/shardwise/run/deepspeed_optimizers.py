"""DeepSpeed's own optimizers: torch's of the same mathematics, which the engine steps on shards wherever they rest.

Making a `DeepSpeedCPUAdam` gives a torch.optim.Adam, so that nothing but the name is new. Adam decouples the weight decay, as
AdamW does, unless `adamw_mode` is False: DeepSpeed's default, under the name Adam too. Lion is not in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def _refuse(name: str, **given: Any) -> None:
    """ConfigError for an argument that is not at the one value that there is here."""
    for argument, (value, only, why) in given.items():
        if value != only:
            raise ConfigError(f"{name}: {argument} is {value!r}, and only {only!r} is taken: {why}.")


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's one-kernel step takes these: floating weights that have memory."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])


class _Adam:
    def __new__(
        cls,
        model_params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Any,
    ) -> Any:
        _refuse(cls.__name__, bias_correction=(bias_correction, True, "torch's Adam always corrects"))
        decoupled = options.pop("adamw_mode", options.pop("adam_w_mode", True))
        for known in ("fp32_optimizer_states", "set_grad_none"):  # states are in fp32, and gradients are dropped
            _refuse(cls.__name__, **{known: (options.pop(known, True), True, "there is no other way here")})
        if options:
            raise TypeError(f"{cls.__name__}: {next(iter(options))} is not one of its arguments.")
        return _adam(
            model_params,
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=bool(decoupled),
        )


def _adam(parameters: Parameters, **settings: Any) -> Optimizer:
    """torch.optim.Adam, in one kernel where it can be. Groups of another optimizer take the settings that are given here."""
    decoupled = settings["decoupled_weight_decay"]
    given = list(parameters)
    for group in given:
        if isinstance(group, dict):
            group["decoupled_weight_decay"] = decoupled
            group.pop("foreach", None)
    made = torch.optim.Adam(given, **settings)  # type: ignore[arg-type]
    if _can_fuse(made.param_groups):
        for group in made.param_groups:
            group["fused"], group["foreach"] = True, False
        made._step_supports_amp_scaling = True  # torch's own sign of a fused optimizer
    return made


class DeepSpeedCPUAdam(_Adam):
    """torch.optim.Adam. adamw_mode: weight decay apart from the gradient."""


class _Fused:
    """The classes for a GPU call their first argument `params`, and those for the CPU `model_params`."""

    def __new__(cls, params: Parameters, *args: Any, **options: Any) -> Any:
        return super().__new__(cls, params, *args, **options)  # type: ignore[call-arg]


class FusedAdam(_Fused, _Adam):
    """torch.optim.Adam. adam_w_mode: weight decay apart from the gradient."""


class DeepSpeedCPUAdagrad:
    """torch.optim.Adagrad."""

    def __new__(
        cls,
        model_params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> Any:
        _refuse(cls.__name__, amsgrad=(amsgrad, False, "Adagrad has no such variant"))
        return torch.optim.Adagrad(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


class Lion(Optimizer):
    """Sign of an interpolated momentum. Source: Symbolic Discovery of Optimization Algorithms (arXiv 2302.06675), algorithm 2.

    betas: of the update, and of the momentum that is kept.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"Lion: lr {lr}, betas {betas}, weight_decay {weight_decay}: one of them is out of range."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            rate, (mixed, kept), decay = group["lr"], group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1 - rate * decay)
                parameter.add_(torch.lerp(gradient, momentum, mixed).sign_(), alpha=-rate)
                momentum.lerp_(gradient, 1 - kept)
        return result


class DeepSpeedCPULion:
    """`Lion`."""

    def __new__(
        cls,
        model_params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> Any:
        return Lion(model_params, lr=lr, betas=betas, weight_decay=weight_decay)


class FusedLion(_Fused, DeepSpeedCPULion):
    """`Lion`."""
