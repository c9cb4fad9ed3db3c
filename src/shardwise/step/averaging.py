"""An exponential moving average of a prepared model's trained weights, in shards.

Each rank averages the masters that it steps anyway, where they rest and in their precision (fp32 under bf16 and fp16), so
that an update sends nothing and no device holds more than one unit's.

    rank 0   master [0, 2048)      average [0, 2048) = decay * average + (1 - decay) * master
    rank 1   master [2048, 4096)   average [2048, 4096)

The numbers are those of torch's `AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))`: the first update copies.
Frozen weights are their own average; buffers are the model's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ConfigError, PrepareError
from ..offload.store import Slab
from ..plan.plan import Tier
from ..zero.sharded import ShardedModel
from ..zero.trained import Trained
from . import intervals
from .intervals import Interval


class ShardedEMA:
    """The average of one model. Made by `accelerator.ema`; `save_state` and `load_state` keep it.

    model:   prepared. decay: the average's share in an update, from 0 to 1.
    updates: how many there have been.
    It takes the masters' bytes once more on each rank, on the tier of the optimizer's states. Making one is collective.
    """

    def __init__(self, model: ShardedModel, decay: float) -> None:
        model.ranks.require_same("ema", {"decay": decay})
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"ema: decay is {decay}, which is not between 0 and 1. A usual one is 0.999.")
        self.model = model
        self.decay = decay
        self.updates = 0
        self._slabs: dict[Trained, Slab] = {}
        model.settle()
        self._adopt()
        model.thawing.then.append(weakref.WeakMethod(self._take_thawed))

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in, once: after an optimizer's step, as torch's `update_parameters`. On every rank.

        With optimizer states on the CPU or on drives the host waits for what is under way.
        Raises PrepareError for a released model, and inside `swapped`.
        """
        self._refuse("update")
        trained = self.model.trained()
        if all(g.master.tier is Tier.GPU for g in trained):
            self.model.follow_weights()
        else:
            self.model.settle()
        for g in trained:
            now, slab = self.model.engine.fetched(g.master), self._slabs[g]
            if not self.updates:
                self._put(now, slab)
            elif slab.tier is Tier.GPU:
                slab.tensor.lerp_(now, 1 - self.decay)
            else:
                self._put(self.model.engine.fetched(slab).lerp_(now, 1 - self.decay), slab)
        self.updates += 1
        self.model.engine.drain()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averages: evaluate, generate, save_model, save_pretrained, gathered. Collective.

        Afterwards it has its own weights again, to the bit. Train, save_state and load_state outside.
        Raises PrepareError for a released model, and for a model that has averages already.
        """
        self._refuse("swapped")
        self._exchange()
        self.model.swapped = True
        try:
            yield
        finally:
            self.model.swapped = False
            self._exchange()

    @property
    def slabs(self) -> list[Slab]:
        """What the averages rest in."""
        return list(self._slabs.values())

    def intervals(self) -> list[Interval]:
        """This rank's part, for a checkpoint."""
        return intervals.trained(self.model, self._slabs.__getitem__)

    def _refuse(self, verb: str) -> None:
        name = type(self.model.model).__name__
        if self.model.released:
            raise PrepareError(
                f"ema.{verb}: its {name} has been released (free_memory). Prepare it, and make a new average."
            )
        if self.model.swapped:
            raise PrepareError(
                f"ema.{verb} inside `swapped`: the {name} has averaged weights there. Leave that block first."
            )

    @torch.no_grad()
    def _exchange(self) -> None:
        """Averages and masters change places, and the weights that compute follow. Collective."""
        self.model.settle()
        for g in self.model.trained():
            slab = self._slabs[g]
            master, average = (self.model.engine.fetched(held).clone() for held in (g.master, slab))
            self._put(average, g.master)
            self._put(master, slab)
        self.model.engine.drain()
        intervals.publish(self.model)

    @torch.no_grad()
    def _adopt(self) -> None:
        """Begin with the weights, where there is no average of them yet."""
        for g in self.model.trained():
            if g not in self._slabs:
                store = self.model.engine.stores.of(g.plan.optimizer.tier, "optimizer")
                self._slabs[g] = store.allocate(g.master.numel, g.master.dtype, f"{g.name}.average")
                self._put(self.model.engine.fetched(g.master), self._slabs[g])
        self.model.engine.drain()

    def _take_thawed(self, thawed: set[int]) -> None:
        self._adopt()

    def _put(self, values: Tensor, slab: Slab) -> None:
        if slab.tier is Tier.GPU:
            slab.tensor.copy_(values)
        else:
            self.model.engine.put_to_rest(values, slab)


def refuse_swapped(models: Sequence[ShardedModel], verb: str) -> None:
    """Raise PrepareError if one of them has averaged weights now, which `verb` would take for its own."""
    for model in models:
        if model.swapped:
            raise PrepareError(
                f"{verb} inside `ema.swapped()`: the {type(model.model).__name__} has averaged weights there, not those "
                "that it trains. Leave that block first."
            )
