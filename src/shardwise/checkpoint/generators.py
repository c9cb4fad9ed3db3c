"""The random generators of a process: Python's, numpy's, torch's, and that of its GPU."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ..ranks.ranks import Ranks

logger = logging.getLogger("shardwise")


def generator_states(device: torch.device) -> dict[str, Any]:
    """The state of each, as numbers and tensors."""
    found = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def check_generator_states(saved: dict[str, Any]) -> None:
    """Raise what Python, numpy or torch raise for a state that they cannot take; the generators stay as they are."""
    random.Random().setstate(saved["python"])
    numpy.random.RandomState().set_state(saved["numpy"])
    torch.Generator().set_state(saved["torch"])


def set_generator_states(saved: Sequence[dict[str, Any]], ranks: Ranks) -> None:
    """Give this rank the states that it had.

    saved: of each rank of the saving run. A rank that it did not have is seeded from rank 0's state and its own number: the
    ranks must not draw the same numbers. Empty ones leave the generators as they are.
    """
    if not saved[0]:
        return
    if ranks.rank < len(saved):
        mine = saved[ranks.rank]
        random.setstate(mine["python"])
        numpy.random.set_state(mine["numpy"])
        torch.set_rng_state(mine["torch"])
        if ranks.device.type == "cuda" and "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], ranks.device)
        return
    digest = hashlib.sha256(bytes(saved[0]["torch"].tolist()) + ranks.rank.to_bytes(4, "little")).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    logger.info("Rank %d was not in the run that was saved: its generators start anew, from seed %d.", ranks.rank, seed)
