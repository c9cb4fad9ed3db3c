"""Numbers that are on their way from the device to the host, and are read when they have come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks.lanes import compute_stream


class Late:
    """numbers: (n,) on any device, or a list. It gives what they were when it was made; making it waits for nothing."""

    def __init__(self, numbers: Tensor | list[float]) -> None:
        self._event: torch.Event | None = None
        self._values: list[float] = []
        if isinstance(numbers, list):
            self._values = numbers
            return
        stream = compute_stream(numbers.device)
        if stream is None:
            self._values = numbers.tolist()
            return
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._numbers.copy_(numbers.detach(), non_blocking=True)
        self._event = stream.record_event()

    def has_come(self) -> bool:
        return self._event is None or bool(self._event.query())

    def read(self) -> list[float]:
        """The numbers; waits for the device if they have not come."""
        if self._event is not None:
            self._event.synchronize()
            self._values, self._event = self._numbers.tolist(), None
        return self._values
