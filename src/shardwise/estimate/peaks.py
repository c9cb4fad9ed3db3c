"""Which rows of an estimate are on the device at one time: the highest moment of a step, in place of the sum of all rows.

    the turn      weights, masters, states; what blocks keep for the backward; logits and loss; gathered units
    the backward  the same without activations; gradients, those that are being reduced, gathered units, one recomputed block
    the step      gradients, and what visits the device or is stepped whole

Gradients wait through the turn only where micro-batches are added up. Where these are whole, each unit's sum becomes its
averaged gradient in the last backward, so that both are never there. With a compiled loss, logits and their gradient are there
in 16 bits alone.
"""

from __future__ import annotations

from dataclasses import replace

from ..plan.plan import Tier
from .activations import Batch, DecoderShape, block_nbytes, kept_nbytes, loss_nbytes
from .bytes import Estimate, Run

_HELD = ("frozen", "parameter", "optimizer")
_TURN = (*_HELD, "gathered units", "activations", "logits and loss")
_BACKWARD = (*_HELD, "gathered units", "reductions")
_STEP = (*_HELD, "gradient", "offload staging", "whole steps")


def at_peak(found: Estimate, run: Run) -> Estimate:
    """The estimate with those rows of the GPU alone that its highest moment has; what rests elsewhere is as it was."""
    added = "whole gradients" if ("whole gradients", Tier.GPU) in found.nbytes else "gradient"
    moments = [(*_TURN, added) if run.accumulates else _TURN, (*_BACKWARD, added), _STEP]

    def height(rows: tuple[str, ...]) -> int:
        return sum(count for (row, tier), count in found.nbytes.items() if tier is Tier.GPU and row in rows)

    highest = max(moments, key=height)
    kept = {key: count for key, count in found.nbytes.items() if key[1] is not Tier.GPU or key[0] in highest}
    return replace(found, nbytes=kept)


def with_compiled_loss(found: Estimate, shape: DecoderShape, batch: Batch, itemsize: int) -> Estimate:
    """The estimate where the loss is compiled with the blocks: logits and their gradient, in 16 bits."""
    if batch.loss_chunk is not None:
        return found  # a loss in chunks stays as it is
    loss = min(loss_nbytes(shape, batch, itemsize), 2 * itemsize * batch.tokens * shape.vocabulary)
    least = block_nbytes(shape, batch, itemsize) if batch.checkpointing else 0
    rows = {
        ("activations", Tier.GPU): kept_nbytes(shape, batch, itemsize),
        ("logits and loss", Tier.GPU): max(loss, least),
    }
    return replace(found, nbytes={**found.nbytes, **rows})
