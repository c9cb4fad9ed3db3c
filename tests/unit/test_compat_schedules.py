"""DeepSpeed's five schedules: rates worked out by hand from the formulae of its documentation."""

from __future__ import annotations

import math

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.run import deepspeed_schedules as schedules
from shardwise.run.deepspeed_schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR


def optimizer_of(groups=1, lr=0.2, **settings):
    parameters = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(groups)]
    return torch.optim.Adam(parameters, lr=lr, **settings)


def rates_of(schedule, steps):
    """The rate that each step is taken with, from the first on."""
    found = [schedule.optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        schedule.step()
        found.append(schedule.optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr()[0] == found[-1]
    return found


def close(found, expected):
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_warmup_linear_and_log():
    close(rates_of(WarmupLR(optimizer_of(), 0.1, 0.5, 4, "linear"), 6), [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    logs = [0.1 + 0.4 * math.log(i + 1) / math.log(4) for i in range(4)]
    close(rates_of(WarmupLR(optimizer_of(), 0.1, 0.5, 4, "log"), 6), [0.1, *logs, 0.5, 0.5])


def test_warmup_of_one_step_ends_at_two():
    close(rates_of(WarmupLR(optimizer_of(), 0.0, 1.0, 1, "log"), 3), [0.0, 0.0, 1.0, 1.0])


def test_warmup_decays_to_nothing_at_the_total():
    found = rates_of(WarmupDecayLR(optimizer_of(), 6, 0.0, 1.0, 2, "linear"), 8)
    close(found, [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_cosine_scales_each_groups_own_rate():
    optimizer = optimizer_of(2)
    optimizer.param_groups[1]["lr"] = 2.0
    schedule = WarmupCosineLR(optimizer, 8, 0.25, 2, 0.1, "linear")
    ratios = [0.25, 0.25, 0.25 + 0.75 / 2]
    ratios += [0.1 + 0.9 * (1 + math.cos(math.pi * (i - 1) / 6)) / 2 for i in range(2, 8)]
    close(rates_of(schedule, 8), [0.2 * ratio for ratio in ratios])
    close([optimizer.param_groups[1]["lr"]], [2.0 * ratios[-1]])


def test_range_test_rises_in_a_line_or_in_stairs():
    close(rates_of(LRRangeTest(optimizer_of(), 0.1, 2, 0.5), 4), [0.1, 0.125, 0.15, 0.175, 0.2])
    close(rates_of(LRRangeTest(optimizer_of(), 0.1, 2, 0.5, True), 4), [0.1, 0.1, 0.15, 0.15, 0.2])


def test_one_cycle_goes_up_and_down_and_decays():
    optimizer = optimizer_of()
    schedule = OneCycle(optimizer, 0.1, 0.5, 0.5, 2, 2, decay_step_size=1, cycle_min_mom=0.8, cycle_max_mom=0.9)
    found, betas = [optimizer.param_groups[0]["lr"]], [optimizer.param_groups[0]["betas"][0]]
    for _ in range(6):
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
    close(found, [0.1, 0.3, 0.5, 0.3, 0.1, 0.1 / 1.5, 0.1 / 2])
    close(betas, [0.9, 0.85, 0.8, 0.85, 0.9, 0.9, 0.9])


def test_one_cycle_leaves_an_optimizer_without_betas_its_momentum():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=2)
    schedule.step()
    assert schedule.get_mom() is None


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: WarmupLR(optimizer, 0.1, 0.5, 4),
        lambda optimizer: WarmupDecayLR(optimizer, 9, 0.1, 0.5, 4),
        lambda optimizer: WarmupCosineLR(optimizer, 9, 0.1, 4),
        lambda optimizer: LRRangeTest(optimizer, 0.1, 2),
        lambda optimizer: OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=3),
    ],
)
def test_a_schedule_goes_on_where_its_state_was_saved(make):
    schedule = make(optimizer_of())
    rates_of(schedule, 3)
    state = schedule.state_dict()
    other = make(optimizer_of())
    other.load_state_dict(state)
    assert other.optimizer.param_groups[0]["lr"] == schedule.optimizer.param_groups[0]["lr"]
    assert rates_of(other, 4) == rates_of(schedule, 4)


def test_wrong_numbers_are_refused():
    for wrong in (
        lambda: WarmupLR(optimizer_of(), warmup_num_steps=0),
        lambda: WarmupLR(optimizer_of(), warmup_type="square"),
        lambda: WarmupLR(optimizer_of(2), warmup_max_lr=[0.1]),
    ):
        with pytest.raises(ConfigError):
            wrong()


def test_warmup_without_a_highest_rate_ends_at_each_groups_own():
    optimizer = optimizer_of(2)
    optimizer.param_groups[1]["lr"] = 0.6
    schedule = WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear")
    rates_of(schedule, 4)
    close(schedule.get_lr(), [0.2, 0.6])


def test_a_cosine_stays_at_its_floor():
    for total in (2, 4):
        assert rates_of(WarmupCosineLR(optimizer_of(), total, 0.0, 2, 0.1), 12)[-5:] == pytest.approx([0.02] * 5)


def test_stairs_of_a_cycle_hold_its_rates():
    shape = {"cycle_first_step_size": 4, "cycle_second_step_size": 6, "cycle_momentum": False}
    found = rates_of(
        OneCycle(optimizer_of(), 0.0, 1.0, cycle_first_stair_count=2, cycle_second_stair_count=3, **shape), 9
    )
    close(found, [0.0, 0.0, 0.5, 0.5, 1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0.0])
    smooth = rates_of(OneCycle(optimizer_of(), 0.0, 1.0, **shape), 9)
    close(
        rates_of(OneCycle(optimizer_of(), 0.0, 1.0, cycle_first_stair_count=4, cycle_second_stair_count=6, **shape), 9),
        smooth,
    )
    close(
        rates_of(OneCycle(optimizer_of(), 0.0, 1.0, cycle_first_step_size=4, cycle_second_step_size=0), 2),
        [0.0, 0.25, 0.5],
    )


def test_a_cycle_has_numbers_for_each_group():
    optimizer = optimizer_of(2)
    schedule = OneCycle(
        optimizer, [0.1, 0.2], [0.5, 0.6], 0.0, 2, 2, cycle_min_mom=[0.7, 0.8], cycle_max_mom=[0.9, 0.95]
    )
    schedule.step(1)
    close(schedule.get_last_lr(), [0.5, 0.6])
    close([group["betas"][0] for group in optimizer.param_groups], [0.7, 0.8])


def test_a_rate_in_a_tensor_stays_the_scripts_own():
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = WarmupLR(optimizer, 0.0, None, 4, "linear")
    for _ in range(3):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    close(rate.item(), 0.25)


def test_steps_that_divide_are_above_zero():
    for wrong in (
        lambda: WarmupLR(optimizer_of(), warmup_num_steps=None),
        lambda: LRRangeTest(optimizer_of(), 0.1, 0),
        lambda: OneCycle(optimizer_of(), 0.1, 0.5, cycle_first_step_size=0),
        lambda: OneCycle(optimizer_of(), 0.1, 0.5, cycle_second_step_size=-1),
        lambda: OneCycle(optimizer_of(2), 0.1, 0.5, cycle_min_mom=[0.1]),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert (schedules.WARMUP_DECAY_LR, schedules.WARMUP_MIN_LR) == ("WarmupDecayLR", "warmup_min_lr")
    assert not hasattr(schedules, "WARMUP_ANYTHING")
