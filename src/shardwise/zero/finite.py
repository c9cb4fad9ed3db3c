"""Whether losses were finite: noted in each backward without holding the host, told by the step to every rank.

On a GPU what a step's ranks have said is read at the next step: to read it at once would make the host wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .collectives import Ranks
from .streams import Lanes


class LossCheck:
    """The losses since one optimizer's last step."""

    def __init__(self, ranks: Ranks, lanes: Lanes) -> None:
        self._ranks = ranks
        self._lanes = lanes
        self._bad: Tensor | None = None
        self._check: tuple[int, Tensor, torch.Event] | None = None

    def note(self, loss: Tensor) -> None:
        """Remember whether this one is finite. No synchronisation."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def forget(self) -> None:
        """Their gradients are thrown away."""
        self._bad = None

    def reset(self) -> None:
        """Another run's state was loaded."""
        self._bad = self._check = None

    def taken(self) -> Tensor | None:
        """Whether any was not finite, for the step that uses them; None if none was noted."""
        bad, self._bad = self._bad, None
        return bad

    def look_at(self, flags: Tensor, step: int) -> None:
        """What every rank has said of the losses of a step. Raises NonFiniteError, perhaps at the next step only."""
        if flags.device.type == "cpu":
            self._raise_for(step, flags)
            return
        # Reading them now would stall the host until the GPU has caught up: read them at the next step.
        copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        event = self._lanes.mark_compute()
        assert event is not None
        self._check = (step, copy, event)

    def raise_if_bad(self) -> None:
        """Raise NonFiniteError if the loss of an earlier step was NaN or infinite on any rank; every rank raises it."""
        if self._check is not None:
            (step, flags, event), self._check = self._check, None
            event.synchronize()
            self._raise_for(step, flags)

    def _raise_for(self, step: int, flags: Tensor) -> None:
        bad = [rank for rank, flag in enumerate(flags.tolist()) if flag]
        if bad:
            where = ", ".join(map(str, bad))
            raise NonFiniteError(
                f"the loss is NaN or infinite at step {step} on rank {where}. Look at that rank's batch, lower the learning "
                "rate, or clip gradients (gradient_clipping: 1.0)."
            )
