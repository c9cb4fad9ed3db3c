"""The moves of a unit's weights, without weights and without other ranks."""

from __future__ import annotations

import itertools

import pytest

from rig.lockstep import make_unit
from shardwise.errors import UnitStateError
from shardwise.zero.unit import Unit, Weights

ALLOWED = {
    ("RELEASED", "FETCHING"),
    ("RELEASED", "GATHERING"),
    ("FETCHING", "GATHERING"),
    ("FETCHING", "RELEASED"),
    ("GATHERING", "GATHERED"),
    ("GATHERED", "RELEASED"),
    ("GATHERED", "GATHERING"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Weights, repeat=2)))
def test_a_move_that_the_table_lacks_is_a_unit_state_error(before: Weights, after: Weights) -> None:
    unit = make_unit("block 3")
    unit.state = before
    if (before.name, after.name) in ALLOWED:
        unit._move(after)
        assert unit.state is after
    else:
        with pytest.raises(UnitStateError, match=f"block 3: {before.name} does not lead to {after.name}"):
            unit._move(after)
        assert unit.state is before


def states(unit: Unit, *verbs: str) -> list[str]:
    found = []
    for verb in verbs:
        getattr(unit, verb)()
        found.append(unit.state.name)
    return found


def test_verbs_move_along_the_table() -> None:
    near, far = make_unit("near"), make_unit("far", travels=True)
    assert states(near, "fetch", "gather", "arrive", "gather", "gather", "arrive", "arrive", "release") == [
        "RELEASED", "GATHERING", "GATHERED", "GATHERING", "GATHERING", "GATHERED", "GATHERED", "RELEASED",
    ]  # fmt: skip
    assert states(far, "fetch", "fetch", "settle", "fetch", "gather", "settle", "release", "gather", "release") == [
        "FETCHING", "FETCHING", "RELEASED", "FETCHING", "GATHERING", "GATHERED", "RELEASED", "GATHERING", "RELEASED",
    ]  # fmt: skip
    assert not any(part.has_memory for unit in (near, far) for part in unit.parts)  # type: ignore[attr-defined]


def test_weights_that_are_not_on_their_way_cannot_arrive() -> None:
    with pytest.raises(UnitStateError, match="RELEASED does not lead to GATHERED"):
        make_unit("block 0").arrive()
