"""Every rank hears of every other in ceil(log2(ranks)) hops, and what it is sent is what it lacks."""

from __future__ import annotations

import math

import pytest

from shardwise.ranks.hops import heard_of, hops


@pytest.mark.parametrize("count", [*range(1, 18), 31, 32, 33, 64, 100])
def test_each_rank_hears_of_each_other_once(count):
    routes = [hops(rank, count) for rank in range(count)]
    known = [[rank] for rank in range(count)]
    assert {len(route) for route in routes} == {math.ceil(math.log2(count))}
    for place in range(len(routes[0])):
        before = [list(ranks) for ranks in known]
        for rank, route in enumerate(routes):
            hop = route[place]
            assert routes[hop.source][place].to == rank
            assert hop.known == len(before[rank])
            known[rank] += before[hop.source][: hop.sent]
    assert known == [heard_of(rank, count) for rank in range(count)]
    assert all(sorted(ranks) == list(range(count)) for ranks in known)


def test_hops_grow_with_the_logarithm_of_the_ranks():
    assert [len(hops(0, count)) for count in (1, 2, 3, 4, 5, 8, 9, 1024, 16384)] == [0, 1, 2, 2, 3, 3, 4, 10, 14]
