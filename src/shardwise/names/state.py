"""What accelerate's `state` and `utils.random` have beside the states and the collectives of `run/process.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..run.joined import accelerator_in_force
from ..run.process import synchronize_rng_states


def is_initialized() -> bool:
    """Whether an Accelerator has been made in this process, so that AcceleratorState has something to say."""
    return accelerator_in_force() is not None


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes everything and gives None."""


def synchronize_rng_state(rng_type: Any = None, generator: torch.Generator | None = None) -> None:
    """As `synchronize_rng_states([rng_type], generator)`. Collective."""
    synchronize_rng_states([str(getattr(rng_type, "value", rng_type))], generator)
