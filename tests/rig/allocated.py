"""What a profile of torch says of memory."""

from __future__ import annotations

import torch


def most_in_use(prof: torch.profiler.profile) -> int:
    """Bytes that were allocated and not yet freed, at the worst moment."""
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
