"""What was found of a model's units is looked for once, and changed by nobody who uses it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from torch import nn

from shardwise.errors import PrepareError
from shardwise.plan import units
from shardwise.plan.units import FoundUnits, find_units
from shardwise.tuning.blocks import repeated_blocks


def tower(blocks: int = 4) -> nn.Module:
    return nn.ModuleDict(
        {
            "first": nn.Linear(4, 4),
            "blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks)),
            "last": nn.Linear(4, 4),
        }
    )


def block_nbytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.get_submodule("blocks.0").parameters())


@pytest.mark.parametrize("names", [None, ["blocks.*"], ["Linear"]])
@pytest.mark.parametrize("shared", [0, 2])
def test_what_was_found_gives_the_units_that_looking_gives(names, shared):
    model = tower()
    nbytes = shared * block_nbytes(model)
    assert find_units(model, FoundUnits.of(model, names), unit_nbytes=nbytes) == find_units(
        model, names, unit_nbytes=nbytes
    )
    assert repeated_blocks(model, FoundUnits.of(model, names)) == repeated_blocks(model, names)


def test_units_that_share_leave_what_was_found_as_it_was():
    model = tower()
    found = FoundUnits.of(model)
    before = [(spec.name, list(spec.entries), dict(spec.parameters), spec.in_turn) for spec in found.specs]
    assert [len(spec.entries) for spec in found.within(2 * block_nbytes(model)) if spec.in_turn] == [2, 2]
    assert [(spec.name, list(spec.entries), dict(spec.parameters), spec.in_turn) for spec in found.specs] == before
    assert found.repeated == list(model.get_submodule("blocks"))


def test_what_was_found_is_not_looked_for_again():
    model = tower()
    found = FoundUnits.of(model)
    with patch.object(units, "_blocks", side_effect=AssertionError("looked again")):
        find_units(model, found, unit_nbytes=1 << 20)
        repeated_blocks(model, found)


def test_a_wrong_name_is_refused_where_it_is_looked_for():
    with pytest.raises(PrepareError, match="neither the class nor the path"):
        FoundUnits.of(tower(), ["Linea"])
