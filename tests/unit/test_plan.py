"""Every plan that can be asked for: the table of its stage, or a PlanError that names the key to change."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from shardwise.config.offloads import DEVICES, MEDIA, OFFLOADS
from shardwise.errors import PlanError
from shardwise.offload.tiers import ON_DISK
from shardwise.plan.plan import Placement, Plan, Tier

SOURCE = Path(__file__).resolve().parents[2] / "src" / "shardwise"
STAGES = (0, 1, 2, 3)
ROLES = ("frozen", "parameter", "gradient", "optimizer")
# Which roles are sharded at each stage, as the table at the top of plan.py has it.
SHARDED = {0: (), 1: ("optimizer",), 2: ("gradient", "optimizer"), 3: ROLES}

ASKED = list(itertools.product(STAGES, DEVICES, DEVICES))


def allowed(stage: int, optimizer: str, param: str) -> bool:
    return (optimizer == "none" or stage >= 1) and (param == "none" or stage == 3)


@pytest.mark.parametrize(("stage", "optimizer", "param"), [asked for asked in ASKED if allowed(*asked)])
def test_a_stage_shards_its_roles_and_offloads_those_that_were_named(stage: int, optimizer: str, param: str) -> None:
    plan = Plan.from_stage(stage, offload_optimizer=optimizer, offload_param=param)
    assert plan.stage == stage
    assert tuple(role for role in ROLES if getattr(plan, role).sharded) == SHARDED[stage]
    assert plan.frozen.tier is plan.parameter.tier is DEVICES[param]
    assert plan.optimizer.tier is DEVICES[optimizer]
    # Gradients follow the optimizer off the device where they are sharded, and wait in host memory.
    assert plan.gradient.tier is (Tier.CPU if optimizer != "none" and stage >= 2 else Tier.GPU)


@pytest.mark.parametrize(("stage", "optimizer", "param"), [asked for asked in ASKED if not allowed(*asked)])
def test_an_offload_of_what_is_whole_names_the_keys_to_change(stage: int, optimizer: str, param: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_stage(stage, offload_optimizer=optimizer, offload_param=param)
    wrong, device = ("optimizer", optimizer) if optimizer != "none" and stage == 0 else ("param", param)
    assert str(caught.value).startswith(f"offload_{wrong}_device: {device} needs zero_stage ")
    assert str(caught.value).endswith(f"zero_stage is {stage}.")


@pytest.mark.parametrize("stage", [-1, 4, "3", None])
def test_an_unknown_stage_is_told_with_the_known_ones(stage: int) -> None:
    with pytest.raises(PlanError, match=r"zero_stage is .*; it is one of 0, 1, 2, 3"):
        Plan.from_stage(stage)


@pytest.mark.parametrize("role", ["optimizer", "param"])
@pytest.mark.parametrize("device", ["gpu", "disk", "", "CPU"])
def test_an_unknown_device_is_told_with_the_known_ones(role: str, device: str) -> None:
    with pytest.raises(PlanError, match=f"offload_{role}_device is {device!r}; it is one of {', '.join(DEVICES)}"):
        Plan.from_stage(3, **{f"offload_{role}": device})


@pytest.mark.parametrize("sharded", list(itertools.product([False, True], repeat=4)))
def test_a_plan_made_by_hand_is_one_of_zero_or_says_which_stage_to_take(sharded: tuple[bool, ...]) -> None:
    frozen, parameter, gradient, optimizer = sharded
    placements = dict(zip(ROLES, map(Placement, sharded), strict=True))
    if parameter <= gradient <= optimizer:
        plan = Plan(**placements)
        assert plan.stage == parameter + gradient + optimizer
        assert plan.frozen.sharded == frozen, "frozen weights may be sharded at any stage"
    else:
        with pytest.raises(PlanError, match=r"zero_stage [0123]"):
            Plan(**placements)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("tier", [tier for tier in Tier if tier is not Tier.GPU])
def test_only_shards_leave_the_device_and_gradients_never_to_a_disk(role: str, tier: Tier) -> None:
    sharded = dict.fromkeys(ROLES, Placement(True))
    if role == "gradient" and tier.on_disk:
        with pytest.raises(PlanError, match=f"gradients cannot rest on {tier}.*Use cpu"):
            Plan(**{**sharded, role: Placement(True, tier)})
    else:
        assert getattr(Plan(**{**sharded, role: Placement(True, tier)}), role).tier is tier
    whole = dict.fromkeys(ROLES, Placement(False))
    with pytest.raises(PlanError, match=f"{role} is whole but rests on {tier}.*raise zero_stage"):
        Plan(**{**whole, role: Placement(False, tier)})


def test_whole_parameters_change_nothing_but_where_trained_weights_rest() -> None:
    plan = Plan.from_stage(3, offload_optimizer="cpu", offload_param="nvme")
    whole = plan.with_whole_parameters()
    assert whole.parameter == Placement(False)
    assert [getattr(whole, role) for role in ("frozen", "gradient", "optimizer")] == [
        getattr(plan, role) for role in ("frozen", "gradient", "optimizer")
    ]
    assert str(whole) == "frozen shard nvme, parameter whole gpu, gradient shard cpu, optimizer shard cpu"


# Tiers.


def test_every_tier_on_a_disk_has_a_store_and_no_other_has() -> None:
    assert set(ON_DISK) == {tier for tier in Tier if tier.on_disk}
    for tier, row in ON_DISK.items():
        assert getattr(row.open, "tier", None) is tier, "the row's store says so too"
    assert list(DEVICES.values()) == list(Tier), "each can be asked for, the nearest first"
    assert {tier.medium for tier in Tier} <= set(MEDIA)


def test_what_visits_the_device_is_what_no_program_there_can_change() -> None:
    assert [tier.visits(cuda=True) for tier in Tier] == [tier is not Tier.GPU for tier in Tier]
    assert [tier for tier in Tier if tier.visits(cuda=False)] == [tier for tier in Tier if not tier.in_place]


def test_a_tier_on_a_disk_is_named_by_its_row_and_its_store_only() -> None:
    """What else would name it would have to be found for the next one: see "What a newcomer reads and touches"."""
    for tier in (tier for tier in Tier if tier.on_disk):
        named = re.compile(rf"\bTier\.{tier.name}\b|[\"']{tier}[\"']")
        homes = {str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if named.search(p.read_text())}
        stores = {f"offload/{ON_DISK[tier].open.__module__.rsplit('.', 1)[-1]}.py"}
        # DeepSpeed's own list of devices, which is not shardwise's.
        theirs = {"compat/deepspeed/settings.py", "run/deepspeed_open.py", "run/deepspeed_words.py"}
        assert homes - theirs == {"config/offloads.py", "offload/tiers.py"} | stores, tier


@pytest.mark.parametrize("device", OFFLOADS)
def test_where_something_rests_is_said_in_the_words_of_the_settings(device: str) -> None:
    assert str(Placement(True, DEVICES[device])) == f"shard {device}"
