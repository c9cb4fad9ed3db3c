"""Which plan to take: of those that fit the fastest, or, where times are not modelled, the first in an order of costs.

Times are modelled for GPUs and a batch (`plans.py`). Elsewhere the order is that of what a plan costs beside its computing:

1. Nothing offloaded, nothing recomputed. Stage 2 has a copy's traffic and less memory than 1, which is first where
   micro-batches add up: it reduces once a step. Stage 3 gathers every weight twice.
2. The same with blocks recomputed, a third more computing at the most.
3. Optimizer states on the host: bytes over the link once a step. Parameters too: over the link in both passes.
4. The same on a drive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from ..errors import OptimizerError
from .bytes import CHOICES, Choice, Machine, Run, estimate
from .plans import Planned, far, nearly_fastest
from .times import NOTHING, Way


def fastest(plans: Sequence[Planned]) -> Planned | None:
    """The plan whose step takes least of those that fit, and of equal ones the one that asks for least; None if none fits."""
    fitting = [one for one in plans if one.fits]
    return nearly_fastest(fitting) if fitting else None


def first_that_fits(model: nn.Module, run: Run, machine: Machine) -> Planned | None:
    """The first plan in the order that fits `machine`, as far as it is known; None if none does.

    Without a batch activations are not counted, and recomputing them is never needed.
    """
    for choice, recomputes in order_of(run):
        batch = None if run.batch is None else replace(run.batch, checkpointing=recomputes)
        try:
            found = estimate(model, choice, replace(run, batch=batch))
        except OptimizerError:
            continue  # `prepare` would refuse it too
        if not machine.shortages(found, run):
            return Planned(choice, Way(recomputes), found, NOTHING)
    return None


def order_of(run: Run) -> Iterator[tuple[Choice, bool]]:
    """Plans, and whether blocks are recomputed, as they are to be tried."""
    stages = (1, 2, 3) if run.accumulates else (2, 3)
    places = dict.fromkeys((choice.param, choice.optimizer) for choice in sorted(CHOICES, key=far))
    for param, optimizer in places:
        # A script that recomputes by itself does so in every plan.
        always = run.batch is not None and run.batch.checkpointing
        for recomputes in (True,) if always else (False, True) if run.batch is not None else (False,):
            yield from (
                (choice, recomputes)
                for choice in (Choice(stage, optimizer, param) for stage in stages)
                if choice in CHOICES
            )
