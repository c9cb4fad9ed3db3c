"""Who steps which whole parameter, and what travels for it: the blocks of a Llama with 8 billion weights, without ranks."""

from __future__ import annotations

import math

import pytest

from shardwise.plan.layout import Layout
from shardwise.step.wholes import cost_of, owners_of

SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
BLOCKS = 32


def of(size: int) -> tuple[list[int], list[dict[int, int]]]:
    """Costs, and the elements by place, of all matrices."""
    layout = Layout.pack([(str(n), shape, math.prod(shape)) for n, shape in enumerate(SHAPES)], size, 32)
    held: list[dict[int, int]] = [{} for _ in SHAPES]
    for place in range(size):
        for piece in layout.pieces(place):
            held[piece.slot][place] = piece.numel
    return [cost_of(shape) for shape in SHAPES] * BLOCKS, held * BLOCKS


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_operations_are_even_over_the_ranks_and_the_same_on_each(size: int) -> None:
    costs, held = of(size)
    load = [0] * size
    owners = owners_of(costs, held, load)
    assert max(load) <= 1.03 * sum(costs) / size
    assert sum(load) == sum(costs)
    assert owners == owners_of(costs, held, [0] * size)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_less_travels_than_by_one_more_gather(size: int) -> None:
    """Twelve bytes of an element that lies elsewhere, of a rank; a gather brings it two bytes of each that it lacks."""
    costs, held = of(size)
    sent = [0] * size
    for owner, lies in zip(owners_of(costs, held, [0] * size), held, strict=True):
        for place, numel in lies.items():
            sent[place] += numel if place != owner else 0
    weights = BLOCKS * sum(math.prod(shape) for shape in SHAPES)
    assert 12 * max(sent) <= 2 * weights * (1 - 1 / size)


def test_what_was_there_before_counts() -> None:
    load = [100, 0]
    assert owners_of([10, 10, 10], [{0: 5}, {0: 5}, {1: 5}], load) == [1, 1, 1]
    assert load == [100, 30]


def test_a_parameter_stays_where_most_of_it_lies() -> None:
    assert owners_of([4, 4, 4, 4], [{0: 3, 1: 1}, {1: 4}, {0: 4}, {0: 1, 1: 3}], [0, 0]) == [0, 1, 0, 1]


def test_matrices_cost_more_than_their_elements() -> None:
    assert (cost_of((8, 4)), cost_of((4, 2, 4)), cost_of((32,)), cost_of(())) == (320, 320, 32, 1)
