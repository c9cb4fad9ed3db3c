"""Same numbers: every plan gives the training curve of one process of plain torch.

The reference trains the whole global batch in one process without a line of shardwise. After 20 steps in fp32 the
losses agree to 1e-6 relative and the weights to 1e-6 absolute. They are not bitwise equal, because the ranks' sums
are taken in another order than one process takes them.

`make test` runs half of a cover in which every pair of settings meets, `make test-full` the cover and the whole table.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from .cases import IN_GROUPS, PLACEMENTS, Case, Placement, pairwise_cover, whole_table
from .training import Run, difference, reference, sharded_run

LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-6
# A norm is a sum over all weights: it collects a little more rounding than a loss.
NORM_TOLERANCE = 1e-5

# 16-bit weights have 8 (bf16) or 11 (fp16) significant bits, and errors of the forward pass add up over the layers: the
# losses, against fp32, agree to some units in the last place. Weights are fp32 masters that took 20 steps of about lr
# (2e-3 at most): the bound is that steps point the same way, a fraction of the way gone.
HALF = {"bf16": (2e-3, 1e-2), "fp16": (3e-4, 4e-3)}


@pytest.fixture(scope="session")
def reference_run(world: Any) -> Any:
    """`reference_run(case)`: the plain-torch run that the case is held against, made once per session."""

    @cache
    def of(model: str, tuning: str, clip: float | None, optimizer: str) -> Run:
        return world(1).run(reference, model, tuning, clip, optimizer)[0]

    return lambda case: of(case.model, case.tuning, case.clip, case.optimizer)


def check_fp32(world: Any, reference_run: Any, note_difference: Any, case: Case) -> None:
    run = world(case.world).run(sharded_run, case)[0]
    found = difference(run, reference_run(case))
    note_difference("fp32", found)
    assert found["loss"] <= LOSS_TOLERANCE, found
    assert found["norm"] <= NORM_TOLERANCE, found
    assert found["weight"] <= WEIGHT_TOLERANCE, found


@pytest.mark.thinned(2, rows=True)
@pytest.mark.parametrize("case", pairwise_cover(), ids=str)
def test_every_pair_of_settings_trains_as_one_process(world, reference_run, note_difference, case):
    check_fp32(world, reference_run, note_difference, case)


@pytest.mark.full
@pytest.mark.parametrize("case", whole_table(), ids=str)
def test_the_whole_table_trains_as_one_process(world, reference_run, note_difference, case):
    check_fp32(world, reference_run, note_difference, case)


@pytest.mark.parametrize("case", IN_GROUPS, ids=str)
def test_copies_of_a_model_train_as_one_process(world, reference_run, note_difference, case):
    check_fp32(world, reference_run, note_difference, case)


OFFLOADED = [case for case in whole_table() if case.placement.optimizer or case.placement.params]


def check_bits(world: Any, case: Case, precision: str) -> None:
    """The run of the same stage with nothing offloaded, bit for bit."""
    run = world(case.world).run(sharded_run, case, precision, 6)[0]
    plain = world(case.world).run(sharded_run, replace(case, placement=Placement(case.placement.stage)), precision, 6)[
        0
    ]
    assert difference(run, plain) == {"loss": 0.0, "norm": 0.0, "weight": 0.0}


@pytest.mark.parametrize("case", OFFLOADED[::29], ids=str)
def test_offloading_changes_no_bit(world, case):
    check_bits(world, case, "bf16")


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("case", OFFLOADED, ids=str)
def test_offloading_changes_no_bit_of_the_whole_table(world, case, precision):
    check_bits(world, case, precision)


HALF_CASES = [
    Case(placement, tuning, mode, 2, "adamw")
    for placement in PLACEMENTS
    for tuning, mode in (("full", "plain"), ("lora", "checkpointed"), ("lora+save", "accumulated"), ("full", "bart"))
]


def check_half(world: Any, reference_run: Any, note_difference: Any, case: Case, precision: str) -> None:
    run = world(case.world).run(sharded_run, case, precision)[0]
    found = difference(run, reference_run(case))
    note_difference(precision, found)
    loss, weight = HALF[precision]
    assert found["loss"] <= loss, found
    assert found["weight"] <= weight, found


@pytest.mark.thinned(2)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", HALF_CASES[:: len(HALF_CASES) // 9], ids=str)
def test_half_precision_follows_the_fp32_curve(world, reference_run, note_difference, case, precision):
    check_half(world, reference_run, note_difference, case, precision)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_follows_the_fp32_curve_in_every_plan(world, reference_run, note_difference, case, precision):
    check_half(world, reference_run, note_difference, case, precision)
