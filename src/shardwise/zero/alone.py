"""Ranks that train alone for a while, each a whole model of its own on its own batches, and come together by averaging weights.

    gradients     reduced over nobody: each rank steps with its own
    the step      by each rank's own norm; a rate and clipping that differ, and a loss that is NaN, are still an error on all
    averaging     masters, and so the weights that compute, become their mean; optimizer states stay each rank's own

Only where nothing of the model is sharded: a rank that steps a part of every weight cannot step a model of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import PrepareError
from ..plan.plan import Tier
from .gradients import used_by_any
from .sharded import ShardedModel


def check_whole(sharded: ShardedModel) -> None:
    """Raises PrepareError for a model that is sharded: its ranks can only train together."""
    plan = sharded.plan
    if any(placement.sharded for placement in (plan.parameter, plan.gradient, plan.optimizer)):
        raise PrepareError(
            f"the ranks cannot train this {type(sharded.model).__name__} each for itself: its plan shards it ({plan}), so that "
            "each rank steps a part of it. That needs zero_stage 0."
        )


@contextmanager
def training_alone(sharded: ShardedModel) -> Iterator[None]:
    """Inside, each rank trains for itself; at the end the weights are averaged. Collective at both ends.

    After an error nothing is averaged, since other ranks may not come: the ranks' weights differ then.
    Raises PrepareError for a model that is sharded, or trains alone already.
    """
    check_whole(sharded)
    share = sharded.engine.share
    if share.alone:
        raise PrepareError(f"the ranks train this {type(sharded.model).__name__} each for itself already.")
    sharded.settle()
    share.alone = share.apart = True
    try:
        yield
        average(sharded)
        _average_gradients(sharded)
    finally:
        share.alone = False


@torch.no_grad()
def average(sharded: ShardedModel) -> None:
    """Give every rank the mean of the ranks' trained weights, and rank 0's running buffers. Collective."""
    engine = sharded.engine
    sharded.settle()
    for trained in sharded.trained():
        master = engine.fetched(trained.master)
        engine.ranks.all_reduce(master, "mean")
        if trained.master.tier is not Tier.GPU:
            engine.put_to_rest(master, trained.master)
        if not trained.shares_weights:
            kept, event = trained.deliver(master, 0)
            engine.lanes.compute_waits(event)
            del kept
    sharded.running_buffers.step_ends()
    engine.meet()
    engine.drain()


def _average_gradients(sharded: ShardedModel) -> None:
    """What waits for a step as each rank's own becomes the mean, as if the ranks had been together."""
    sharded.look_at_gradients()
    every, ranks = sharded.trained(), sharded.ranks
    waiting = ranks.any_of([trained.gradients.at_rest is not None for trained in every])
    held = [trained for trained, waits in zip(every, waiting, strict=True) if waits]
    gradients = [trained.gradients for trained in held]
    used_by_any(gradients, ranks.any_of([flag for each in gradients for flag in each.used]))
    for trained in held:
        trained.gradients.fill()
        trained.sums.apply_factor()
        rest = trained.sums.arrived()
        assert rest is not None
        mean = rest.to(ranks.device)
        ranks.all_reduce(mean, "mean")
        rest.copy_(mean)
        trained.sums.changed()
        trained.gradients.shown.show()
