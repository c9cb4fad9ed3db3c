"""DeepSpeed's five learning-rate schedules, by the formulae of its documentation.

    i          steps taken, counted by `step()` from 0; -1 before the first
    WarmupLR   low + (high - low) * w(i),  w = log(i + 1) / log(n) or i / n until n, then 1
    WarmupDecayLR   the same until n, then high times (total - i) / (total - n), not below 0
    WarmupCosineLR  the group's own rate times a warmup from a ratio, then times half a cosine down to another
    LRRangeTest     low * (1 + rate * (i + 1) / size), the quotient rounded down for a staircase
    OneCycle        up over the first half of a cycle and down over the second, momentum the other way; then both decay

Source: https://deepspeed.readthedocs.io/en/latest/schedulers.html. The engine steps them behind every
step that was not skipped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError

Numbers = float | Sequence[float]

VALID_LR_SCHEDULES = ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
# The names under which programs write their configurations: WARMUP_LR is "WarmupLR", WARMUP_MIN_LR is "warmup_min_lr".
LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = VALID_LR_SCHEDULES
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"
KEYS = (
    *("lr_range_test_min_lr", "lr_range_test_step_rate", "lr_range_test_step_size", "lr_range_test_staircase"),
    *("cycle_first_step_size", "cycle_first_stair_count", "cycle_second_step_size", "cycle_second_stair_count"),
    *("decay_step_size", "cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "cycle_min_mom", "cycle_max_mom"),
    *("decay_mom_rate", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "warmup_min_ratio"),
    *("cos_min_ratio", "total_num_steps"),
)


def __getattr__(name: str) -> str:
    """The name of a key of `params`, in capitals."""
    if name.isupper() and name.lower() in KEYS:
        return name.lower()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Schedule(ABC):
    """optimizer: has `param_groups`, into which rates are written. last_batch_iteration: i, where a run goes on."""

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        if last_batch_iteration == -1:
            self._write(self.get_lr())

    @abstractmethod
    def get_lr(self) -> list[float]:
        """The rate of each group at i."""

    def get_last_lr(self) -> list[float]:
        """The rates that were written last."""
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """The next i, or the one given."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._write(self.get_lr())

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._write(self.get_lr())

    def _write(self, rates: Sequence[float]) -> None:
        self._last_lr = list(rates)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # which the script holds too
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _check_count(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{type(self).__name__}: {name} is {value!r}; it is a whole number of at least 1.")

    def _each(self, value: Numbers, name: str) -> list[float]:
        """One number for each group."""
        groups = len(self.optimizer.param_groups)
        if isinstance(value, (int, float)):
            return [float(value)] * groups
        if len(value) != groups:
            raise ConfigError(f"{type(self).__name__}: {name} has {len(value)} numbers for {groups} parameter groups.")
        return [float(number) for number in value]


class _Warming(Schedule):
    """What begins with a warmup of `warmup_num_steps`, "log" or "linear"."""

    def __init__(self, optimizer: Any, steps: int, kind: str, last_batch_iteration: int) -> None:
        self._check_count("warmup_num_steps", steps)
        if kind not in ("log", "linear"):
            raise ConfigError(f"{type(self).__name__}: warmup_type is {kind!r}; it is 'log' or 'linear'.")
        self.warmup_num_steps = max(2, int(steps))  # the logarithm of 1 is no divisor
        self.warmup_type = kind
        super().__init__(optimizer, last_batch_iteration)

    def _warmed(self) -> float:
        """From 0 to 1."""
        i = self.last_batch_iteration
        if i >= self.warmup_num_steps:
            return 1.0
        if self.warmup_type == "log":
            return math.log(i + 1) / math.log(self.warmup_num_steps)
        return i / self.warmup_num_steps


class WarmupLR(_Warming):
    """From warmup_min_lr to warmup_max_lr, else to each group's own rate, and there it stays."""

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Numbers = 0.0,
        warmup_max_lr: Numbers | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.optimizer = optimizer
        own = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = self._each(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = self._each(own if warmup_max_lr is None else warmup_max_lr, "warmup_max_lr")
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def get_lr(self) -> list[float]:
        if self.last_batch_iteration < 0:
            return list(self.min_lrs)
        share = self._share()
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _share(self) -> float:
        return self._warmed()


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, and then down to warmup_min_lr in a line that ends at total_num_steps."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: Numbers = 0.0,
        warmup_max_lr: Numbers = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _share(self) -> float:
        i, warm, total = self.last_batch_iteration, self.warmup_num_steps, self.total_num_steps
        return self._warmed() if i < warm else max(0.0, (total - i) / max(1.0, total - warm))


class WarmupCosineLR(_Warming):
    """Ratios of each group's own rate: from warmup_min_ratio to 1, and by half a cosine to cos_min_ratio at total_num_steps."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def get_lr_ratio(self) -> float:
        i, warm = self.last_batch_iteration, self.warmup_num_steps
        if i < warm:
            share = self._warmed() if i >= 0 else 0.0
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * share
        turned = min(1.0, (i - warm + 1) / max(1, self.total_num_steps - warm))  # behind the end the floor stays
        share = (1 + math.cos(math.pi * turned)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * share)

    def get_lr(self) -> list[float]:
        ratio = self.get_lr_ratio()
        return [rate * ratio for rate in self.org_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "org_lrs": self.org_lrs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.org_lrs = list(state.get("org_lrs", self.org_lrs))
        super().load_state_dict(state)


class LRRangeTest(Schedule):
    """Rates that rise from lr_range_test_min_lr on, to find where training breaks."""

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: Numbers = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.optimizer = optimizer
        self._check_count("lr_range_test_step_size", lr_range_test_step_size)
        self.min_lr = self._each(lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size, self.step_rate = lr_range_test_step_size, lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        intervals = (self.last_batch_iteration + 1) / self.step_size
        factor = 1 + self.step_rate * (math.floor(intervals) if self.staircase else intervals)
        return [low * factor for low in self.min_lr]


class OneCycle(Schedule):
    """One cycle of rates up and down, of the first beta down and up, and a decay of both behind it.

    A stair count holds them flat over each of so many stairs of a half. Source: Super-Convergence (arXiv 1708.07120).
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: Numbers,
        cycle_max_lr: Numbers,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Numbers = 0.8,
        cycle_max_mom: Numbers = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.optimizer = optimizer
        self.min_lrs = self._each(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._each(cycle_max_lr, "cycle_max_lr")
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        if cycle_first_step_size <= 0 or second < 0:
            raise ConfigError(
                f"OneCycle: cycle_first_step_size is {cycle_first_step_size} and cycle_second_step_size {second}; the first is "
                "above 0, the second at least 0."
            )
        self.step_sizes = float(cycle_first_step_size), float(second)
        stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.stair_counts = cycle_first_stair_count, stairs
        self.total_size = float(cycle_first_step_size + second)
        self.step_ratio = cycle_first_step_size / self.total_size
        self.decay_lr_rate, self.decay_mom_rate, self.decay_step_size = decay_lr_rate, decay_mom_rate, decay_step_size
        self.min_moms = self._each(cycle_min_mom, "cycle_min_mom")
        self.max_moms = self._each(cycle_max_mom, "cycle_max_mom")
        self.cycle_momentum = cycle_momentum and all("betas" in group for group in optimizer.param_groups)
        super().__init__(optimizer, last_batch_iteration)

    def _scale(self) -> float:
        """From 0 at the ends of the cycle to 1 where its halves meet."""
        here = (self.last_batch_iteration + 1) % self.total_size
        rising = here <= self.step_sizes[0]
        steps, size = (here, self.step_sizes[0]) if rising else (self.total_size - here, self.step_sizes[1])
        stairs = self.stair_counts[0 if rising else 1]
        return math.floor(steps * stairs / size) / stairs if stairs > 0 else steps / size

    def _decayed(self, rate: float) -> float:
        if self.decay_step_size == 0:
            return 1.0
        return 1 + rate * (self.last_batch_iteration - self.total_size + 1) / self.decay_step_size

    @property
    def _in_cycle(self) -> bool:
        return self.last_batch_iteration < self.total_size

    def get_lr(self) -> list[float]:
        if self._in_cycle:
            scale = self._scale()
            return [low + (high - low) * scale for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        factor = self._decayed(self.decay_lr_rate)
        return [low / factor for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each group at i; None where the optimizer has none."""
        if not self.cycle_momentum:
            return None
        if self._in_cycle:
            scale = self._scale()
            firsts = [high - (high - low) * scale for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        else:
            firsts = [high * self._decayed(self.decay_mom_rate) for high in self.max_moms]
        return [(first, group["betas"][1]) for first, group in zip(firsts, self.optimizer.param_groups, strict=True)]

    def _write(self, rates: Sequence[float]) -> None:
        super()._write(rates)
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or (), strict=False):
            group["betas"] = betas
