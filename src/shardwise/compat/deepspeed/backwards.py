"""Backwards that a script begins itself, by `loss.backward()`, on what the engine's forward gave it.

    engine.backward(loss)            divided by the micro-batches of a step, and in fp16 multiplied by the loss scale
    loss.backward()                  divided in the same way, when the gradients leave the parameters; in fp16 an error
    engine.scale(loss).backward()    divided so, and multiplied by the loss scale

DeepSpeed divides what arrives at each output, so that a loss that was computed from another output is divided twice. Here the
parameters' gradients are divided, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...errors import ScheduleError
from ...zero.nested import tensors_in
from ...zero.sharded import ShardedModel


class Backwards:
    """What the backwards of one engine count.

    steps: micro-batches of a step. sums: gradients of the ranks are added, not averaged. needs_scale: in fp16.
    count: backwards until now.
    """

    def __init__(self, sharded: ShardedModel, steps: int, *, sums: bool, needs_scale: bool) -> None:
        self._sharded = sharded
        self._whole = float(sharded.ranks.world_size) if sums else 1.0
        self._share = self._whole / steps
        self._needs_scale = needs_scale
        self._scaled = False  # the loss of the running backward
        self.count = 0
        sharded.gradient_share = self._share
        sharded.after_backward.append(self._end)

    @contextmanager
    def divided_already(self) -> Iterator[None]:
        """For the backward of a loss that has been divided and scaled."""
        self._sharded.gradient_share, self._scaled = self._whole, True
        try:
            yield
        finally:
            self._sharded.gradient_share, self._scaled = self._share, False

    def watch(self, outputs: Any) -> None:
        """Refuse the backward of `outputs`, in fp16, whose loss has not been scaled."""
        if self._needs_scale:
            for output in tensors_in(outputs):
                if output.grad_fn is not None:
                    output.register_hook(self._check)  # type: ignore[no-untyped-call]

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss`, which has been scaled; its backward is allowed."""
        if self._needs_scale and loss.requires_grad:
            loss.register_hook(self._begin_scaled)  # type: ignore[no-untyped-call]
        return loss

    def _begin_scaled(self, gradient: Tensor) -> None:
        self._scaled = True

    def _end(self) -> None:
        self._scaled = False
        self.count += 1

    def _check(self, gradient: Tensor) -> None:
        if not self._scaled:
            raise ScheduleError(
                "loss.backward(): in fp16 the loss scale is required, and this loss is without it: its gradients would vanish. "
                "Call engine.backward(loss), or engine.scale(loss).backward()."
            )
