"""`shard_group`: copies of a model, each sharded over some ranks, train as one process, and are saved and loaded as any run."""

from __future__ import annotations

import copy
import tempfile
import uuid
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

import shardwise
from rig.engine import (
    adamw,
    inputs,
    largest_difference,
    loss_of,
    mine,
    plain_step,
    prepare,
    shard,
    states_at_rest,
    tower,
    train_both,
    trained,
    weights_of,
)
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.errors import ConfigError, OptimizerError, PrepareError
from shardwise.offload import peers
from shardwise.plan.blueprint import at_rest, divide
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.plan.units import find_units
from shardwise.ranks.group import Group
from shardwise.run.joined import Joined, forget_run
from shardwise.run.local_sgd import LocalSGD
from shardwise.zero.build import BUCKET_NBYTES

ALL_OWN = (2, "world")  # weights in pairs, what the optimizer works on over all ranks


def divided(ranks, shard_group):
    """shard_group: or a pair of it and optimizer_shard_group."""
    weights, optimizer = shard_group if isinstance(shard_group, tuple) else (shard_group, "shard_group")
    found = ranks.divided(weights, all_own=optimizer == "world")
    for group in (found.shards, found.copies):
        group.counts.clear()
    return found


def with_frozen(model):
    """As with adapters: three quarters of each block are frozen."""
    for block in model.blocks:
        block.up.requires_grad_(False)
    return model


# The numbers.


def _trains(ranks, plan, shard_group, frozen, settings):
    model = with_frozen(tower()) if frozen else tower()
    train_both(divided(ranks, shard_group), model, plan, **settings)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("plan", "shard_group", "frozen", "settings"),
    [
        ("1", 2, False, {}),
        ("2", 2, True, {}),
        ("3", 2, False, {}),
        ("3", 1, False, {}),
        ("3", 2, True, {"whole_adapters": True}),
        ("3", 2, True, {"whole_adapters": False}),
        ("2-opt", 2, False, {}),
        ("3-all", 2, True, {}),
        ("3-disk", 2, False, {}),
        ("3", ALL_OWN, False, {}),
        ("3", (4, "world"), False, {}),
        ("3", ALL_OWN, False, {"precision": "bf16", "tolerance": 2e-2}),
        ("3", ALL_OWN, True, {"whole_adapters": True}),
        ("3", ALL_OWN, True, {"whole_adapters": False}),
        ("3-opt", ALL_OWN, False, {}),
        ("3-all", ALL_OWN, True, {"whole_adapters": False}),
        ("3-disk", ALL_OWN, False, {}),
    ],
)
def test_a_run_in_groups_trains_as_one_process(world, plan, shard_group, frozen, settings):
    world(4).run(_trains, plan, shard_group, frozen, settings)


def _accumulates(ranks, plan, shard_group):
    grouped, reference, model = divided(ranks, shard_group), tower(), tower()
    plain = adamw(reference.parameters())
    sharded, _, stepping = prepare(grouped, model, plan, clipping=0.05)
    for step, batch in enumerate(inputs(6)):
        boundary = step % 3 == 2
        sharded.sync_gradients = boundary
        plain_step(reference, batch, 4, step, loss_of)
        loss_of(model, mine(batch, ranks.rank, 4)).backward()
        if boundary:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
            plain.step()
            plain.zero_grad()
        stepping.step()
        stepping.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize(
    ("plan", "shard_group"), [("1", 2), ("2", 2), ("3", 2), ("3-all", 2), ("3", ALL_OWN), ("3-all", ALL_OWN)]
)
def test_micro_batches_add_up_and_are_clipped_by_the_norm_of_one_copy(world, plan, shard_group):
    assert max(world(4).run(_accumulates, plan, shard_group)) <= 1e-6


# Bytes and messages.


def _rests(ranks, stage, shard_group):
    grouped, model = divided(ranks, shard_group), with_frozen(tower())
    plan = replace(Plan.from_stage(stage), parts=grouped.owners.size // grouped.shards.size)
    blueprints = divide(find_units(model), plan, Precision(), bucket_nbytes=BUCKET_NBYTES)
    size = grouped.shards.size
    states = states_at_rest(blueprints, model, size, grouped.owners.rank)
    sharded, stepper, stepping = prepare(grouped, model, str(stage))
    loss_of(model, mine(inputs(1)[0], ranks.rank, 4)).backward()
    stepping.step()
    stepping.zero_grad()
    assert sharded.ledger() == at_rest(blueprints, size)
    assert stepper.ledger() == states
    return sum(sharded.ledger().values()) + sum(stepper.ledger().values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_holds_what_one_of_its_group_alone_would(world, stage):
    whole, half, quarter = (set(world(4).run(_rests, stage, group)) for group in (1, 2, 4))
    assert max(whole) > max(half) > max(quarter)


def test_states_over_all_ranks_rest_by_the_formula(world):
    """Weights a half, masters and states a quarter."""
    assert sum(world(4).run(_rests, 3, ALL_OWN)) > sum(world(4).run(_rests, 3, 4))


def _counts(ranks, shard_group):
    grouped, model = divided(ranks, shard_group), tower()
    sharded, _, stepping = prepare(grouped, model, "3")
    for step, batch in enumerate(inputs(3)):
        if step == 2:  # the first passes are negotiated
            for counts in (ranks.counts, grouped.shards.counts, grouped.copies.counts):
                counts.clear()
        loss_of(model, mine(batch, ranks.rank, 4)).backward()
        stepping.step()
        stepping.zero_grad()
    moved = ("all_gather", "reduce_scatter", "all_reduce_gradient", "broadcast", "fence")
    of = (ranks.counts, grouped.shards.counts, grouped.copies.counts)
    found = [{name: counts[name] for name in moved if counts[name]} for counts in of]
    sharded.release()
    return found


def test_gathers_stay_inside_and_each_reduction_crosses_once(world):
    """As many as without groups, over the ranks of a group; and one all-reduce over the copies for each reduction."""
    whole, *_ = world(4).run(_counts, "world")[0]
    assert whole.keys() == {"all_gather", "reduce_scatter"}
    for over_all, shards, copies in world(4).run(_counts, 2):
        assert over_all == {}
        assert shards == whole
        assert copies == {"all_reduce_gradient": whole["reduce_scatter"]}


def test_states_over_all_ranks_cross_once_for_a_reduction_and_once_for_the_new_weights(world):
    whole, *_ = world(4).run(_counts, "world")[0]
    for over_all, shards, copies in world(4).run(_counts, ALL_OWN):
        assert over_all == {}
        assert shards == whole
        assert copies == {"reduce_scatter": whole["reduce_scatter"], "all_gather": 1}


# What else a script does with a model.


def _reads_and_writes(ranks, shard_group):
    grouped, model, reference = divided(ranks, shard_group), tower(), tower()
    sharded, _, stepping = prepare(grouped, model, "3")
    with shardwise.gathered(model, modify=True), torch.no_grad():
        if ranks.rank == 0:
            model.head.weight.fill_(0.25)
    with torch.no_grad():
        reference.head.weight.fill_(0.25)
    assert largest_difference(weights_of(sharded), reference) == 0
    loss_of(model, mine(inputs(1)[0], ranks.rank, 4)).backward()
    plain = adamw(reference.parameters())
    plain_step(reference, inputs(1)[0], 4, 0, loss_of)
    gradient = shardwise.full(model.head.weight, "gradient")
    assert torch.allclose(gradient, reference.head.weight.grad, atol=1e-7)
    plain.step()
    stepping.step()
    stepping.zero_grad()
    moment = shardwise.full(model.head.weight, "exp_avg")
    assert torch.allclose(moment, plain.state[reference.head.weight]["exp_avg"], atol=1e-7)
    shardwise.set_full(model.head.weight, "exp_avg", torch.full_like(moment, 2.0))
    state = stepping.state_dict()["state"]
    assert len(state) == len(list(reference.parameters()))
    assert sum(bool((entry["exp_avg"] == 2.0).all()) for entry in state.values()) == 1
    stepping.load_state_dict(plain.state_dict())
    again = stepping.state_dict()["state"]
    wanted = [plain.state[p]["exp_avg"] for p in reference.parameters()]
    assert all(torch.equal(again[i]["exp_avg"], moment) for i, moment in enumerate(wanted))
    with sharded.generation(), torch.no_grad():
        for _ in range(1 + ranks.rank % 2):
            model(inputs(1)[0])
    found = sharded.state_dict()
    assert bool(found) == (ranks.rank == 0)
    sharded.release()
    assert largest_difference(dict(model.named_parameters()), reference) <= 1e-6


@pytest.mark.parametrize("shard_group", [2, ALL_OWN])
def test_whole_weights_gradients_and_states_are_read_and_written_in_groups(world, shard_group):
    world(4).run(_reads_and_writes, shard_group)


def _thaws_and_averages(ranks, shard_group):
    from shardwise.step.averaging import ShardedEMA

    model, grouped = with_frozen(tower()), divided(ranks, shard_group)
    reference = copy.deepcopy(model)
    make = torch.optim.SGD
    sharded, _, stepping = prepare(grouped, model, "3", optimizer=lambda p: make(model.parameters(), lr=0.1))
    plain = make(reference.parameters(), lr=0.1)
    ema = ShardedEMA(sharded, 0.5)
    average = torch.optim.swa_utils.AveragedModel(
        reference, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for step, batch in enumerate(inputs(4)):
        if step == 2:
            for each in (model, reference):
                each.blocks[1].up.requires_grad_(True)
        plain_step(reference, batch, 4, step, loss_of)
        plain.step()
        plain.zero_grad()
        average.update_parameters(reference)
        loss_of(model, mine(batch, ranks.rank, 4)).backward()
        stepping.step()
        stepping.zero_grad()
        ema.update()
    with ema.swapped():
        averaged = weights_of(sharded)
    return largest_difference(weights_of(sharded), reference), largest_difference(averaged, average.module)


@pytest.mark.parametrize("shard_group", [2, ALL_OWN])
def test_weights_thaw_and_are_averaged_in_groups(world, shard_group):
    for own, averaged in world(4).run(_thaws_and_averages, shard_group):
        assert own <= 1e-6
        assert averaged <= 1e-6


def _other_models(ranks):
    grouped, reference = divided(ranks, 2), tower(seed=8)
    reward = shard(grouped, tower(seed=8), "3", trains=False)
    _trains(ranks, "3", 2, False, {})
    with torch.no_grad():
        assert torch.allclose(reward.model(inputs(1)[0]), reference(inputs(1)[0]), atol=1e-6)
    first, second = tower(), tower(seed=9)
    models = [shard(grouped, first), shard(ranks, second)]
    from shardwise.step.optimizer import ShardedOptimizer

    with pytest.raises(OptimizerError, match="sharded over different groups of ranks"):
        ShardedOptimizer(adamw([*first.parameters(), *second.parameters()]), models)


def test_several_models_and_those_that_only_evaluate(world):
    world(4).run(_other_models)


# Copy engines: files in memory that the ranks of a group map stand in for those of a GPU, see test_peers.py.


def _mapped(group, numel, dtype, *, ranks):
    path = Path(tempfile.gettempdir()) / f"shardwise-groups-{uuid.uuid4().hex}"
    own = f"{path}-{ranks.rank}"
    torch.from_file(own, shared=True, size=numel, dtype=dtype).zero_()
    everyone = ranks.gather_objects(own)
    found = [torch.from_file(everyone[rank], shared=True, size=numel, dtype=dtype) for rank in group.members]
    ranks.barrier()
    Path(own).unlink()
    return found


def _with_copy_engines(ranks, shard_group):
    grouped = divided(ranks, shard_group)
    before = peers._why_not, peers._trial, Group.map_shared, peers.MIN_SHARD_NBYTES
    peers._why_not = peers._trial = lambda ranks: None
    Group.map_shared, peers.MIN_SHARD_NBYTES = partialmethod(_mapped, ranks=ranks), 1
    try:
        train_both(grouped, with_frozen(tower()), "3", gather_with="copy_engine")
    finally:
        peers._why_not, peers._trial, Group.map_shared, peers.MIN_SHARD_NBYTES = before
    assert grouped.shards.counts["fence"] == 12
    assert "fence" not in ranks.counts
    assert "all_gather" not in {name for name, count in grouped.shards.counts.items() if count and name != "fence"}


@pytest.mark.parametrize("shard_group", [2, ALL_OWN])
def test_ranks_copy_from_those_of_their_group_alone(world, shard_group):
    world(4).run(_with_copy_engines, shard_group)


def _on_one_machine(ranks):
    apart = copy.copy(ranks)
    apart._divided, apart.machines = {}, (0, 0, 1, 1)
    inside, straddling = apart.divided("machine"), copy.copy(apart)
    straddling._divided, straddling.machines = {}, (0, 1, 1, 0)
    assert inside.shards.members == ((0, 1) if ranks.rank < 2 else (2, 3))
    assert inside.copies.members == ((0, 2) if ranks.rank % 2 == 0 else (1, 3))
    return (
        peers.on_one_machine(apart),
        peers.on_one_machine(inside),
        peers.on_one_machine(straddling.divided("machine")),
    )


def test_a_group_of_one_machine_may_copy_where_the_run_is_on_several(world):
    assert set(world(4).run(_on_one_machine)) == {(False, True, True)}


# Accelerators.


def accelerator_of(shard_group, stage=3, **keywords):
    forget_run()
    if isinstance(shard_group, tuple):
        shard_group, keywords["optimizer_shard_group"] = shard_group
    return Accelerator(
        cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, shard_group=shard_group, **keywords)
    )


def _refused(ranks, shard_group, machines):
    accelerator_of("world")
    if machines:
        Joined.ranks.machines = machines
    ranks.counts.clear()
    try:
        Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, shard_group=shard_group))
    except ConfigError as error:
        return str(error)
    finally:
        forget_run()


@pytest.mark.parametrize(
    ("shard_group", "machines", "text"),
    [
        (
            3,
            (),
            "shard_group: 3 does not divide the 4 rank(s) of this run. Take a number that does (1, 2, 4), machine or",
        ),
        (
            "machine",
            (0, 0, 0, 1),
            "machine 0 has ranks 0-2, machine 1 has rank 3. Start as many on each, or take world",
        ),
        ("node", (), "shard_group: 'node' is not world, machine or a number of ranks"),
        (0, (), "shard_group: 0 is not world, machine or a number of ranks"),
    ],
)
def test_groups_that_cannot_be_are_one_error_on_every_rank(world, shard_group, machines, text):
    found = world(4).run(_refused, shard_group, machines)
    assert len(set(found)) == 1
    assert text in found[0]


def _without_effect(ranks):
    accelerator = accelerator_of(2, stage=0)
    model = accelerator.prepare(tower())
    sharded = accelerator._run.models[0].sharded
    assert sharded.ranks is accelerator._run.ranks
    optimizer = accelerator.prepare(adamw(model.parameters()))
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for batch in inputs(2):
            accelerator.backward(loss_of(model, mine(batch, ranks.rank, 4)))
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    accelerator = accelerator_of(2)
    model, _ = accelerator.prepare(model := tower(), adamw(model.parameters()))
    with (
        pytest.raises(PrepareError, match="zero_stage 0"),
        LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2),
    ):
        pass
    accelerator.free_memory()


def test_nothing_is_divided_at_stage_0_and_ranks_of_a_group_train_together(world):
    world(4).run(_without_effect)


class Normed(nn.Module):
    """Statistics of its batches, which the ranks have in common after a step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.tower, self.norm = tower(), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.tower(x))


def _built_without_memory(ranks, shard_group):
    accelerator = accelerator_of(shard_group)
    with accelerator.init():
        model = Normed()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    sharded = accelerator._run.models[0].sharded
    assert largest_difference(weights_of(sharded), Normed()) == 0
    assert accelerator.data_parallel_shard_rank == ranks.rank % 2
    for batch in inputs(2):
        accelerator.backward(loss_of(model, mine(batch, ranks.rank, 4)))
        optimizer.step()
        optimizer.zero_grad()
    found = model.norm.running_mean.clone(), weights_of(sharded)
    accelerator.free_memory()
    return found


@pytest.mark.parametrize("shard_group", [2, ALL_OWN])
def test_models_built_without_memory_are_the_same_in_every_copy(world, shard_group):
    first, *others = world(4).run(_built_without_memory, shard_group)
    for mean, weights in others:
        assert torch.equal(mean, first[0])
        assert all(torch.equal(value, first[1][name]) for name, value in weights.items())


def script_of(shard_group, stage=3):
    accelerator = accelerator_of(shard_group, stage)
    model = with_frozen(tower())
    model, optimizer = accelerator.prepare(model, adamw(trained(model)))
    return accelerator, model, optimizer, accelerator._run.models[0].sharded


def step_of(accelerator, model, optimizer, number):
    world = accelerator.num_processes
    accelerator.backward(loss_of(model, mine(inputs(4)[number], accelerator.process_index, world)))
    optimizer.step()
    optimizer.zero_grad()


def _saves(ranks, folder, shard_group, stage):
    accelerator, model, optimizer, sharded = script_of(shard_group, stage)
    for number in range(2):
        step_of(accelerator, model, optimizer, number)
    accelerator.save_state(folder, include_frozen=True)
    saved = weights_of(sharded), optimizer.state_dict()["state"]
    step_of(accelerator, model, optimizer, 2)
    after = weights_of(sharded)
    accelerator.free_memory()
    return saved, after


def _loads(ranks, folder, shard_group, stage):
    accelerator, model, optimizer, sharded = script_of(shard_group, stage)
    with shardwise.gathered(model, modify=True), torch.no_grad():
        for parameter in trained(model):
            parameter.zero_()
    accelerator.load_state(folder)
    loaded = weights_of(sharded), optimizer.state_dict()["state"]
    step_of(accelerator, model, optimizer, 2)
    after = weights_of(sharded)
    accelerator.free_memory()
    return loaded, after


def _elements(folder):
    """(of each tensor of a checkpoint how many elements its parts have together, and how many it has; bytes of each rank)."""
    from shardwise.checkpoint.read import Checkpoint

    checkpoint = Checkpoint(Path(folder))
    return {
        address: (sum(part.numel for _, part in parts), torch.Size(parts[0][1].shape).numel())
        for address, parts in checkpoint._parts.items()
        if address.startswith(("model", "optimizer"))
    }, [entry.tensors_nbytes or 0 for entry in checkpoint.manifest.entries]


# Each change of group and stage once: (ranks, group, stage) of who saves, and of those who load.
CHANGES = [
    ((4, "world", 3), [(4, 2, 3), (2, 1, 2)]),
    ((4, 2, 3), [(4, "world", 3), (4, 1, 3), (1, "world", 3), (2, "world", 1), (4, ALL_OWN, 3)]),
    ((4, ALL_OWN, 3), [(4, ALL_OWN, 3), (4, 2, 3), (3, "world", 2)]),
    ((4, 1, 2), [(4, 2, 1), (3, "world", 3)]),
]


@pytest.mark.parametrize(("saver", "loaders"), CHANGES)
def test_a_checkpoint_loads_across_any_change_of_group(world, tmp_path, saver, loaders):
    n, group, stage = saver
    folder = str(tmp_path / "saved")
    ((weights, states), after), *_ = world(n).run(_saves, folder, group, stage)
    elements, nbytes = _elements(folder)
    assert any("/frozen/" in address for address in elements)
    assert all(held == whole for held, whole in elements.values()), "each element is saved once"
    assert max(nbytes) < 2 * min(nbytes), "every rank saves its part"
    for m, other, later in loaders:
        for (loaded, moments), again in world(m).run(_loads, folder, other, later):
            assert all(torch.equal(loaded[name], value) for name, value in weights.items())
            for key, state in states.items():
                assert all(torch.equal(torch.as_tensor(moments[key][k]), torch.as_tensor(v)) for k, v in state.items())
            assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in after.items())
