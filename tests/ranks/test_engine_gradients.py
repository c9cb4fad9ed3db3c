"""Gradients: accumulated, clipped, scaled, discarded, and equal to those of the large batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from rig.engine import (
    PLANS,
    adamw,
    inputs,
    largest_difference,
    loss_of,
    mine,
    plain_step,
    prepare,
    tower,
    train_both,
    trained,
    weights_of,
)
from rig.tiny import LENGTH, VOCABULARY, tiny
from shardwise.zero.engine import ReductionsInFlight

pytestmark = pytest.mark.thinned(2)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _accumulate(ranks, plan, calls_step_each_time):
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan)
    for batch in inputs(4, samples=24):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        plain.step()
        plain.zero_grad()
        parts = batch.chunk(4)
        for i, part in enumerate(parts):
            sharded.sync_gradients = i == 3
            (loss_of(model, mine(part, ranks.rank, ranks.world_size)) / 4).backward()
            if calls_step_each_time or i == 3:
                # As in accelerate: both do nothing while gradients are only accumulated.
                stepping.step()
                stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("calls_step_each_time", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_four_micro_batches_are_the_large_batch(world, plan, calls_step_each_time):
    world(2).run(_accumulate, plan, calls_step_each_time)


def _manual(ranks, plan):
    # A loop that knows nothing of sync_gradients: several backwards, then one step.
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan)
    for batch in inputs(4, samples=24):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        plain.step()
        plain.zero_grad()
        for part in batch.chunk(3):
            (loss_of(model, mine(part, ranks.rank, ranks.world_size)) / 3).backward()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", PLANS)
def test_accumulating_by_hand_is_the_large_batch(world, plan):
    world(2).run(_manual, plan)


def _uneven(ranks, plan):
    """Sequences of different lengths: the user sums token losses and divides by the tokens of the global batch."""
    model = tiny("llama")
    reference = copy.deepcopy(model)
    sharded, _, stepping = prepare(ranks, model, plan)
    plain = adamw(trained(reference))
    source = torch.Generator().manual_seed(3)
    for _ in range(4):
        tokens = torch.randint(3, VOCABULARY, (8, LENGTH), generator=source)
        lengths = torch.randint(2, LENGTH + 1, (8,), generator=source)
        labels = tokens.masked_fill(torch.arange(LENGTH)[None] >= lengths[:, None], -100)
        count = int((labels[:, 1:] != -100).sum())

        def summed(model, tokens, labels):
            logits = model(input_ids=tokens).logits[:, :-1]
            return torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1), reduction="sum", ignore_index=-100
            )

        (summed(reference, tokens, labels) / count).backward()
        plain.step()
        plain.zero_grad()
        for half in (0, 1):  # two micro-batches of unequal token counts on each rank
            part = slice(half * 4 + ranks.rank, half * 4 + 4, ranks.world_size)
            sharded.sync_gradients = half == 1
            # Ranks are averaged, so the sum over ranks needs the factor world_size.
            (summed(model, tokens[part], labels[part]) * ranks.world_size / count).backward()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "1", "2", "3", "3-all"])
def test_uneven_token_counts_with_a_scaled_loss_are_the_large_batch(world, plan):
    world(2).run(_uneven, plan)


def _clip(ranks, plan, how, max_norm):
    model = tower()
    model.blocks[1].requires_grad_(False)
    reference = copy.deepcopy(model)
    plain = sgd(trained(reference))
    clipping = max_norm if how == "config" else None
    sharded, stepper, stepping = prepare(ranks, model, plan, optimizer=sgd, clipping=clipping)
    for batch in inputs(4):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        norm_type = math.inf if how == "inf" else 1.0 if how == "one" else 2.0
        true_norm = clip_grad_norm_(reference.parameters(), max_norm, norm_type)
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        if how != "config":
            norm = stepper.clip_norm(list(model.parameters()), max_norm, norm_type)
            assert torch.is_tensor(norm)
            assert norm.shape == ()
            assert abs(norm.item() - true_norm.item()) <= 1e-5 * true_norm.item(), (norm, true_norm)
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("how", ["script", "config", "inf", "one"])
@pytest.mark.parametrize("plan", PLANS)
def test_clipping_is_exact_and_returns_the_true_global_norm(world, plan, how):
    world(2).run(_clip, plan, how, 0.1)


def _clip_in_parts(ranks, plan):
    """Two parts of the model clipped apart, each at a norm of its own, and the whole after them."""
    model = tower(1)
    reference = copy.deepcopy(model)
    plain = sgd(trained(reference))
    sharded, stepper, stepping = prepare(ranks, model, plan, optimizer=sgd)
    for batch in inputs(4):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for part, bound in (("first", 0.05), ("blocks", 0.02), ("", 0.03)):
            chosen = [[p for n, p in m.named_parameters() if n.startswith(part)] for m in (reference, model)]
            wanted = clip_grad_norm_(chosen[0], bound).item()
            found = float(stepper.clip_norm(chosen[1], bound))
            assert abs(found - wanted) <= 1e-5 * wanted, (part, found, wanted)
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("plan", ["0", "1", "3", "3-all"])
def test_parts_of_a_model_are_clipped_apart(world, plan, n):
    world(n).run(_clip_in_parts, plan)


def _no_clipping_needed(ranks, plan):
    # A bound far above the norm: the same numbers, bit for bit, as without a bound.
    runs = []
    for bound in (None, 1e6):
        model = tower()
        sharded, _, stepping = prepare(ranks, model, plan, clipping=bound)
        for batch in inputs(3):
            loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
            stepping.step()
            stepping.zero_grad()
        runs.append(weights_of(sharded))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("plan", ["0", "3"])
def test_a_bound_that_is_not_reached_changes_nothing(world, plan):
    world(2).run(_no_clipping_needed, plan)


def _clip_value(ranks, plan):
    model = tower()
    reference = copy.deepcopy(model)
    plain = sgd(trained(reference))
    sharded, stepper, stepping = prepare(ranks, model, plan, optimizer=sgd)
    for batch in inputs(4):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        clip_grad_value_(reference.parameters(), 0.01)
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepper.clip_value(list(model.parameters()), 0.01)
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", PLANS)
def test_value_clipping_acts_on_the_averaged_gradient(world, plan):
    world(2).run(_clip_value, plan)


def _bad_batch(ranks, plan, micro):
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan)
    for step, batch in enumerate(inputs(6)):
        x = mine(batch, ranks.rank, ranks.world_size)
        if step in (0, 2, 3):
            sharded.sync_gradients = not micro
            (loss_of(model, x) * 1e6).backward()
            sharded.sync_gradients = True
            stepping.zero_grad()  # the bad batch is gone
            continue
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        plain.step()
        plain.zero_grad()
        loss_of(model, x).backward()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_zero_grad_discards_a_bad_batch(world, plan, micro):
    world(2).run(_bad_batch, plan, micro)


def _step_without_backward(ranks, plan):
    model = tower()
    sharded, _, stepping = prepare(ranks, model, plan)
    before = weights_of(sharded)
    stepping.step()
    stepping.zero_grad()
    after = weights_of(sharded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    loss_of(model, inputs(1)[0]).backward()
    stepping.step()
    stepping.zero_grad()
    once = weights_of(sharded)
    stepping.step()  # no gradient since zero_grad: nothing moves, no decay, no momentum
    assert all(torch.equal(weights_of(sharded)[name], once[name]) for name in once)


@pytest.mark.parametrize("plan", ["0", "1", "3", "3-all"])
def test_a_step_without_gradients_moves_nothing(world, plan):
    world(2).run(_step_without_backward, plan)


def _overflow(ranks, plan, who):
    model = tower()
    sharded, stepper, stepping = prepare(ranks, model, plan, precision="fp16", scale=2.0**8)
    scaler = stepper.scaler
    x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    scales, skipped = [], []
    for step in range(5):
        before = weights_of(sharded)
        loss = loss_of(model, x).float()
        if step in (1, 3) and who in (ranks.rank, "all"):
            loss = loss * 1e30
        scaler.scale(loss).backward()
        stepping.step()
        stepping.zero_grad()
        scales.append(scaler.state_dict()["value"])  # what the next loss is scaled by
        skipped.append(stepper.step_was_skipped)
        after = weights_of(sharded)
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step in (1, 3)), f"step {step}: weights {'stood still' if same else 'moved'}"
        assert all(torch.isfinite(value).all() for value in after.values())
    assert scales == [256, 128, 128, 64, 64]
    assert skipped == [False, True, False, True, False]


@pytest.mark.parametrize("who", [0, 1, "all"])
@pytest.mark.parametrize("plan", ["0", "1", "3-all"])
def test_an_fp16_overflow_on_any_rank_skips_the_step_on_all_and_halves_the_scale(world, plan, who):
    world(2).run(_overflow, plan, who)


def _norm_is_unscaled(ranks, plan):
    model = tower()
    reference = copy.deepcopy(model)
    _, stepper, _ = prepare(ranks, model, plan, precision="fp16", scale=2.0**8)
    batch = inputs(1)[0]
    plain_step(reference, batch, ranks.world_size, 0, loss_of)
    wanted = clip_grad_norm_(reference.parameters(), 1.0).item()
    stepper.scaler.scale(loss_of(model, mine(batch, ranks.rank, ranks.world_size)).float()).backward()
    norm = float(stepper.clip_norm(list(model.parameters()), 1.0))
    assert abs(norm - wanted) <= 5e-3 * wanted, (norm, wanted)  # fp16 has 11 significant bits


@pytest.mark.parametrize("plan", ["0", "2", "3-all"])
def test_the_norm_of_fp16_gradients_is_that_of_the_unscaled_ones(world, plan):
    world(2).run(_norm_is_unscaled, plan)


def _half(ranks, plan, precision, bound):
    train_both(ranks, tower(), plan, precision=precision, tolerance=bound, loss_of=_float_loss)


def _float_loss(model, x, rank, step):
    return model(x).float().square().mean()


@pytest.mark.parametrize("plan", PLANS)
def test_bf16_follows_fp32_and_keeps_fp32_masters(world, plan):
    # bf16 has 8 significant bits; losses here are about 1 and six steps of 3e-3 move a weight by at most 2e-2.
    world(2).run(_half, plan, "bf16", 2e-2)


def _in_the_order_of_gpus(ranks, plan, forwards):
    # gloo holds the host, so on a CPU reductions wait for the end of the backward. Told otherwise, the schedule reduces
    # during the backward and agrees on its window before it, as it does over NCCL; ranks on one branch can afford that.
    blocking, budget = type(ranks).blocking, ReductionsInFlight.BUDGET
    type(ranks).blocking = property(lambda _: False)
    try:
        ranks.counts.clear()
        ReductionsInFlight.BUDGET = 0

        def loss(model, batch, rank, step):
            return sum(loss_of(model, batch, rank, step) for _ in range(forwards)) / forwards

        sharded, _ = train_both(ranks, tower(depth=4), plan, loss_of=loss)
        assert sharded.schedule.reductions.bounded
        if plan.startswith("3"):
            assert ranks.counts["gather_numbers"] > 0
    finally:
        type(ranks).blocking = blocking
        ReductionsInFlight.BUDGET = budget


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("plan", ["0", "1", "2", "3", "3-all"])
def test_reductions_during_the_backward_give_the_same_numbers(world, plan, forwards):
    world(2).run(_in_the_order_of_gpus, plan, forwards)


class _SomeUnused(torch.nn.Module):
    """A layer that no forward runs, between two that every forward runs; none of a size without padding."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.unused = torch.nn.Linear(7, 7)
        self.last = torch.nn.Linear(7, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def _uninitialised(ranks, plan):
    torch.manual_seed(5)
    model = _SomeUnused()
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        assert torch.empty(1).isnan().all()
        sharded, stepper, stepping = prepare(ranks, model, plan, clipping=0.1)
        for batch in inputs(3):
            loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
            for unit in sharded.units:
                if unit.trained is not None and unit.trained.gradients.at_rest is not None:
                    assert torch.isfinite(unit.trained.gradients.at_rest).all()
            stepping.step()
            stepping.zero_grad()
        weights = weights_of(sharded)
    finally:
        torch.use_deterministic_algorithms(was)
    assert stepper.steps == 3
    assert all(torch.isfinite(value).all() for value in weights.values())
    torch.manual_seed(5)
    assert torch.equal(weights["unused.weight"], _SomeUnused().unused.weight)


@pytest.mark.parametrize("plan", ["0", "1", "2", "3", "3-all"])
def test_padding_and_missing_gradients_are_zeros_whatever_the_memory_held(world, plan):
    world(2).run(_uninitialised, plan)
