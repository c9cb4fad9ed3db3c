"""The part of the parity table that runs in `make test` meets every pair of settings."""

import itertools

from parity.cases import AXES, pairwise_cover, whole_table


def test_every_pair_of_settings_meets_in_the_cover():
    cases = pairwise_cover()
    rows = [(case.placement, case.tuning, case.mode, case.world, case.optimizer) for case in cases]
    for a, b in itertools.combinations(range(len(AXES)), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(AXES[a], AXES[b]))


def test_the_cover_is_small_and_the_same_every_time():
    assert pairwise_cover() == pairwise_cover()
    assert len(pairwise_cover()) < 110
    assert len(pairwise_cover()) == len(set(pairwise_cover()))


def test_the_table_holds_no_case_twice():
    assert len(set(whole_table())) == len(whole_table()) == 14 * 3 * 6 * 3
