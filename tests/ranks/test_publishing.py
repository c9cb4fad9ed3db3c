"""At stages 1 and 2 weights are published while other units step: the same bits, and whole for whoever reads them next."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_engine_optimizers import ELEMENTWISE

from rig.engine import adamw, inputs, loss_of, mine, prepare, shard, tower, trained

BUCKETS = 5  # first, three blocks, head; the smallest is the head, the largest are the blocks


@contextlib.contextmanager
def _small(group_nbytes):
    """Buckets of one module each, and groups of `group_nbytes`."""
    from shardwise.step import publishing
    from shardwise.zero import build

    before = build.BUCKET_NBYTES, publishing.GROUP_NBYTES
    build.BUCKET_NBYTES, publishing.GROUP_NBYTES = 1, group_nbytes
    try:
        yield
    finally:
        build.BUCKET_NBYTES, publishing.GROUP_NBYTES = before


@contextlib.contextmanager
def _recorded(ranks, sharded, cls=torch.optim.AdamW):
    """A list of what happens: ("step", names of what is stepped) and ("gather", names of the units)."""
    events = []
    names = {unit.trained.buffer.whole.data_ptr(): unit.name for unit in sharded.units}
    masters = {}
    for unit in sharded.units:
        masters[unit.trained.master.tensor.untyped_storage().data_ptr()] = unit.name
    gather, step = ranks.shards.all_gather_together, cls.step

    def noted_gather(wholes, shards):
        events.append(("gather", [names[whole.data_ptr()] for whole in wholes]))
        gather(wholes, shards)

    def noted_step(self, *args):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        events.append(("step", sorted({masters[p.untyped_storage().data_ptr()] for p in held})))
        return step(self, *args)

    ranks.shards.all_gather_together, cls.step = noted_gather, noted_step
    try:
        yield events
    finally:
        del ranks.shards.all_gather_together
        cls.step = step


def _backward(ranks, model, batch):
    loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()


def _prepare(ranks, plan, **settings):
    model = tower()
    return model, *prepare(ranks, model, plan, units=["first", "blocks.*", "head"], **settings)


def _whole_weights(sharded):
    """By name, what every rank's master says: gathered from the masters, not from the weights that compute."""
    found = {}
    for unit in sharded.units:
        whole = sharded.whole.master(unit.trained)
        for index, member in enumerate(unit.trained.buffer.members):
            found[member.name] = unit.trained.buffer.view(index, whole).to(unit.trained.buffer.dtype)
    return found


# Order.


def _by_turns(ranks, plan, group_nbytes):
    with _small(group_nbytes):
        model, sharded, _, stepping = _prepare(ranks, plan, precision="bf16")
        held = [list(group["params"]) for group in stepping.param_groups]
        seen = []
        for batch in inputs(3):
            _backward(ranks, model, batch)
            with _recorded(ranks, sharded) as events:
                stepping.step()
            seen.append(events)
        now = [[id(p) for p in group["params"]] for group in stepping.param_groups]
        assert now == [[id(p) for p in params] for params in held]
        sizes = {unit.name: unit.trained.buffer.whole_nbytes for unit in sharded.units}
        return seen, sizes


@pytest.mark.parametrize("plan", ["1", "2"])
def test_units_step_and_are_published_by_turns_the_smallest_first(world, plan):
    results = world(2).run(_by_turns, plan, 1)
    (seen, sizes), (other, _) = results
    for events, others in zip(seen, other, strict=True):
        assert [kind for kind, _ in events] == ["step", "gather"] * BUCKETS
        gathers = [names for kind, names in events if kind == "gather"]
        assert gathers == [names for kind, names in others if kind == "gather"], "the same on every rank"
        assert [sizes[name] for (name,) in gathers] == sorted(sizes.values())
        for (_, stepped), (_, gathered) in zip(events[::2], events[1::2], strict=True):
            assert set(stepped) <= set(gathered), "a rank whose interval is padding has nothing to step"


def test_what_fits_a_group_is_one_call_and_one_collective(world):
    for seen, _ in world(2).run(_by_turns, "1", 1 << 20):
        for events in seen:
            assert [kind for kind, _ in events] == ["step", "gather"]
            assert len(events[1][1]) == BUCKETS


def _other_plans(ranks, plan):
    with _small(1):
        model, sharded, _, stepping = _prepare(ranks, plan)
        for batch in inputs(2):
            _backward(ranks, model, batch)
            with _recorded(ranks, sharded) as events:
                stepping.step()
    return [kind for kind, _ in events]


def test_a_stage_that_publishes_nothing_steps_in_one_call(world):
    for kinds in world(2).run(_other_plans, "0"):
        assert kinds == ["step"]


# Bits.


class _Counting(torch.optim.SGD):
    """A user's own optimizer, which may only be called once a step: its rate falls with its calls."""

    calls = 0

    def step(self, closure=None):
        type(self).calls += 1
        super().step(closure)


def _build(kind):
    if kind == "counting":
        return lambda params: _Counting(params, lr=0.05)
    if kind in ("foreach", "fused", "single"):
        flags = {"foreach": kind == "foreach", "fused": kind == "fused"}
        return lambda params: torch.optim.AdamW(
            [{"params": params[::2], "lr": 1e-2, "weight_decay": 0.1}, {"params": params[1::2]}], eps=1e-4, **flags
        )
    return ELEMENTWISE[kind]


def _trains(ranks, plan, kind, group_nbytes, steps=4, **settings):
    with _small(group_nbytes):
        model, _, _, stepping = _prepare(ranks, plan, optimizer=_build(kind), **settings)
        _Counting.calls = 0
        for batch in inputs(steps):
            _backward(ranks, model, batch)
            stepping.step()
            stepping.zero_grad()
        assert _Counting.calls == (steps if kind == "counting" else 0)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        states = [
            {
                key: torch.as_tensor(value).clone()
                for key, value in stepping.state.get(p, {}).items()
                if value is not None
            }
            for group in stepping.param_groups
            for p in group["params"]
        ]
        return weights, states


def _same_bits(ranks, plan, kind, **settings):
    (weights, states), (expected, expected_states) = (
        _trains(ranks, plan, kind, nbytes, **settings) for nbytes in (1, 1 << 30)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for found, wanted in zip(states, expected_states, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", [*ELEMENTWISE, "foreach", "fused", "single", "counting"])
def test_stepping_in_groups_gives_the_bits_of_one_call(world, kind):
    world(2).run(_same_bits, "1", kind)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_clipped_and_scaled_steps_in_groups_have_the_same_bits(world, kind, precision):
    world(2).run(_same_bits, "2", kind, precision=precision, clipping=0.05)


def _hooked(ranks):
    with _small(1):
        model, sharded, _, stepping = _prepare(ranks, "1")
        seen = []

        def look(optimizer, args, kwargs):
            seen.append(sum(p.grad is not None for group in optimizer.param_groups for p in group["params"]))

        handle = stepping.register_step_pre_hook(look)
        batches = inputs(2)
        _backward(ranks, model, batches[0])
        stepping.step()
        whole = sum(len(group["params"]) for group in stepping.param_groups)
        handle.remove()
        _backward(ranks, model, batches[1])
        with _recorded(ranks, sharded) as events:
            stepping.step()
        return seen, whole, len(events)


def test_a_hook_on_the_step_sees_all_gradients_in_one_call(world):
    for seen, whole, events in world(2).run(_hooked):
        assert seen == [whole]
        assert events == 2 * BUCKETS


# Whoever reads next.


def _readers(ranks, plan, precision):
    with _small(1):
        model, sharded, _, stepping = _prepare(ranks, plan, precision=precision)
        aliases = {name: p.data for name, p in model.named_parameters()}  # taken before, as an EMA may
        for batch in inputs(3):
            _backward(ranks, model, batch)
            stepping.step()
            direct = {name: p.data.clone() for name, p in model.named_parameters()}
            through = {name: alias.clone() for name, alias in aliases.items()}
            expected = _whole_weights(sharded)
            state = sharded.state_dict()
            with torch.no_grad():
                found = model(batch)
                model.load_state_dict({name: p.clone() for name, p in direct.items()})  # reads and writes in place
                again = model(batch)
            assert direct.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(direct[name], value), name
                assert torch.equal(through[name], value), name
                if ranks.rank == 0:
                    assert torch.equal(state[name].to(value.dtype), value), name
            assert torch.equal(found, again)
            same = ranks.gather_objects(found.float().sum().item())
            assert len(set(same)) == 1, "every rank computes with the same weights"


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("plan", ["1", "2", "2-opt", "1-disk"])
def test_weights_are_whole_and_new_right_after_the_step(world, plan, precision):
    for n in (2, 3):
        world(n).run(_readers, plan, precision)


def _two_optimizers(ranks, plan):
    from shardwise.step.optimizer import ShardedOptimizer

    models = []
    for _ in range(2):
        model = tower()
        parts = trained(model)
        optimizers = [adamw(parts[::2]), torch.optim.SGD(parts[1::2], lr=0.05, momentum=0.9)]
        models.append((model, optimizers))
    with _small(1):
        (model, (first, second)), (other, others) = models
        sharded = shard(ranks, model, plan, units=["first", "blocks.*", "head"])
        for optimizer in (first, second):
            ShardedOptimizer(optimizer, [sharded])
    whole = shard(ranks, other, plan)
    for optimizer in others:
        ShardedOptimizer(optimizer, [whole])
    for batch in inputs(4):
        for prepared, (a, b) in ((model, (first, second)), (other, others)):
            with _small(1 if prepared is model else 1 << 30):
                _backward(ranks, prepared, batch)
                a.step()
                b.step()
                a.zero_grad()
                b.zero_grad()
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, theirs[name]), name
    expected = _whole_weights(sharded)
    assert all(torch.equal(p.data, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("plan", ["1", "2"])
def test_two_optimizers_that_share_buckets_publish_both_steps(world, plan):
    world(2).run(_two_optimizers, plan)


def _two_models(ranks):
    from shardwise.step.optimizer import ShardedOptimizer

    models = [tower(seed=seed) for seed in (1, 2)]
    stepping = adamw([p for model in models for p in trained(model)])
    with _small(1):
        sharded = [shard(ranks, model, "1", units=["first", "blocks.*", "head"]) for model in models]
        ShardedOptimizer(stepping, sharded)
        for batch in inputs(3):
            for model in models:
                _backward(ranks, model, batch)
            stepping.step()
            for one in sharded:
                expected = _whole_weights(one)
                assert all(torch.equal(p.data, expected[name]) for name, p in one.model.named_parameters())


def test_one_optimizer_publishes_the_weights_of_two_models(world):
    world(2).run(_two_models)


# When nothing is published.


def _accumulated(ranks, plan):
    with _small(1):
        model, sharded, _, stepping = _prepare(ranks, plan)
        counts = []
        for batch in inputs(2):
            for micro in range(3):
                sharded.sync_gradients = micro == 2
                _backward(ranks, model, batch)
                with _recorded(ranks, sharded) as events:
                    stepping.step()
                stepping.zero_grad()
                counts.append(len(events))
        return counts


@pytest.mark.parametrize("plan", ["1", "2"])
def test_nothing_is_published_while_gradients_are_accumulated(world, plan):
    for counts in world(2).run(_accumulated, plan):
        assert counts == [0, 0, 2 * BUCKETS] * 2


def _overflow(ranks, plan):
    with _small(1):
        model, sharded, stepper, stepping = _prepare(ranks, plan, precision="fp16", scale=2.0**10)
        batch = inputs(1)[0]
        before = {name: p.data.clone() for name, p in model.named_parameters()}
        (loss_of(model, mine(batch, ranks.rank, ranks.world_size)).float() * float("inf")).backward()
        with _recorded(ranks, sharded) as events:
            stepping.step()
        assert stepper.step_was_skipped
        assert events == []
        assert all(torch.equal(p.data, before[name]) for name, p in model.named_parameters())
        stepping.zero_grad()  # infinite gradients stay until then, as in torch
        _backward(ranks, model, batch)
        with _recorded(ranks, sharded) as events:
            stepping.step()
        assert not stepper.step_was_skipped
        assert len(events) == 2 * BUCKETS


@pytest.mark.parametrize("plan", ["1", "2"])
def test_a_step_that_overflowed_publishes_nothing(world, plan):
    world(2).run(_overflow, plan)


def _fails(ranks):
    with _small(1):
        model, _, _, stepping = _prepare(ranks, "1")
        step, calls = torch.optim.AdamW.step, []

        def failing(self, *args):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("in the third group")
            return step(self, *args)

        held = [list(group["params"]) for group in stepping.param_groups]
        _backward(ranks, model, inputs(1)[0])
        torch.optim.AdamW.step = failing
        try:
            with pytest.raises(RuntimeError, match="third group"):
                stepping.step()
        finally:
            torch.optim.AdamW.step = step
        now = [list(group["params"]) for group in stepping.param_groups]
        assert [[id(p) for p in group] for group in now] == [[id(p) for p in group] for group in held]
        assert all(p.grad is None for group in now for p in group)


def test_an_error_in_a_group_leaves_the_optimizer_with_all_its_weights(world):
    world(2).run(_fails)
