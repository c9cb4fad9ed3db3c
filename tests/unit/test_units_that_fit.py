"""How many units stay gathered: arithmetic, so that every rank comes to the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwise.errors import PrepareError
from shardwise.zero.budget import Budget
from shardwise.zero.generation import units_that_fit
from shardwise.zero.quantised import refuse_other_kinds

SIZES = [10, 40, 40, 30, 20]
ORDER = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("pinned", "window", "room", "kept"),
    [
        ((), 2, 140, [0, 1, 2, 3, 4]),  # all: nothing comes and goes
        ((), 2, 139, [0, 1]),
        ((), 2, 89, []),
        ((), 1, 90, [0, 1]),
        ((4,), 2, 0, [4]),  # read outside of forwards
        ((4,), 1, 110, [4, 0, 1]),
        ((), 0, 60, [0, 1]),  # the first that does not fit ends it, also if a later one would
    ],
)
def test_the_first_units_stay_beside_those_on_their_way(pinned, window, room, kept):
    assert units_that_fit(SIZES, ORDER, pinned, window, room) == kept


def test_a_budget_is_bytes_or_all_of_a_cpu_or_nothing():
    cpu = torch.device("cpu")
    assert Budget(cpu, 5).for_generation() == 5
    assert Budget(cpu, None).for_generation() == 0
    assert Budget(cpu, "auto").for_generation() > 1 << 50


class Several(torch.Tensor):
    """A tensor made of others, as torchao's are."""

    def __tensor_flatten__(self):
        return [], None


def test_weights_that_are_several_tensors_are_refused_by_name():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2).as_subclass(Several), requires_grad=False)
    with pytest.raises(PrepareError, match="weight is a"):
        refuse_other_kinds(model)


def test_a_cpu_has_no_peak_and_nothing_beside_auto():
    cpu = torch.device("cpu")
    assert [Budget(cpu, limit).beside(7) for limit in (5, None, "auto")] == [5, 0, 0]
    assert Budget(cpu, 5).peak(reserved=True) == 0
