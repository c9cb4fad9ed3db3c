"""Which dtype computes, which one sums gradients, and the loss scale that keeps fp16 gradients in range.

    mixed precision   weights compute in   gradients summed in   what is trained is kept in
    no                their own dtype      fp32                  fp32
    bf16              bf16                 fp32                  fp32
    fp16              fp16, loss scaled    fp32                  fp32

Frozen floating weights are cast to the compute dtype once, at prepare, and have no other copy. Buffers (running
statistics, rotary frequencies) keep their dtype: their precision is cheap and models rely on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

log = logging.getLogger("shardwise")

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_LARGEST = 2.0**127  # of loss scales: fp32 holds no larger power of two


@dataclass(frozen=True)
class Precision:
    """compute: the dtype weights are cast to, or None to leave each as it is. reduce: the dtype gradients are summed in."""

    compute: torch.dtype | None = None
    reduce: torch.dtype = torch.float32

    @classmethod
    def named(cls, mixed_precision: str = "no", reduce_dtype: str = "fp32") -> Precision:
        """From the words of the configuration: 'no', 'bf16', 'fp16' and 'fp32', 'bf16', 'fp16'. Raises ConfigError."""
        if mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(f"mixed_precision is {mixed_precision!r}; it is one of no, bf16, fp16.")
        if reduce_dtype not in _DTYPES:
            raise ConfigError(f"reduce_dtype is {reduce_dtype!r}; it is one of {', '.join(_DTYPES)}.")
        return cls(_DTYPES.get(mixed_precision), _DTYPES[reduce_dtype])

    def compute_dtype(self, tensor: Tensor) -> torch.dtype:
        """The dtype in which this weight computes. Integer codes stay what they are."""
        if self.compute is None or not tensor.is_floating_point() or tensor.element_size() == 1:
            return tensor.dtype
        return self.compute

    @staticmethod
    def master_dtype(tensor: Tensor) -> torch.dtype:
        """The dtype in which a trained weight is kept: fp32, or fp64 for one that the user keeps in fp64."""
        return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class LossScaler:
    """Multiplies the loss so that fp16 gradients neither vanish nor overflow; a factor of 1 that never moves otherwise.

    When a step's gradients overflow, the step is skipped and the scale falls by `backoff_factor`; after
    `growth_interval` steps without one it rises by `growth_factor`. Source: Mixed Precision Training (arXiv 1710.03740).
    The steps of several optimizers between two backwards are one round, which counts once, as by one `update` of torch's
    GradScaler: an overflow of any makes the scale fall.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float = 2.0**-14,
        dynamic: bool = True,
    ) -> None:
        if enabled and (init_scale <= 0 or growth_factor < 1 or not 0 < backoff_factor < 1 or growth_interval < 1):
            raise ConfigError(
                "loss scale: init_scale must be above 0, growth_factor at least 1, backoff_factor between "
                "0 and 1, growth_interval at least 1."
            )
        self.enabled = enabled
        self.value = float(init_scale) if enabled else 1.0
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.min_scale = min_scale
        self.dynamic = dynamic
        self.good_steps = 0
        self._next = self.value
        self._good_before = 0  # steps, when the round began
        self._overflowed = False  # in this round

    @classmethod
    def for_precision(cls, precision: Precision, **settings: float) -> LossScaler:
        """Enabled for fp16 only. settings: keywords of the constructor."""
        return cls(enabled=precision.compute is torch.float16, **settings)  # type: ignore[arg-type]

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale. From here to the next call, `value` is what the gradients carry."""
        self.value, self._good_before, self._overflowed = self._next, self.good_steps, False
        return loss * self.value if self.enabled else loss

    def update(self, overflowed: bool, *, step: int, say: bool) -> None:
        """Move the scale after one optimizer's step. step: its number, for the message. say: log it (one rank does)."""
        if not self.enabled:
            return
        self._overflowed |= overflowed
        self.good_steps, self._next = 0 if self._overflowed else self._good_before + 1, self.value
        if self.dynamic and self._overflowed:
            self._next = max(self.value * self.backoff_factor, self.min_scale)
        elif self.dynamic and self.good_steps >= self.growth_interval:
            self.good_steps = 0
            self._next = min(self.value * self.growth_factor, _LARGEST)
        if overflowed and say:
            hint = ""
            if self._next == self.value:
                hint = " It cannot fall further: the model overflows in fp16. Use bf16, or lower the learning rate."
            log.warning(
                "step %d skipped: gradients overflowed in fp16. Loss scale %g -> %g.%s",
                step,
                self.value,
                self._next,
                hint,
            )

    @property
    def coming(self) -> float:
        """The scale of the next loss: after a step the one that it has led to."""
        return self._next

    def state_dict(self) -> dict[str, float]:
        return {"value": self._next, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = self._next = float(state["value"])
        self.good_steps = self._good_before = int(state["good_steps"])
        self._overflowed = False
