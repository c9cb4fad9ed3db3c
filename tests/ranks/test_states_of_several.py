"""States of several optimizers off the device: each takes what it steps of a unit, and has the numbers of a run in place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rig.engine import OTHER_PLANS, PLANS, Block, as_on_a_device, inputs, loss_of, mine, shard, trained
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.config.sections import EngineConfig
from shardwise.estimate.bytes import Choice, Run, estimate
from shardwise.estimate.keeping import Stepper
from shardwise.offload.coded import CodedSlab
from shardwise.offload.host import HostStore
from shardwise.offload.nvme import NvmeStore
from shardwise.offload.store import Slab
from shardwise.plan.plan import Tier
from shardwise.run.process import forget_run
from shardwise.step.optimizer import ShardedOptimizer

WIDTH = 160  # of matrices that are several pages on a rank, for the vectors between them to be little
CHUNK = 4096  # small: matrices visit in several chunks
optim = torch.optim
adamw = partial(optim.AdamW, lr=3e-3, eps=1e-4)


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, WIDTH), Block(WIDTH, WIDTH), Block(WIDTH, WIDTH), nn.Linear(WIDTH, 3))


def matrices(own: Sequence[Parameter]) -> list[Parameter]:
    return [p for p in own if p.ndim == 2]


def vectors(own: Sequence[Parameter]) -> list[Parameter]:
    return [p for p in own if p.ndim < 2]


def by_place(own: Sequence[Parameter], *, rest: bool = False) -> list[dict[str, Any]]:
    """Two groups: every third parameter, and the one behind it. rest: what they leave, in one."""
    if rest:
        return [{"params": list(own[2::3])}]
    return [{"params": list(own[::3])}, {"params": list(own[1::3]), "weight_decay": 0.2}]


def _flat(given: Sequence[Any]) -> list[Parameter]:
    """All of them, by groups or not."""
    return [p for one in given for p in (one["params"] if isinstance(one, dict) else [one])]


# name -> [(the optimizer, what of the trained parameters it is given)]
MIXES: dict[str, list[tuple[Callable[[Any], Any], Callable[..., Any]]]] = {
    "Muon, AdamW": [(partial(optim.Muon, lr=1e-3), matrices), (adamw, vectors)],
    "AdamW, AdamW": [(adamw, matrices), (partial(adamw, betas=(0.8, 0.99)), vectors)],
    "AdamW by groups, AdamW": [(adamw, by_place), (adamw, partial(by_place, rest=True))],
    "SGD, AdamW": [(partial(optim.SGD, lr=1e-2), matrices), (adamw, vectors)],
    "momentum, AdamW": [(partial(optim.SGD, lr=1e-2, momentum=0.9), matrices), (adamw, vectors)],
    "momentum, SGD": [(partial(optim.SGD, lr=1e-2, momentum=0.9), vectors), (partial(optim.SGD, lr=1e-2), matrices)],
    "AdamW of vectors": [(adamw, vectors)],
}
# What of four bytes is kept of each element that the optimizers step.
NUMBERS = {"Muon": 1, "AdamW": 2, "AdamW by groups": 2, "SGD": 0, "momentum": 1, "AdamW of vectors": 2}
OFFLOADED = ("1-opt", "2-opt", "3-opt", "1-disk", "2-disk", "3-disk")


def _made(ranks: Any, mix: str, plan: str, **settings: Any) -> tuple[Any, list[Any], list[Any]]:
    """(ShardedModel, the optimizers, the ShardedOptimizers)"""
    model = net()
    stepping = [make(choose(trained(model))) for make, choose in MIXES[mix]]
    sharded = shard(ranks, model, plan, **settings)
    return sharded, stepping, [ShardedOptimizer(each, [sharded]) for each in stepping]


def _step(ranks: Any, sharded: Any, stepping: Sequence[Any], batch: Tensor) -> None:
    loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size)).backward()
    for each in stepping:
        each.step()
    for each in stepping:
        each.zero_grad()


def _numbers(sharded: Any, stepping: Sequence[Any]) -> list[Tensor]:
    """All weights and states of a run."""
    states = [each.state_dict()["state"] for each in stepping]
    kept = [value for state in states for of in state.values() for value in of.values() if isinstance(value, Tensor)]
    return [*sharded.state_dict().values(), *kept]


def _resting_states(sharded: Any, tier: Tier) -> int:
    """Bytes of all slabs of this model's that live, without weights, masters and gradients."""
    gc.collect()
    store = sharded.engine.stores.of(tier, "optimizer")
    slabs = [one for one in gc.get_objects() if isinstance(one, Slab) and not isinstance(one, CodedSlab)]
    others = {id(one) for g in sharded.trained() for one in (g.master, g.buffer.slab, g.sums._host)}
    return sum(s.nbytes for s in slabs if s.store is store and id(s) not in others)


def _in_grains(sharded: Any, given: Sequence[Any], grain: int) -> tuple[int, int]:
    """(elements of these parameters on this rank, elements of the grains of its regions in which they lie)"""
    ids, exact, rounded = {id(p) for p in given}, 0, 0
    for g in sharded.trained():
        pieces = [p for p in g.region.pieces if id(g.buffer.members[p.slot].parameter) in ids]
        exact += sum(piece.numel for piece in pieces)
        grains = {element // grain for p in pieces for element in range(p.in_shard, p.in_shard + p.numel)}
        rounded += sum(min(grain, g.region.numel - number * grain) for number in grains)
    return exact, rounded


def _wanted(sharded: Any, mix: str, grain: int) -> tuple[int, int, int]:
    """Bytes on this rank of states (as they are, in grains), and of whole units for each optimizer."""
    exact = rounded = units = 0
    for name, (_, choose) in zip(mix.split(", "), MIXES[mix], strict=True):
        given = _flat(choose(trained(sharded.model)))
        if name == "Muon":  # of whole parameters, with one rank each
            continue
        own, in_grains = _in_grains(sharded, given, grain)
        exact, rounded = exact + 4 * NUMBERS[name] * own, rounded + 4 * NUMBERS[name] * in_grains
        held = {id(p) for p in given}
        of_units = (g.region.numel for g in sharded.trained() if held & {id(m.parameter) for m in g.buffer.members})
        units += 4 * NUMBERS[name] * sum(of_units)
    return exact, rounded, units


def _rest(ranks: Any, mix: str, plan: str) -> list[int]:
    """Bytes of states that rest, that the ledgers say, and that are wanted; holds the numbers against those in place."""
    tier = Tier.NVME if "disk" in plan else Tier.CPU
    with as_on_a_device(CHUNK):
        here, there = _made(ranks, mix, plan[0]), _made(ranks, mix, plan)
        for batch in inputs(3):
            for sharded, stepping, _ in (here, there):
                _step(ranks, sharded, stepping, batch)
        numbers = [_numbers(*run[:2]) for run in (here, there)]
        assert len(numbers[0]) == len(numbers[1]) > 0
        assert all(torch.equal(one, other) for one, other in zip(*numbers, strict=True))
        whole = sum(s.nbytes for one in there[2] for w in one.groups.owned for s in w.states.values())
        ledgers = [one.ledger() for one in there[2]]
        said = sum(sum(ledger.values()) for ledger in ledgers)
        found = _resting_states(there[0], tier)
        wanted = _wanted(there[0], mix, 4096 if tier is Tier.NVME else 256)
        if tier is Tier.NVME:
            drive = there[0].engine.stores.of(tier, "optimizer")
            files = {id(w): w for g in there[0].trained() for w in (g.master, g.buffer.slab) if w and w.store is drive}
            on_drive = drive.nbytes - sum(-(-one.nbytes // 4096) * 4096 for one in files.values())
            assert found <= on_drive < found + 4096 * 32  # each of a few files ends on a page
        return [found - whole, said, *wanted]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", OFFLOADED)
@pytest.mark.parametrize("mix", MIXES)
def test_each_optimizer_takes_off_the_device_what_it_steps(world, mix, plan):
    """To the byte, in whole grains; the ledgers and the estimate say so, and all numbers are those of a run in place."""
    with torch.device("meta"):
        model = net()
    steppers = [Stepper(make, _flat(choose(trained(model))), "it") for make, choose in MIXES[mix]]
    run = Run(world_size=2, cuda=True, steppers=steppers, options=EngineConfig())
    estimated = estimate(model, Choice(*(PLANS | OTHER_PLANS)[plan]), run).states
    less = 0
    for rank, (found, said, exact, rounded, units) in enumerate(world(2).run(_rest, mix, plan)):
        assert exact <= found == rounded <= units
        assert said == estimated[rank % len(estimated)]
        less += units - found
    assert less > 0  # than units for each


# Copies.


def _copies(ranks: Any, mix: str, plan: str) -> tuple[list[int], list[int]]:
    """Of a step, copies up and down, and elements of both: what was counted, and what optimizers need for themselves."""
    counted: list[int] = [0, 0, 0]

    def counts(kind: int, call: Any) -> Any:
        def counting(store: Any, one: Any, other: Any, *rest: Any, **more: Any) -> Any:
            counted[kind] += 1
            counted[2] += (one if isinstance(one, Tensor) else other).numel()
            return call(store, one, other, *rest, **more)

        return counting

    with as_on_a_device(CHUNK), ExitStack() as patches:
        sharded, stepping, steppers = _made(ranks, mix, plan)
        batches = inputs(3)
        for batch in batches[:2]:
            _step(ranks, sharded, stepping, batch)
        loss_of(sharded.model, mine(batches[2], ranks.rank, ranks.world_size)).backward()
        for store in (HostStore, NvmeStore):
            for kind, name in enumerate(("fetch", "put")):
                patches.enter_context(mock.patch.object(store, name, counts(kind, getattr(store, name))))
        for each in stepping:
            each.step()
        wanted = [0, 0, 0]
        for name, stepper in zip(mix.split(", "), steppers, strict=True):
            for g in sharded.trained():
                own = [s for s in stepper.groups.stepped if s.trained is g]
                for begin in range(0, g.region.numel, CHUNK):
                    end = min(begin + CHUNK, g.region.numel)
                    if any(s.begin < end and begin < s.end for s in own):
                        wanted[0] += 2 + NUMBERS[name]
                        wanted[1] += NUMBERS[name] + (not g.shares_weights)
                        places = stepper.groups.unit_states[id(g)].footprint.place
                        wanted[2] += (2 + (not g.shares_weights)) * (end - begin)
                        wanted[2] += 2 * NUMBERS[name] * (places(end) - places(begin))
        return counted, wanted


@pytest.mark.parametrize("plan", ["2-opt", "1-disk"])
@pytest.mark.parametrize("mix", [mix for mix in MIXES if "Muon" not in mix])
def test_a_visit_copies_a_state_once_each_way_and_no_other_optimizers(world, mix, plan):
    for counted, wanted in world(2).run(_copies, mix, plan):
        assert counted == wanted


# What joins later.


def _joined(ranks: Any, plan: str, dtype: str) -> int:
    """Vectors join an optimizer that has states of their units; gives the bytes of states that are too many."""
    with as_on_a_device(CHUNK):
        runs = [
            _made(ranks, "AdamW of vectors", p, optimizer_state_dtype=d) for p, d in ((plan[0], "fp32"), (plan, dtype))
        ]
        for number, batch in enumerate(inputs(5)):
            for sharded, (stepping,), _ in runs:
                if number == 2:
                    before = stepping.state_dict()["state"]
                    stepping.add_param_group({"params": matrices(trained(sharded.model))[1:4], "lr": 1e-3})
                    after = stepping.state_dict()["state"]
                    assert before.keys() == after.keys()
                    assert all(torch.equal(before[n][key], after[n][key]) for n in before for key in before[n])
                _step(ranks, sharded, [stepping], batch)
        sharded, (stepping,), (stepper,) = runs[1]
        if dtype == "fp32":
            numbers = [_numbers(*run[:2]) for run in runs]
            assert all(torch.equal(one, other) for one, other in zip(*numbers, strict=True))
        for one in stepper.groups.stepped:
            for key, slab in one.states.items():
                value = stepping.state[one.tensor][key]
                assert not slab.in_memory or value.data_ptr() == slab.tensor[one.state_begin :].data_ptr()
        tier = Tier.NVME if "disk" in plan else Tier.CPU
        held = [p for group in stepper.groups.parameters for p in group]
        itemsize = 8 if dtype == "fp32" else 4
        return _resting_states(sharded, tier) - itemsize * _in_grains(sharded, held, 4096 if "disk" in plan else 256)[1]


@pytest.mark.parametrize(
    ("plan", "dtype"), [("1-opt", "fp32"), ("3-disk", "fp32"), ("2-opt", "bf16"), ("2-disk", "bf16")]
)
def test_parameters_that_join_a_unit_with_states_get_places_and_the_others_keep_their_numbers(world, plan, dtype):
    assert world(2).run(_joined, plan, dtype) == [0, 0]


# Checkpoints.


def _prepared(stage: int, device: str, folder: str) -> tuple[Accelerator, nn.Module, list[Any]]:
    forget_run()
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        offload_optimizer_device=device,
        offload_optimizer_nvme_path=folder if device == "nvme" else None,
    )
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model = net()
    stepping = [make(choose(trained(model))) for make, choose in MIXES["momentum, AdamW"]]
    accelerator.prepare(model, *stepping)
    return accelerator, model, stepping


def _whole(accelerator: Accelerator, model: nn.Module, stepping: Sequence[Any]) -> list[Tensor]:
    states = [each.state_dict()["state"] for each in stepping]
    kept = [value for state in states for of in state.values() for value in of.values() if isinstance(value, Tensor)]
    return [*kept, *accelerator.get_state_dict(model).values()]  # weights on the first rank


def _saved(ranks: Any, folder: str, stage: int, device: str) -> list[Tensor]:
    with as_on_a_device(CHUNK):
        accelerator, model, stepping = _prepared(stage, device, folder)
        for batch in inputs(2):
            accelerator.backward(loss_of(model, mine(batch, ranks.rank, ranks.world_size)))
            for each in stepping:
                each.step()
                each.zero_grad()
        accelerator.save_state(f"{folder}/saved")
        return _whole(accelerator, model, stepping)


def _loaded(ranks: Any, folder: str, stage: int, device: str) -> list[Tensor]:
    with as_on_a_device(CHUNK):
        accelerator, model, stepping = _prepared(stage, device, folder)
        accelerator.load_state(f"{folder}/saved")
        return _whole(accelerator, model, stepping)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((2, 2, "nvme"), (1, 3, "cpu")), ((1, 3, "cpu"), (2, 1, "nvme")), ((2, 3, "none"), (2, 2, "nvme"))],
)
def test_states_load_at_any_number_of_ranks_stage_and_tier(world, tmp_path, saved, loaded):
    """(ranks, stage, tier) of who saved, and of who loads."""
    wanted, *_ = world(saved[0]).run(_saved, str(tmp_path), *saved[1:])
    first, *others = world(loaded[0]).run(_loaded, str(tmp_path), *loaded[1:])
    assert len(first) == len(wanted) == 12 + 6 + 3 * 6
    for found in (first, *others):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=False))
