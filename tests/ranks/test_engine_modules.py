"""Models of every shape train as they do in one process: shared weights, branches, unused modules, several models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rig.engine import (
    PLANS,
    STAGES,
    Block,
    CheckpointedTower,
    Tower,
    adamw,
    inputs,
    largest_difference,
    loss_of,
    mine,
    plain_step,
    prepare,
    shard,
    tower,
    train_both,
    trained,
    weights_of,
)

pytestmark = pytest.mark.thinned(3)


def _plain(ranks, plan, **settings):
    model = tower()
    sharded, _ = train_both(ranks, model, plan, **settings)
    assert sharded.model is model
    assert type(model) is Tower


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_a_tower_trains_as_in_one_process(world, plan, n):
    world(n).run(_plain, plan)


class Hollow(Tower):
    """A part of it has a width of zero, as an option that is switched off may have."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.inner, self.outer = nn.Linear(5, 0), nn.Linear(0, 12)

    def forward(self, x):
        wide = self.outer(self.inner(x))
        return super().forward(x) + wide.mean(1, keepdim=True)


def _hollow(ranks, plan, precision):
    torch.manual_seed(3)
    model = Hollow()
    if precision == "no":
        train_both(ranks, model, plan)
        return
    sharded, _, stepping = prepare(ranks, model, plan, precision=precision)
    for batch in inputs(2):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    assert {model.inner.weight.dtype, model.outer.weight.dtype} == {torch.bfloat16}
    sharded.release()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("plan", ["0", "3"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_parameters_without_elements_compute_as_the_others_do(world, precision, plan):
    world(2).run(_hollow, plan, precision)


def _prefetch(ranks, prefetch):
    train_both(ranks, tower(5), "3", prefetch=prefetch)


@pytest.mark.parametrize("prefetch", [0, 1, 4, 50])
def test_how_far_units_are_gathered_ahead_changes_no_number(world, prefetch):
    world(2).run(_prefetch, prefetch)


def _units(ranks, units):
    train_both(ranks, tower(), "3", units=units)


@pytest.mark.parametrize("units", [["Block"], ["blocks.*"], ["Linear"], ["blocks.1", "head"]])
def test_units_named_by_the_user_train_the_same(world, units):
    world(2).run(_units, units)


def _checkpointed(ranks, plan, reentrant):
    torch.manual_seed(5)
    train_both(ranks, CheckpointedTower(reentrant), plan)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_recomputed_blocks_train_the_same(world, plan, reentrant):
    world(2).run(_checkpointed, plan, reentrant)


class WholeSegments(Tower):
    """One checkpointed segment over several units, and a second that calls the first block again."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def _some(self, x):
        return self.blocks[1](self.blocks[0](x))

    def _others(self, x):
        return self.blocks[0](self.blocks[2](x))

    def forward(self, x):
        x = self.first(x)
        x = checkpoint(self._some, x, use_reentrant=self.reentrant)
        x = checkpoint(self._others, x, use_reentrant=self.reentrant)
        return self.head(x)


def _segments(ranks, plan, reentrant):
    torch.manual_seed(5)
    train_both(ranks, WholeSegments(reentrant), plan)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("plan", ["2", "3"])
def test_a_block_in_two_checkpointed_segments_counts_twice(world, plan, reentrant):
    world(2).run(_segments, plan, reentrant)


class Tied(nn.Module):
    """The head is the first layer, transposed; and block 2 uses the `up` of block 0."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].up.weight = self.blocks[0].up.weight

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x @ self.first.weight


def _tied(ranks, plan):
    torch.manual_seed(5)
    model = Tied()
    sharded, _ = train_both(ranks, model, plan)
    assert model.blocks[2].up.weight is model.blocks[0].up.weight
    state = sharded.state_dict()
    if ranks.rank == 0:
        assert torch.equal(state["blocks.2.up.weight"], state["blocks.0.up.weight"])


@pytest.mark.parametrize("plan", PLANS)
def test_tied_weights_and_weights_of_two_blocks_stay_one(world, plan):
    world(2).run(_tied, plan)


class Repeats(Tower):
    """The same block three times, and once more behind another."""

    def forward(self, x):
        x = self.first(x)
        for block in (self.blocks[0], self.blocks[0], self.blocks[1], self.blocks[0], self.blocks[2]):
            x = block(x)
        return self.head(x)


def _repeats(ranks, plan):
    torch.manual_seed(5)
    train_both(ranks, Repeats(), plan)


@pytest.mark.parametrize("plan", PLANS)
def test_a_module_called_several_times_in_a_step_gets_all_its_gradients(world, plan):
    world(2).run(_repeats, plan)


class Choosy(Tower):
    """`route(rank, step)` says which blocks run."""

    route = None

    def forward(self, x, chosen):
        x = self.first(x)
        for index in chosen:
            x = self.blocks[index](x)
        return self.head(x)


def _skips(model, x, rank, step):
    return model(x, [[0, 1, 2], [0, 2], [1], [], [2, 1, 0], [0, 1, 2]][step]).square().mean()


def _not_called(ranks, plan):
    torch.manual_seed(5)
    # A weight without a gradient on any rank is left alone by the optimizer (no decay, no moments), as in one process.
    train_both(ranks, Choosy(), plan, loss_of=_skips)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_a_module_that_is_not_called_in_some_steps_is_left_alone_there(world, plan, n):
    world(n).run(_not_called, plan)


def _other_branch(model, x, rank, step):
    # Rank 0 takes block 0, the others block 1; block 2 alternates.
    return model(x, [min(rank, 1), *([2] if (rank + step) % 2 else [])]).square().mean()


def _branches(ranks, plan):
    torch.manual_seed(5)
    train_both(ranks, Choosy(), plan, loss_of=_other_branch, steps=8)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_ranks_that_take_different_branches_neither_hang_nor_differ(world, plan, n):
    world(n).run(_branches, plan, timeout_s=20)


def _late_branch(model, x, rank, step):
    # All ranks agree for three steps; the order is learned; then they part.
    if step < 3:
        return model(x, [0, 1, 2]).square().mean()
    return model(x, [[0, 2], [1, 0], [2, 1, 0]][rank]).square().mean()


def _late_branches(ranks, plan):
    torch.manual_seed(5)
    train_both(ranks, Choosy(), plan, loss_of=_late_branch, steps=8)


@pytest.mark.parametrize("plan", ["2", "3", "3-all"])
def test_ranks_may_part_after_the_order_has_been_learned(world, plan):
    world(3).run(_late_branches, plan, timeout_s=20)


def _frozen_only(ranks, plan):
    model = tower(4)
    model.blocks[0].requires_grad_(False)
    model.blocks[2].requires_grad_(False)
    model.blocks[3].up.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    sharded, _ = train_both(ranks, model, plan)
    after = weights_of(sharded)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("plan", PLANS)
def test_frozen_units_between_trained_ones_pass_the_gradient_and_stay_as_they_were(world, plan):
    world(2).run(_frozen_only, plan)


def _only_the_head_is_trained(ranks, plan):
    model = tower(3).requires_grad_(False)
    model.head.requires_grad_(True)
    train_both(ranks, model, plan)


@pytest.mark.parametrize("plan", ["0", "3", "3-all"])
def test_a_frozen_trunk_without_any_backward_works(world, plan):
    world(2).run(_only_the_head_is_trained, plan)


class Fuse:
    """Raises in the forward of a module when armed."""

    def __init__(self, module):
        self.armed = False
        module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        if self.armed:
            raise RuntimeError("blown")


def _exception(ranks, plan, where):
    model = tower()
    fuse = Fuse({"block": model.blocks[1], "inner": model.blocks[2].down, "head": model.head}[where])

    def blow(sharded, stepping, step):
        if step in (0, 3):
            fuse.armed = True
            with pytest.raises(RuntimeError, match="blown"):
                model(mine(inputs(1)[0], ranks.rank, ranks.world_size)).sum().backward()
            fuse.armed = False

    train_both(ranks, model, plan, between=blow)


@pytest.mark.parametrize("where", ["block", "inner", "head"])
@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_an_exception_in_mid_forward_leaves_nothing_behind(world, plan, where):
    world(2).run(_exception, plan, where)


class BackwardFuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("blown in backward")


def _exception_in_backward(ranks, plan):
    model = tower()

    def blow(sharded, stepping, step):
        if step in (0, 3):
            handle = model.blocks[1].register_forward_hook(lambda module, args, output: BackwardFuse.apply(output))
            with pytest.raises(RuntimeError, match="blown in backward"):
                model(mine(inputs(1)[0], ranks.rank, ranks.world_size)).sum().backward()
            handle.remove()
            stepping.zero_grad()

    train_both(ranks, model, plan, between=blow)


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_an_exception_in_mid_backward_is_forgotten_by_zero_grad(world, plan):
    world(2).run(_exception_in_backward, plan)


def _evaluation_between(ranks, plan):
    model = tower()

    def evaluate(sharded, stepping, step):
        model.eval()
        x = inputs(1, seed=step)[0]
        with torch.no_grad():
            outputs = [model(x) for _ in range(1 + step % 2)]
        model.train()
        assert all(torch.equal(outputs[0], other) for other in outputs)
        with sharded.gathered():
            whole = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
        expected = torch.func.functional_call(tower(), whole, (x,))
        assert torch.allclose(outputs[0], expected, atol=1e-6)

    train_both(ranks, model, plan, between=evaluate)


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_evaluation_between_steps_changes_no_number(world, plan):
    world(2).run(_evaluation_between, plan)


def _unequal_evaluation(ranks):
    sharded, _, stepping = prepare(ranks, tower(), "3")
    model = sharded.model
    x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    for _ in range(3):
        loss_of(model, x).backward()
        stepping.step()
        stepping.zero_grad()
        with torch.no_grad():
            assert torch.isfinite(model(x)).all()
        with torch.inference_mode():
            assert torch.isfinite(model(x)).all()


def test_inference_mode_between_steps_works(world):
    world(2).run(_unequal_evaluation)


def _teacher(ranks, plan):
    teacher, student = tower(3, seed=7).requires_grad_(False), tower(2, seed=8)
    plain_teacher, plain_student = copy.deepcopy(teacher), copy.deepcopy(student)
    plain = adamw(trained(plain_student))
    shard(ranks, teacher, plan)
    sharded, _, stepping = prepare(ranks, student, plan)

    def distill(x, teacher, student):
        with torch.no_grad():
            wanted = teacher(x)
        return (student(x) - wanted).square().mean()

    for batch in inputs(6):
        loss = distill(mine(batch, ranks.rank, ranks.world_size), teacher, student)
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        distill(batch, plain_teacher, plain_student).backward()
        plain.step()
        plain.zero_grad()
    assert largest_difference(weights_of(sharded), plain_student) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_a_frozen_teacher_and_a_student_live_in_one_process(world, plan):
    world(2).run(_teacher, plan)


def _two_trained(ranks, plan):
    from shardwise.step.optimizer import ShardedOptimizer

    one, two = tower(2, seed=7), tower(2, seed=8)
    plain_one, plain_two = copy.deepcopy(one), copy.deepcopy(two)
    plain = adamw([*trained(plain_one), *trained(plain_two)])
    stepping = adamw([*trained(one), *trained(two)])
    models = [shard(ranks, one, plan), shard(ranks, two, plan)]
    ShardedOptimizer(stepping, models)
    for batch in inputs(5):
        x = mine(batch, ranks.rank, ranks.world_size)
        (one(x) - two(x)).square().mean().backward()
        stepping.step()
        stepping.zero_grad()
        (plain_one(batch) - plain_two(batch)).square().mean().backward()
        plain.step()
        plain.zero_grad()
    assert largest_difference(weights_of(models[0]), plain_one) <= 1e-6
    assert largest_difference(weights_of(models[1]), plain_two) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_one_loss_and_one_optimizer_over_two_models(world, plan):
    world(2).run(_two_trained, plan)


def _preference(model, x, rank, step):
    # DPO-like: chosen and rejected go through the model before the one backward.
    chosen, rejected = model(x), model(-x)
    return -torch.nn.functional.logsigmoid((chosen - rejected).sum(1)).mean()


def _two_forwards(ranks, plan):
    train_both(ranks, tower(), plan, loss_of=_preference)


@pytest.mark.parametrize("plan", PLANS)
def test_two_forwards_before_one_backward(world, plan):
    world(2).run(_two_forwards, plan)


def _two_backwards(ranks, plan):
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan)
    for step, batch in enumerate(inputs(5)):
        # Two losses over one graph: the first backward keeps it.
        for target, x in ((reference, batch), (model, mine(batch, ranks.rank, ranks.world_size))):
            if target is model:
                sharded.sync_gradients = False
            out = target(x)
            out.square().mean().backward(retain_graph=True)
            sharded.sync_gradients = True
            (out.abs().mean() * (1 + step)).backward()
        plain.step()
        plain.zero_grad()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "1", "2", "3", "3-all"])
def test_two_backwards_through_one_forward_add_up(world, plan):
    world(2).run(_two_backwards, plan)


def _release(ranks, plan):
    model = tower()
    sharded, reference = train_both(ranks, model, plan)
    sharded.release()
    from shardwise.zero.sharded import find_sharded

    assert find_sharded(model) is None
    x = inputs(1)[0]
    assert torch.allclose(model(x), reference(x), atol=1e-5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    copy.deepcopy(model)


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_release_gives_an_ordinary_model_back(world, plan):
    world(2).run(_release, plan)


def _ranks_start_equal(ranks):
    model = tower(seed=ranks.rank)  # each rank made other weights: rank 0's count
    sharded = shard(ranks, model, "3")
    assert largest_difference(weights_of(sharded), tower(seed=0)) == 0


def test_ranks_that_made_different_weights_start_from_rank_0_s(world):
    world(2).run(_ranks_start_equal)


def _plain_steps_agree(ranks):
    # The helper itself: a plain step over ranks' parts equals one over the whole batch.
    one, other = tower(), tower()
    batch = inputs(1)[0]
    plain_step(one, batch, 3, 0, loss_of)
    loss_of(other, batch).backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_the_reference_of_these_tests_is_the_large_batch(world):
    world(1).run(_plain_steps_agree)


assert set(STAGES) <= set(PLANS)
