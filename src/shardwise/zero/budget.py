"""The device's memory beyond what the plan needs: who spends it, when, and what is kept free.

    step 1   makes the optimizer's states
    step 2   its peak is measured; what the plan offloads or shards stays on the device, as far as it fits (residency.py)
    step 3   its peak is measured; blocks keep their activations, as far as they fit (recomputing.py)
    while a model generates, gathered weights stay, of a budget of their own (generation.py)

Who comes later measures what the one before has left, so no byte is spent twice.
"""

from __future__ import annotations

import torch

# After how many steps: a block's activations are counted in the second one; what stays is filled; then activations are kept.
COUNTED_AFTER = 1
FILLED_AFTER = 2
KEPT_AFTER = 3
# Of the budget, kept free: the allocator's fragments, and steps that need more than the measured one.
_RESERVE = 0.05
# Of all memory, kept free of weights that stay for a generation: its keys, values and activations.
_GENERATION_RESERVE = 0.1


class Budget:
    """What may be spent on `device`. limit: bytes for this process; "auto" for all that the device has; None for nothing."""

    def __init__(self, device: torch.device, limit: int | str | None) -> None:
        self.device = device
        self.limit = limit

    def peak(self, *, reserved: bool) -> int:
        """The most bytes in use since the peak was last reset, or `reserved` by the allocator; a CPU has none."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.max_memory_reserved(self.device) if reserved else torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def beside(self, peak: int) -> int:
        """Bytes that are left beside a peak of this process; on a CPU all of a number, and nothing of "auto"."""
        if self.limit is None:
            return 0
        if self.device.type != "cuda":
            return 0 if isinstance(self.limit, str) else self.limit
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)  # contexts, communicators, other processes
        limit = total if isinstance(self.limit, str) else min(self.limit, total)
        return int(limit * (1 - _RESERVE)) - peak - others

    def for_generation(self) -> int:
        """Bytes that gathered weights may take while a model generates: a number is taken as it is."""
        if self.limit is None:
            return 0
        if not isinstance(self.limit, str):
            return self.limit
        if self.device.type != "cuda":
            return 1 << 62
        free, total = torch.cuda.mem_get_info(self.device)
        # What the allocator holds and nobody uses is free too.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(0, int(free - _GENERATION_RESERVE * total))
