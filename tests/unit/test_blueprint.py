"""How drawn models on the meta device are divided: no weight is lost or held twice, whatever the plan and the ranks.

That the bytes are those that the engine holds is in tests/ranks/test_blueprints.py.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import nn

from shardwise.config.offloads import DEVICES
from shardwise.plan.blueprint import Blueprint, Member, divide
from shardwise.plan.layout import ALIGNMENT, Layout, Piece
from shardwise.plan.plan import Plan, Tier
from shardwise.plan.precision import Precision
from shardwise.plan.units import ROOT, SIDE_UNIT_MIN_NUMEL, find_units

SIZES = (1, 3, 7, 16, 33)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
WHOLE_ADAPTERS: tuple[bool | Literal["auto"], ...] = ("auto", "auto", True, False, False)


class Block(nn.Module):
    def __init__(self, source: random.Random) -> None:
        super().__init__()
        self.wide = nn.Linear(source.choice((64, 96)), 64, dtype=source.choice(DTYPES))
        self.narrow = nn.ParameterList(
            torch.empty(source.choice(SIZES), dtype=source.choice(DTYPES)) for _ in range(source.randrange(3))
        )
        self.nothing = nn.Parameter(torch.empty(0, 3))


def drawn(seed: int) -> nn.Module:
    """Blocks of random shapes and dtypes, frozen in parts; sometimes a large side, and weights that are tied."""
    source = random.Random(f"blueprint {seed}")
    with torch.device("meta"):
        model = nn.Module()
        model.embed = nn.Embedding(SIDE_UNIT_MIN_NUMEL // 8 if source.random() < 0.3 else 5, 8)
        model.blocks = nn.ModuleList(Block(source) for _ in range(source.randrange(1, 6)))
        model.head = nn.Linear(8, 5, bias=source.random() < 0.5)
    blocks = list(model.blocks)
    if source.random() < 0.3:
        blocks[-1].wide = blocks[0].wide
    if source.random() < 0.3 and model.embed.weight.shape == model.head.weight.shape:
        model.head.weight = model.embed.weight
    share = source.choice((0.0, 0.3, 0.6, 1.0))
    for parameter in model.parameters():
        parameter.requires_grad_(source.random() < share)
    return model


def plan_of(seed: int) -> Plan:
    source = random.Random(f"plan {seed}")
    stage = source.choice((0, 1, 2, 3, 3, 3, 3, 3))
    optimizer = source.choice(list(DEVICES)) if stage else "none"
    return Plan.from_stage(
        stage, offload_optimizer=optimizer, offload_param=source.choice(list(DEVICES)) if stage == 3 else "none"
    )


def divided(seed: int, bucket_nbytes: int = 1 << 10) -> tuple[nn.Module, Plan, Precision, list[Blueprint]]:
    source = random.Random(f"division {seed}")
    model, plan, precision = drawn(seed), plan_of(seed), Precision.named(source.choice(("no", "no", "bf16", "fp16")))
    whole = source.choice(WHOLE_ADAPTERS)
    return (
        model,
        plan,
        precision,
        divide(find_units(model), plan, precision, whole_adapters=whole, bucket_nbytes=bucket_nbytes),
    )


SEEDS = range(60)


def test_the_draw_has_every_kind_of_division() -> None:
    found: Counter[str] = Counter()
    for seed in SEEDS:
        _, plan, _, blueprints = divided(seed)
        own = [p for p in blueprints if p.trainable and p.plan.parameter.sharded]
        found[f"stage {plan.stage}"] += 1
        found["trained weights in shards"] += bool(own)
        found["beside frozen ones"] += any(p.frozen for p in own)
        found["of several dtypes in a unit"] += len({p.name for p in own}) < len(own)
        found["shared by several units"] += any(p.name.startswith("shared:") for p in blueprints)
        found["several buckets"] += sum(p.name.startswith("bucket:") for p in blueprints) > 1
    assert len(found) == 9
    assert min(found.values()) >= 2, found


@pytest.mark.parametrize("seed", SEEDS)
def test_every_parameter_with_elements_is_exactly_one_member(seed: int) -> None:
    model, _, precision, blueprints = divided(seed)
    members = [(member, False) for p in blueprints for member in p.frozen]
    members += [(member, True) for p in blueprints for member in p.trainable]
    named = {name: p for name, p in model.named_parameters() if p.numel()}
    assert Counter(member.name for member, _ in members) == Counter(list(named))
    for member, trained in members:
        assert member.parameter is named[member.name]
        assert member.parameter.is_meta
        assert member.parameter.requires_grad == trained
        assert member.dtype == precision.compute_dtype(member.parameter)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_trained_together_has_one_dtype_and_rests_as_its_plan_says(seed: int) -> None:
    _, plan, _, blueprints = divided(seed)
    for blueprint in blueprints:
        assert blueprint.frozen or blueprint.trainable
        assert len({member.dtype for member in blueprint.trainable}) <= 1
        assert blueprint.plan in (plan, plan.with_whole_parameters())
        if blueprint.trainable and not blueprint.plan.parameter.sharded:
            assert not blueprint.entries, "what stays whole follows no module"
            assert not blueprint.frozen
        else:
            assert blueprint.entries
    assert [p.name for p in blueprints].count(ROOT) <= 1 + len(set(DTYPES)), "a unit more for each further dtype"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bucket_nbytes", [0, 1 << 10, 1 << 14, 1 << 30])
def test_a_bucket_keeps_within_its_bytes_unless_one_unit_alone_is_larger(seed: int, bucket_nbytes: int) -> None:
    model, _, _, blueprints = divided(seed, bucket_nbytes)
    unit_of = {name: i for i, unit in enumerate(find_units(model)) for name in unit.parameters}
    buckets = [p for p in blueprints if p.trainable and not p.plan.parameter.sharded]
    for bucket in buckets:
        nbytes = sum(member.parameter.numel() * member.dtype.itemsize for member in bucket.trainable)
        assert nbytes <= bucket_nbytes or len({unit_of[member.name] for member in bucket.trainable}) == 1
        assert bucket.name == f"bucket:{bucket.trainable[0].name}"
    if bucket_nbytes == 1 << 30:
        assert all(one.dtype != other.dtype for one, other in pairwise(buckets)), "neighbours that fit share one"


def check_cover(layout: Layout, pieces: list[tuple[Piece, ...]], members: tuple[Member, ...], sizes: list[int]) -> None:
    """The pieces of all ranks are each member once, in order, and no rank's overlap."""
    assert [slot.name for slot in layout.slots] == [member.name for member in members]
    assert [slot.shape for slot in layout.slots] == [tuple(member.parameter.shape) for member in members]
    assert [slot.numel for slot in layout.slots] == sizes
    covered = [0] * len(sizes)
    for found in pieces:
        end = 0
        for piece in found:
            assert piece.in_slot == covered[piece.slot], "where the rank before left off"
            assert end <= piece.in_shard
            end = piece.in_shard + piece.numel
            covered[piece.slot] += piece.numel
        assert end <= layout.shard_numel
    assert covered == sizes


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_layouts_of_all_ranks_cover_every_element_once(seed: int, world_size: int) -> None:
    for blueprint in divided(seed)[3]:
        if blueprint.frozen:
            layout = blueprint.frozen_layout(world_size)
            sizes = [member.parameter.numel() * member.dtype.itemsize for member in blueprint.frozen]
            ranks = world_size if blueprint.plan.frozen.sharded else 1
            assert layout.world_size == ranks
            check_cover(layout, [layout.pieces(rank) for rank in range(ranks)], blueprint.frozen, sizes)
            assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
        if blueprint.trainable:
            layout = blueprint.trainable_layout(world_size)
            regions = [blueprint.region(world_size, rank) for rank in range(world_size)]
            assert all(region.layout == layout for region in regions)
            sizes = [member.parameter.numel() for member in blueprint.trainable]
            each = [region.pieces for region in regions]
            if blueprint.plan.optimizer.sharded:
                check_cover(layout, each, blueprint.trainable, sizes)
            else:
                for pieces in each:  # every rank steps all of them
                    check_cover(layout, [pieces], blueprint.trainable, sizes)
            assert all(slot.offset * blueprint.dtype.itemsize % ALIGNMENT == 0 for slot in layout.slots)


@pytest.mark.parametrize(
    ("whole_adapters", "adapter", "whole"),
    [("auto", 4, True), ("auto", 60, False), (True, 60, True), (False, 4, False)],
)
def test_adapters_stay_whole_where_they_are_small_beside_what_is_frozen(
    whole_adapters: bool | Literal["auto"], adapter: int, whole: bool
) -> None:
    """A sixteenth of the frozen bytes is small: 4 of 64 elements, and not 60."""

    def block() -> nn.Module:
        made = nn.Module()
        made.base = nn.Parameter(torch.empty(64), requires_grad=False)
        made.adapter = nn.Parameter(torch.empty(adapter))
        return made

    with torch.device("meta"):
        model = nn.Module()
        model.blocks = nn.ModuleList([block(), block()])
    plan, precision = Plan.from_stage(3, offload_optimizer="cpu"), Precision.named("no")
    blueprints = divide(find_units(model), plan, precision, whole_adapters=whole_adapters, bucket_nbytes=1 << 20)
    if whole:
        assert [len(p.trainable) for p in blueprints] == [0, 0, 2], "both adapters in one bucket"
        assert not blueprints[-1].plan.parameter.sharded
    else:
        assert [len(p.trainable) for p in blueprints] == [1, 1]
        assert all(p.plan.parameter.sharded for p in blueprints)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("param", list(DEVICES))
def test_only_what_leaves_the_device_is_gathered(world_size: int, param: str) -> None:
    """One rank holds all of its shards: they leave only if they rest elsewhere."""
    with torch.device("meta"):
        model = nn.Module()
        model.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    plan = Plan.from_stage(3, offload_param=param)
    blueprints = divide(find_units(model), plan, Precision.named("no"), bucket_nbytes=0)
    for blueprint in blueprints:
        whole = blueprint.trainable_layout(world_size).numel * 4
        leaves = world_size > 1 or DEVICES[param] is not Tier.GPU
        assert blueprint.gathered_nbytes(world_size) == (whole if leaves else 0)
