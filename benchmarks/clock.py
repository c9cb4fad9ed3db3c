"""What a training script's run took: from its start to its first step by parts, its steps, its saves, its peak bytes.

A script says when a part is over, when a step is, and asks whether a save is due. Steps are timed in stretches: each begins and
ends with an idle device. In between the script waits after every step, or (`free`) never: then all steps of a stretch took the
same, the stretch's time divided by their number. Fetching a batch is part of a step. Knows no engine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from engines import mean_over_ranks
from measure import largest, peaks
from place import Place


@dataclass
class Stretch:
    """Steps that are timed together. step_ms: of each, or one mean where they ran freely. call_ms: of each call that saves."""

    steps: int
    saves: bool = False
    step_ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Clock:
    """The times of one run on one rank.

    begun:     `time.time()` of the script's first line. The run itself began at BENCHMARK_STARTED, or with its process.
    stretches: what is timed, one behind the other, after `warmup` steps.
    """

    def __init__(self, begun: float, stretches: list[Stretch], *, warmup: int, free: bool) -> None:
        self.started = float(os.environ.get("BENCHMARK_STARTED", psutil.Process().create_time()))
        self.parts: dict[str, float] = {"launch": begun - self.started}
        self.last = begun
        self.stretches, self.warmup, self.free = stretches, warmup, free
        self.losses: list[torch.Tensor] = []
        self.peak_before = 0
        self.place: Place | None = None
        self._number = self._inside = 0  # the stretch that runs, and how many of its steps are taken
        self._begun = self._stamp = 0.0  # of the stretch, and of its last step that was waited for

    @property
    def steps(self) -> int:
        """All of a run."""
        return self.warmup + sum(stretch.steps for stretch in self.stretches)

    def mark(self, part: str) -> None:
        """A part of the start is over."""
        now = time.time()
        self.parts[part], self.last = now - self.last, now

    def prepared(self, accelerator: Any) -> None:
        """The model is prepared. What the device still has to do for that is part of it."""
        self.accelerator = accelerator
        self.place = Place(accelerator.process_index, accelerator.num_processes, torch.device(accelerator.device))
        self.place.synchronize()
        self.mark("prepare")

    def stepped(self, loss: torch.Tensor) -> None:
        """An optimizer step was taken. loss: of its last batch, on this rank."""
        assert self.place is not None
        self.losses.append(loss.detach().float())
        taken = len(self.losses)
        if taken == 1:
            self.place.synchronize()
            self.mark("first step")
        if taken == self.warmup - 1:  # the last step of the warm-up fetches back what training needs
            self._forget_building()
        if taken == self.warmup:
            self._begin()
        elif taken > self.warmup:
            self._timed()

    def save_is_due(self, every: int | None) -> bool:
        """Whether to save now: at the first step of an interval, so that all that a save costs falls into its stretch."""
        return every is not None and self._running.saves and self._inside % every == 1 % every

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """What is timed as a call that saves. The device is not waited for: the call alone is."""
        begin = time.perf_counter()
        yield
        self._running.call_ms.append(1000 * (time.perf_counter() - begin))

    @property
    def _running(self) -> Stretch:
        return self.stretches[min(self._number, len(self.stretches) - 1)]

    def _forget_building(self) -> None:
        # What building needed is not what training needs.
        assert self.place is not None
        self.place.synchronize()
        if self.place.cuda:
            self.peak_before = torch.cuda.max_memory_allocated(self.place.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.place.device)

    def _begin(self) -> None:
        assert self.place is not None
        self.place.synchronize()
        self._inside = 0
        self._begun = self._stamp = time.perf_counter()

    def _timed(self) -> None:
        stretch = self._running
        self._inside += 1
        ended = self._inside == stretch.steps
        if ended or not self.free:
            self.place.synchronize()  # type: ignore[union-attr]
            now = time.perf_counter()
            if not self.free:
                stretch.step_ms.append(1000 * (now - self._stamp))
            self._stamp = now
        if ended:
            stretch.seconds = self._stamp - self._begun
            if self.free:
                stretch.step_ms.append(1000 * stretch.seconds / stretch.steps)
            finish = getattr(self.accelerator, "finish_saving", None)  # accelerate's saves are over when they return
            if stretch.saves and finish is not None:
                finish()
            self._number += 1
            self._begin()

    def record(self, accelerator: Any) -> dict[str, Any]:
        """What was seen, the largest over the ranks. Every rank calls this, once all steps are taken."""
        assert self.place is not None
        place = self.place
        rss = psutil.Process().memory_info().rss
        sizes = peaks(place, 0, 0)
        before, rss = map(int, largest([self.peak_before, rss], place))
        parts = dict(zip(self.parts, largest(list(self.parts.values()), place), strict=True))
        plain = [stretch for stretch in self.stretches if not stretch.saves]
        from_accelerator = sum(self.parts[part] for part in ("accelerator", "model", "prepare", "first step"))
        totals = largest([sum(self.parts.values()), from_accelerator], place)
        return {
            "step_ms": _rounded(largest([ms for stretch in plain for ms in stretch.step_ms], place)),
            "first_step_s": {
                "from_start": round(totals[0], 2),
                "from_accelerator": round(totals[1], 2),
                **{part: round(seconds, 3) for part, seconds in parts.items()},
            },
            "peak_bytes": {**sizes, "before": before} if sizes else {},
            "host_rss_bytes": rss,
            "losses": mean_over_ranks(self.losses, place),
            **self._saves(place),
            **place.facts(),
        }

    def _saves(self, place: Place) -> dict[str, Any]:
        """What saving cost: per cent of the time without, over the stretch; and the calls."""
        saving = [stretch for stretch in self.stretches if stretch.saves]
        if not saving:
            return {}
        first, *others = largest([ms for stretch in saving for ms in stretch.call_ms], place)
        before, during, after = largest(
            [stretch.seconds for stretch in (self.stretches[0], saving[-1], self.stretches[-1])], place
        )
        plain = (before + after) / 2
        return {
            "save": {
                "stall_percent": round(100 * (during - plain) / plain, 2),
                "drift_percent": round(100 * abs(after - before) / plain, 2),
                "first_call_ms": round(first, 1),
                "call_ms": [round(ms, 1) for ms in others],
            }
        }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]
