"""Blocks run in any order, again and again, in another way on every rank and in every step; the numbers stay those of a plain
model, and nobody waits for ever. Passes whose order was learned from other routes than those that come are the hard ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rig.engine import Tower, train_both
from rig.groups import grouped

pytestmark = pytest.mark.thinned(3)

PLAIN, REENTRANT, RECOMPUTED = range(3)
BLOCKS = 5
Route = Sequence[tuple[int, Sequence[int]]]  # segments: how each is run, and its blocks


class Maze(Tower):
    def forward(self, x, route: Route):
        x = self.first(x)
        for way, blocks in route:
            segment = partial(self._segment, blocks)
            if way == PLAIN or not x.requires_grad:
                x = segment(x)
            else:
                x = checkpoint(segment, x, use_reentrant=way == REENTRANT)
        return self.head(x)

    def _segment(self, blocks, x):
        for index in blocks:
            x = self.blocks[index](x)
        return x


def _given(model, x, rank, step, routes, known):
    """All ranks take all blocks in turn, until the order is `known`; then each its own of `routes`."""
    blocks = range(BLOCKS) if step < known else routes[(step + rank) % len(routes)]
    return model(x, [(PLAIN, blocks)]).square().mean()


def _on_given_routes(ranks, plan, known, blocks, prefetch):
    # Without the first block of a unit, in another order, with a unit in two places, with none of them, in loops.
    routes = [[1, 3, 4], [4, 3, 2, 1, 0], [0, 2, 1, 3], [], [3, 2, 3], [1], [0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4]]
    torch.manual_seed(5)
    with grouped(blocks):
        train_both(
            ranks, Maze(BLOCKS), plan, loss_of=partial(_given, routes=routes, known=known), steps=10, prefetch=prefetch
        )


@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("blocks", "prefetch"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("plan", ["3", "3-all", "3-disk"])
def test_any_route_through_the_blocks_gives_the_same_numbers(world, plan, blocks, prefetch, n, known):
    world(n).run(_on_given_routes, plan, known, blocks, prefetch, timeout_s=20)


def _looping(model, x, rank, step):
    return model(x, [(PLAIN, [0, 1, 0, 2, 1, 0])]).square().mean()


def _loops(ranks, prefetch):
    torch.manual_seed(5)
    train_both(ranks, Maze(BLOCKS), loss_of=_looping, prefetch=prefetch)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, 9])
def test_a_unit_whose_next_turn_is_issued_stays_for_it(world, prefetch):
    world(2).run(_loops, prefetch, timeout_s=20)


def _drawn(seed: object, segments: int = 3) -> Route:
    source = random.Random(repr(seed))
    return [
        (source.randrange(3), [source.randrange(BLOCKS) for _ in range(source.randrange(5))])
        for _ in range(source.randrange(segments + 1))
    ]


def _on_drawn_routes(ranks, seed):
    """Two forwards before one backward in some steps, evaluations between some: those on all ranks, the routes each its own."""
    source = random.Random(seed)
    blocks, prefetch, known = source.choice([1, 2, 3]), source.choice([0, 1, 2, 7]), source.choice([0, 1, 3])
    plan = source.choice(["3", "3-all", "3-disk"])

    def loss_of(model, x, rank, step):
        loss = model(x, _drawn((seed,)) if step < known else _drawn((seed, rank, step))).square().mean()
        if random.Random(repr((seed, step))).random() < 0.3:
            loss = loss + model(x, _drawn((seed, rank, step, "again"), 1)).square().mean()
        return loss

    def between(sharded, stepping, step):
        if random.Random(repr((seed, step, "look"))).random() < 0.2:
            with torch.no_grad():
                sharded.model(torch.randn(2, 5), _drawn((seed, ranks.rank, step, "look")))

    torch.manual_seed(5)
    with grouped(blocks):
        train_both(ranks, Maze(BLOCKS), plan, loss_of=loss_of, steps=8, prefetch=prefetch, between=between)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_drawn_routes_give_the_numbers_of_a_plain_model(world, seed, n):
    world(n).run(_on_drawn_routes, seed, timeout_s=20)
