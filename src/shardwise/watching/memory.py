"""Bytes that this process takes now, and took at most, by tier: the device, the host, drives.

Nothing polls: torch and the kernel keep the largest values themselves, and what lies on drives is the engine's to say.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from typing import IO

import torch

from ..plan.plan import Tier

Ledger = dict[tuple[str, Tier], int]
Level = dict[str, int]
Levels = dict[str, Level | None]
_AGE_S = 0.2  # asking a GPU's allocator takes as long as the rest of a line
_KIB = 1024  # ru_maxrss's unit on Linux
_PAGE = resource.getpagesize()


class Memory:
    """What a process takes by tier.

    device: the rank's.
    ledger: gives the bytes at rest by role and tier.
    """

    def __init__(self, device: torch.device, ledger: Callable[[], Ledger]) -> None:
        self._device = device if device.type == "cuda" else None
        # Kept open: a third of what psutil takes, which opens it for each question.
        self._statm: IO[bytes] = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 - closed with this object
        self._ledger = ledger
        self._device_peak = self._drive_peak = 0
        self._drive: int | None = None
        self._seen: Levels | None = None
        self._seen_at = 0.0
        self.look_at_drives()

    def close(self) -> None:
        """It is not read again."""
        self._statm.close()

    def look_at_drives(self) -> None:
        """Count what rests on drives; it changes when something is prepared, and when an optimizer makes its states."""
        on_drives = [count for (_, tier), count in self._ledger().items() if tier.on_disk]
        self._drive = sum(on_drives) if on_drives else None
        self._drive_peak = max(self._drive_peak, self._drive or 0)
        self._seen = None

    def read(self) -> Levels:
        """`now` and `peak` by tier, in bytes, of the last 0.2 s; None for a tier that there is not."""
        now = time.monotonic()
        if self._seen is None or now - self._seen_at > _AGE_S:
            self._seen, self._seen_at = self._look(), now
        return self._seen

    def _look(self) -> Levels:
        host = int(os.pread(self._statm.fileno(), 128, 0).split()[1]) * _PAGE
        found: Levels = {
            "device": None,
            "host": {"now": host, "peak": max(host, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB)},
            "drive": None if self._drive is None else {"now": self._drive, "peak": self._drive_peak},
        }
        if self._device is not None:
            # A MemoryTracker may have begun the maximum anew: what was seen before still counts.
            self._device_peak = max(self._device_peak, torch.cuda.max_memory_allocated(self._device))
            found["device"] = {"now": torch.cuda.memory_allocated(self._device), "peak": self._device_peak}
        return found
