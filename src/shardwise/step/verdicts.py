"""What each rank says of itself in the one message of a step, and the error of all ranks that follows from it.

A rank's loss may be NaN, or it may clip by another number than the others, or step with another learning rate, as after a
schedule that looks at each rank's own validation loss: it would step alone, in silence. A step sends one all_reduce in any
case, so every rank adds a few numbers of its own to it.

The sum of squares is that of one copy of the model, whatever is sharded: `zero/norms.py`.

    message   sum of squares | rank 0: loss is bad, learning rate, max_norm, ... | rank 1: ... | ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config.agreement import differences, disagreement
from ..errors import ConfigError, NonFiniteError
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks

# Of each rank, behind whether its loss is bad.
_NAMES = (
    "the sum of the groups' learning rates",
    "max_norm of clip_grad_norm_",
    "norm_type of clip_grad_norm_",
    "clip_value of clip_grad_value_",
)
_NUMBERS = 1 + len(_NAMES)


class Verdicts:
    """This rank's verdict on the coming step, and what is known of all ranks' on earlier ones.

    On a GPU the message of a step is read at the next one: reading it at once would stall the host until the GPU has caught up.
    """

    def __init__(self, ranks: Ranks, lanes: Lanes) -> None:
        self._ranks, self._lanes = ranks, lanes
        self._bad_loss: Tensor | None = None
        self._clipping = [0.0] * (len(_NAMES) - 1)
        self._unread: tuple[int, Tensor, torch.Event] | None = None

    @property
    def numel(self) -> int:
        """Numbers that the ranks add to the message."""
        return _NUMBERS * self._ranks.world_size

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether this micro-batch's loss is finite. No synchronisation."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad

    def note_clipping(self, *, max_norm: float = 0.0, norm_type: float = 0.0, clip_value: float = 0.0) -> None:
        """Remember by how much the script clips; of several calls in one step the sums."""
        self._clipping = [a + b for a, b in zip(self._clipping, (max_norm, norm_type, clip_value), strict=True)]

    def forget(self) -> None:
        """There will be no step of what was noted."""
        self._bad_loss = None
        self._clipping = [0.0] * len(self._clipping)

    def begin_anew(self) -> None:
        """Forget also what all ranks have said: another run's states were loaded."""
        self.forget()
        self._unread = None

    def write(self, message: Tensor, groups: Iterable[Mapping[str, Any]]) -> None:
        """Put this rank's numbers into `message`, (numel,) zeros, and begin anew. groups: the optimizer's."""
        mine = message[_NUMBERS * self._ranks.rank :]
        if self._bad_loss is not None:
            mine[0] = self._bad_loss
        # A rate that is a tensor may lie on the device, where reading it would stall the host.
        rate = sum(group["lr"] for group in groups if isinstance(group.get("lr"), (int, float)))
        for place, number in enumerate((rate, *self._clipping), 1):
            if number:
                mine[place].fill_(number)  # to assign it would copy it from the host, which waits for the device
        self.forget()

    def read(self, step: int, message: Tensor) -> None:
        """All ranks' numbers: raises NonFiniteError or ConfigError, on a GPU at the next `raise_if_bad`."""
        if message.device.type == "cpu":
            self._raise_for(step, message)
            return
        copy = torch.empty(message.shape, dtype=message.dtype, pin_memory=True)
        copy.copy_(message, non_blocking=True)
        event = self._lanes.mark_compute()
        assert event is not None
        self._unread = (step, copy, event)

    def unread(self) -> Callable[[], None] | None:
        """What waits for the last message that was sent, and raises what it says; for another thread. None: it was read."""
        if self._unread is None:
            return None
        step, message, event = self._unread

        def read() -> None:
            event.synchronize()
            self._raise_for(step, message)

        return read

    def raise_if_bad(self) -> None:
        """Raise what the last message that was sent says; every rank raises it."""
        if self._unread is not None:
            (step, message, event), self._unread = self._unread, None
            event.synchronize()
            self._raise_for(step, message)

    def _raise_for(self, step: int, message: Tensor) -> None:
        rows = message.view(-1, _NUMBERS).tolist()
        bad = [rank for rank, row in enumerate(rows) if row[0]]
        if bad:
            where = ", ".join(map(str, bad))
            raise NonFiniteError(
                f"the loss is NaN or infinite at step {step} on rank {where}. Look at that rank's batch, lower the learning "
                "rate, or clip gradients (gradient_clipping: 1.0)."
            )
        if all(row[1:] == rows[0][1:] for row in rows):
            return
        # Seven digits are what a float32 holds.
        differing = differences(
            [
                {name: f"{number:.7g}" if number else "not given" for name, number in zip(_NAMES, row[1:], strict=True)}
                for row in rows
            ]
        )
        if differing:
            remedy = (
                "Every rank steps by the same numbers: give a schedule, or clipping, what all ranks have in common."
            )
            raise ConfigError(disagreement(f"{{ranks}} step differently at step {step}", differing, remedy))
