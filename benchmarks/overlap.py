"""What a profiler trace says about overlap: how much of the gathers ran under compute, and how much stood alone.

Kernels are intervals on the device's clock. Gathers are NCCL's all-gather kernels and copies between GPUs; compute is every
kernel that is not NCCL's. `hidden` is the length of the intersection of the two unions, `exposed` the rest of the gathers:
the time in which the device did nothing but wait for weights. The arithmetic is pure and works on the events of any Chrome
trace.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from place import Place

Interval = tuple[float, float]

_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_LARGEST_TRACE = 13 * 2**20


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """The measure of the union."""
    return sum(end - start for start, end in union(intervals))


def intersection(left: Iterable[Interval], right: Iterable[Interval]) -> float:
    """How long both unions are active at the same time."""
    a, b = union(left), union(right)
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def kind_of(event: dict[str, Any]) -> str | None:
    """gather, reduce, other_nccl, compute, copy or memset; None for what does not run on the device."""
    if event.get("ph") != "X" or event.get("cat") not in _DEVICE_CATEGORIES:
        return None
    if event["cat"] == "gpu_memcpy":
        # From one GPU to another: a gather by copy engines.
        return "gather" if "PtoP" in event["name"] else "copy"
    if event["cat"] == "gpu_memset":
        return "memset"
    name = event["name"].lower()
    if "nccl" not in name:
        return "compute"
    if "allgather" in name:
        return "gather"
    return "reduce" if "reducescatter" in name or "allreduce" in name else "other_nccl"


def summarise(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds by kind, and what of gathers and reduces is hidden under compute and exposed.

    Times of one kind are lengths of unions: two kernels at once count once. `streams`: those that each kind used.
    """
    found: dict[str, list[Interval]] = {}
    streams: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for event in events:
        kind = kind_of(event)
        if kind is None:
            continue
        found.setdefault(kind, []).append((event["ts"], event["ts"] + event["dur"]))
        streams.setdefault(kind, set()).add(event.get("args", {}).get("stream", event.get("tid", -1)))
        counts[kind] = counts.get(kind, 0) + 1
    everything = [interval for intervals in found.values() for interval in intervals]
    compute = found.get("compute", [])
    summary: dict[str, Any] = {
        "span_ms": (max(e for _, e in everything) - min(s for s, _ in everything)) / 1000 if everything else 0.0,
        "idle_ms": 0.0,
        "kernels": counts,
        "streams": {kind: sorted(used) for kind, used in streams.items()},
    }
    summary["idle_ms"] = summary["span_ms"] - length(everything) / 1000
    for kind, intervals in found.items():
        summary[f"{kind}_ms"] = length(intervals) / 1000
    for kind in ("gather", "reduce"):
        hidden = intersection(found.get(kind, []), compute) / 1000
        summary[f"{kind}_hidden_ms"] = hidden
        summary[f"{kind}_exposed_ms"] = summary.get(f"{kind}_ms", 0.0) - hidden
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in summary.items()}


def record(step: Callable[[int], None], place: Place, folder: Path, name: str, steps: int = 2) -> dict[str, Any]:
    """Trace `steps` calls of `step(index)` on every rank; rank 0 writes `folder/name.json.gz` and gets the summary.

    The other ranks get {}. If the file would be too large to hand around, the host's events are left out of it.
    """
    # On a GPU the device's side alone: recording every host call slows the host so much that it becomes the bound.
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if place.cuda else activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for index in range(steps):
            step(index)
        place.synchronize()
    if place.rank != 0:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json.gz"
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    events = trace["traceEvents"]
    if path.stat().st_size > _LARGEST_TRACE:
        trace["traceEvents"] = [event for event in events if event.get("ph") == "M" or kind_of(event)]
        with gzip.open(path, "wt") as file:
            json.dump(trace, file)
    return {"trace": str(path), "trace_bytes": path.stat().st_size, "steps": steps, **summarise(events)}
