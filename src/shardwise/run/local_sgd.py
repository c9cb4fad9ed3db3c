"""Local SGD: ranks step by themselves, and average their weights every so many steps.

    with LocalSGD(accelerator, model, local_sgd_steps=8) as local_sgd:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()

Source: Stich, Local SGD Converges Fast and Communicates Little (arXiv 1805.09767). What happens to a model: `zero/alone.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from torch import nn

from ..errors import ConfigError, PrepareError
from ..zero.alone import average, check_whole, training_alone
from ..zero.sharded import ShardedModel, find_sharded
from .process import PartialState


class LocalSGD:
    """A block in which the ranks train `model` each for itself, and average its trained weights.

    accelerator:     the one that has prepared the model. model: at zero_stage 0, where each rank has all of it.
    local_sgd_steps: calls of `step` between two averages, the same on all ranks; the end of the block averages too.
    enabled:         False, and a run of one process, makes the block do nothing.
    Optimizer states stay each rank's own, so that `save_state` behind the block keeps rank 0's. Collective.
    Raises PrepareError for a model that is not prepared, or is sharded; ConfigError for local_sgd_steps that are no count.
    """

    def __init__(
        self, accelerator: PartialState, model: nn.Module, local_sgd_steps: int | None, enabled: bool = True
    ) -> None:
        self.enabled = enabled and accelerator.num_processes > 1
        self.num_steps = 0
        self.accelerator = accelerator
        self.model = model
        self.local_sgd_steps = local_sgd_steps
        self._block: AbstractContextManager[None] | None = None
        if not enabled:
            return
        if not isinstance(local_sgd_steps, int) or local_sgd_steps < 1:
            raise ConfigError(f"LocalSGD: local_sgd_steps is {local_sgd_steps!r}; it is a whole number from 1 on.")
        found = find_sharded(model)
        if found is not None:
            check_whole(found)

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            sharded = self._sharded
            sharded.ranks.require_same("LocalSGD", {"local_sgd_steps": self.local_sgd_steps})
            self._block = training_alone(sharded)
            self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(kind, error, trace)

    def step(self) -> None:
        """Count a step, after the optimizer's; at every `local_sgd_steps`th the weights are averaged. Collective then."""
        self.num_steps += 1
        if self._block is not None and self.num_steps % (self.local_sgd_steps or 1) == 0:
            average(self._sharded)

    @property
    def _sharded(self) -> ShardedModel:
        found = find_sharded(self.model)
        if found is None:
            raise PrepareError(f"LocalSGD: this {type(self.model).__name__} is not prepared. Prepare it before.")
        return found
