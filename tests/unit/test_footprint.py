"""Where an optimizer's states lie: each element in a place of its own, chunks in one stretch, grains around them."""

from __future__ import annotations

import random

import pytest

from shardwise.offload.files import PAGE
from shardwise.offload.footprint import Footprint, grain_of
from shardwise.plan.compressed import BLOCK
from shardwise.plan.plan import Tier


def spans_of(seed: int, numel: int) -> list[tuple[int, int]]:
    """Some that do not meet, in any order, with gaps of any size."""
    source = random.Random(seed)
    bounds = sorted(source.sample(range(numel + 1), 2 * source.randint(1, 6)))
    spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    source.shuffle(spans)
    return spans


@pytest.mark.parametrize("seed", range(40))
def test_grains_in_which_something_is_stepped_lie_one_after_another(seed: int) -> None:
    grain, numel = random.Random(seed).choice([(4, 60), (4, 61), (8, 203), (16, 64)])
    spans = spans_of(seed, numel)
    footprint = Footprint(spans, numel, grain)
    grains = sorted({element // grain for begin, end in spans for element in range(begin, end)})
    wanted = [element for n in grains for element in range(n * grain, min((n + 1) * grain, numel))]
    assert footprint.numel == len(wanted)
    assert [footprint.place(element) for element in wanted] == list(range(len(wanted)))
    for chunk in (grain, 2 * grain, 4 * grain):  # begins with a grain, so that pages and blocks are whole there, too
        for begin in range(0, numel, chunk):
            first, last = footprint.place(begin), footprint.place(min(begin + chunk, numel))
            assert first % grain == 0
            assert wanted[first:last] == [element for element in wanted if begin <= element < begin + chunk]


def test_who_steps_all_of_a_region_has_the_region() -> None:
    slots = [(0, 100), (128, 300), (320, 1000), (1024, 1500)]  # with the gaps of an alignment
    footprint = Footprint(slots, 1536, BLOCK)
    assert footprint.numel == 1536
    assert all(footprint.place(element) == element for element in range(1536))


def test_nothing_stepped_takes_nothing() -> None:
    assert Footprint([], 1536, BLOCK).numel == 0


def test_a_grain_is_whole_blocks_and_on_a_disk_whole_pages_of_every_state() -> None:
    assert grain_of(Tier.CPU, "fp32") == grain_of(Tier.CPU, "int8") == BLOCK
    for itemsize in (1, 2, 4, 8):
        assert grain_of(Tier.NVME, "bf16") * itemsize % PAGE == 0
    assert grain_of(Tier.NVME, "int8") // BLOCK * 4 % PAGE == 0
