"""Where the states of what one optimizer steps lie, one after another: of a rank's region the grains that hold some of it.

    region      | a a a a | a a b b | b b b b | c c . . |      grains of 4 elements; the optimizer steps a and c
    footprint   | a a a a | a a . . | c c . . |

So neighbours stay neighbours, a chunk of the region is one stretch here, and who steps all of a region has all of it. Codes
come in blocks, and files are written in pages: a grain is whole ones. Pure arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

from ..plan.compressed import BLOCK
from ..plan.plan import Tier
from ..plan.state_dtypes import StateDtype
from .files import PAGE


def grain_of(tier: Tier, state_dtype: StateDtype) -> int:
    """Elements of a grain: on a disk a page of the smallest, of one byte, and one of scales where moments have them."""
    if not tier.on_disk:
        return BLOCK
    return PAGE // 4 * BLOCK if state_dtype == "int8" else PAGE


class Footprint:
    """Which elements of a region have a place, and where.

    spans: (begin, end) of what is stepped, in elements of a region of `region_numel`.
    runs:  (begin, end) of what has a place, in order. numel: of all that.
    """

    def __init__(self, spans: Iterable[tuple[int, int]], region_numel: int, grain: int) -> None:
        self.runs: list[tuple[int, int]] = []
        for begin, end in sorted(spans):
            first, last = begin // grain * grain, min(-(-end // grain) * grain, region_numel)
            if self.runs and first <= self.runs[-1][1]:
                first, before = self.runs.pop()
                last = max(before, last)
            self.runs.append((first, last))
        *self._places, self.numel = accumulate((last - first for first, last in self.runs), initial=0)

    def place(self, element: int) -> int:
        """Where an element of the region lies; of one without a place, where the next one does that has one."""
        number = bisect_right(self.runs, element, key=lambda run: run[0]) - 1
        if number < 0:
            return 0
        first, last = self.runs[number]
        return self._places[number] + min(element, last) - first
