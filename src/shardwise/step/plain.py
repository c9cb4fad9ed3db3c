"""An optimizer whose parameters belong to no prepared model: it steps them as in plain torch, on a run of one process.

What a script expects of a prepared one holds for it too: it waits while gradients are accumulated, is unscaled and skipped in
fp16, and clips. With several ranks it is refused, for nobody would average its gradients.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import NonFiniteError, OptimizerError
from ..plan.precision import LossScaler
from ..ranks.activity import Doing, activity
from .clipping import clip_factor
from .telling import FlagOnOptimizer


class PlainOptimizer:
    """Drives one optimizer over parameters of the script's own, until `undo`.

    scaler: the loss scale; must be the one that scaled the loss. ends_step: whether a step may be made now.
    gradient_clipping: the largest 2-norm of the gradient at a step; None does not clip.
    """

    step_was_skipped = FlagOnOptimizer()

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: LossScaler,
        ends_step: Callable[[], bool],
        gradient_clipping: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.gradient_clipping = gradient_clipping
        self.step_was_skipped = False
        self.steps = 0
        self._ends_step = ends_step
        self._carried = 1.0  # the loss scale that gradients carry
        self._bad: Tensor | None = None
        self._earlier = {verb: vars(optimizer).get(verb) for verb in ("step", "zero_grad")}
        own_step, own_zero = optimizer.step, optimizer.zero_grad

        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(own_step, closure)

        def zero_grad(_: Optimizer, set_to_none: bool = True) -> None:
            if self._ends_step():
                own_zero(set_to_none)

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as in `ShardedOptimizer`
        for verb in (step, zero_grad):
            setattr(optimizer, verb.__name__, types.MethodType(verb, optimizer))

    def undo(self) -> None:
        """Give the optimizer its own verbs back."""
        for verb, earlier in self._earlier.items():
            if earlier is None:
                delattr(self.optimizer, verb)
            else:
                setattr(self.optimizer, verb, earlier)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any of these is in its groups."""
        mine = {id(parameter) for parameter in self.parameters}
        return any(id(parameter) in mine for parameter in parameters)

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        """It has no model whose other parameters it would know."""
        return False

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]

    # The loss and the gradients.

    def note_loss(self, loss: Tensor) -> None:
        """A backward is about to begin: what is there of gradients carries its loss scale too."""
        if self.scaler.enabled:
            self._carry(self.scaler.value)
        else:
            bad = ~torch.isfinite(loss.detach()).all()
            self._bad = bad if self._bad is None else self._bad | bad

    def raise_if_bad(self) -> None:
        """Raises NonFiniteError if a loss since the last step was NaN or infinite."""
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise NonFiniteError(
                f"the loss is NaN or infinite at step {self.steps + 1}. Look at the batch, lower the learning rate, or clip "
                "gradients (gradient_clipping: 1.0)."
            )

    def unscale(self) -> None:
        """Take the loss scale off the gradients."""
        self._carry(1.0)

    def _carry(self, scale: float) -> None:
        gradients = self._gradients(self.parameters)
        if gradients and scale != self._carried:
            torch._foreach_mul_(gradients, scale / self._carried)
        self._carried = scale

    @staticmethod
    def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    # Clipping.

    @property
    def held(self) -> PlainOptimizer:
        """Whom to ask of its gradients: as of a ShardedOptimizer."""
        return self

    def norm(self, parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
        """Of the gradients of these parameters, loss scale removed."""
        self.unscale()
        return torch.nn.utils.get_total_norm(self._gradients(parameters), norm_type)

    @torch.no_grad()
    def multiply(self, parameters: Iterable[Tensor], factor: Tensor) -> None:
        """Multiply the gradients of these parameters. factor: a scalar."""
        for gradient in self._gradients(parameters):
            gradient.mul_(factor.to(gradient.device))

    def clip_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of `parameters` together to `max_norm` and return their norm before it."""
        items = list(parameters)
        norm = self.norm(items, norm_type)
        self.multiply(items, clip_factor(norm, max_norm))
        return norm

    def clip_value(self, parameters: Iterable[Tensor], value: float) -> None:
        """Clamp every element of the gradients of `parameters` to [-value, value]."""
        self.unscale()
        for gradient in self._gradients(parameters):
            gradient.clamp_(-value, value)

    # The step.

    def step(self, own: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        """The optimizer's `own` step, where one may be made now."""
        if not self._ends_step():
            return None
        self.raise_if_bad()
        if closure is not None:
            if self.scaler.enabled or self.gradient_clipping is not None:
                raise OptimizerError(
                    f"{type(self.optimizer).__name__}.step(closure): gradients that come inside of a step can be neither "
                    "unscaled nor clipped. Call the closure before the step, or use bf16 and no gradient_clipping."
                )
            self.steps += 1
            result = own(closure)
            activity.stepped(self.steps)
            return result
        activity.begins(Doing.STEP)
        self.unscale()
        self.steps += 1
        gradients = self._gradients(self.parameters)
        if self.scaler.enabled:
            self.step_was_skipped = not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            self.scaler.update(self.step_was_skipped, step=self.steps, say=True)
        if not self.step_was_skipped:
            if self.gradient_clipping is not None:
                self.clip_norm(self.parameters, self.gradient_clipping)
            own()
        activity.stepped(self.steps)
        return None
