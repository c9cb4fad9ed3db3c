"""Small blocks share a unit on GPUs; here they are made to on a CPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import _patch, patch

from rig.engine import Block

BLOCK_NBYTES = sum(p.numel() * p.element_size() for p in Block().parameters())


def grouped(blocks: int) -> _patch[Any]:
    """Inside, at most so many of a tower's blocks share a unit."""
    from shardwise.plan.units import FoundUnits

    real = FoundUnits.within
    return patch.object(FoundUnits, "within", lambda self, _: real(self, blocks * BLOCK_NBYTES))
