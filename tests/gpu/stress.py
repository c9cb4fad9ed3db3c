"""Delays that turn a missing wait between streams into other numbers.

A lane that overlaps by luck computes the right thing until something is late. Here everything is late at random, in
another way on every rank: the host between modules, the compute stream, the lanes of the collectives, the copies. Freed
blocks are overwritten with NaN by the next allocation on the same stream, so that whoever still reads one gets NaN.
Whatever the delays, the losses must stay the same bits. Without CUDA only the host is delayed.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.ranks.ranks import Ranks

_CYCLES = 1_500_000  # about 0.8 ms at 1.8 GHz
_HOST_S = 1e-3
_POISON_NUMEL = (1_000, 40_000, 300_000)


class Delays:
    """Delays what is registered with it, while `active`."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks = ranks
        self.random = random.Random(1000 * seed + ranks.rank)
        self.cuda = ranks.device.type == "cuda"
        self.active = True

    def host(self) -> None:
        if self.active and self.random.random() < 0.3:
            time.sleep(self.random.random() * _HOST_S)

    def stream(self, chance: float = 0.4) -> None:
        """Hold up the current stream, and leave NaN in a block that this stream's next allocation may get."""
        if not self.active or not self.cuda or self.random.random() > chance:
            return
        torch.cuda._sleep(self.random.randrange(_CYCLES))
        torch.full((self.random.choice(_POISON_NUMEL),), float("nan"), device=self.ranks.device)

    def watch(self, model: nn.Module) -> None:
        """Delay before every module with parameters of its own, in forward and in backward. Call before sharding."""
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.host()
        self.stream()

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._in_backward)

    def _in_backward(self, gradient: Tensor) -> None:
        self.host()
        self.stream()

    @contextlib.contextmanager
    def lanes(self) -> Iterator[None]:
        """Delay the collectives of `ranks` and the copies, on whatever stream they are issued."""
        names = (
            *("all_gather", "all_gather_together", "reduce_scatter", "all_reduce_gradient", "all_reduce", "all_to_all"),
            "fence",
        )
        real_copy = Tensor.copy_

        def late_copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if self.cuda and torch.cuda.current_stream() != torch.cuda.default_stream():
                self.stream(chance=0.3)
            return real_copy(target, source, non_blocking)

        group = self.ranks.shards  # all ranks: what goes over the run goes through it too
        for name in names:
            setattr(group, name, self._late(getattr(group, name)))
        Tensor.copy_ = late_copy  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Tensor.copy_ = real_copy  # type: ignore[method-assign]
            for name in names:
                delattr(group, name)

    def _late(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def late(*args: Any, **kwargs: Any) -> Any:
            self.host()
            self.stream()
            result = collective(*args, **kwargs)
            self.stream()
            return result

        return late
