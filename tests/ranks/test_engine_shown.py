"""What a script does to gradients between a backward and a step has the effect that it has in plain torch, at every stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from rig.engine import inputs, largest_difference, loss_of, mine, plain_step, prepare, tower, train_both, weights_of
from shardwise.errors import RankError, ReleasedParameterError

pytestmark = pytest.mark.thinned(3)

# Every plan, on one rank and on several: a rank alone keeps the whole.
PLACES = [
    *(("0", 1), ("0", 3), ("1", 2), ("2", 3), ("3", 2), ("3", 3)),
    *(("2-opt", 2), ("3-all", 1), ("3-all", 2), ("3-disk", 1), ("3-disk", 2)),
]
IN_MEMORY = [place for place in PLACES if place[0] in ("0", "1", "2", "3")]


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4)


# What happens between the backward and the step. Each takes (model, optimizer, the step's number), of either kind.


def _halved(model, optimizer, step):
    for p in model.parameters():
        p.grad.mul_(0.5)


def _scaled_by_operator(model, optimizer, step):
    for p in model.parameters():
        p.grad *= torch.tensor(0.25)
        p.grad /= 2


def _added_to(model, optimizer, step):
    for p in model.parameters():
        p.grad += 0.01 * torch.ones_like(p.grad)


def _masked(model, optimizer, step):
    model.head.weight.grad[1:] = 0
    model.blocks[0].up.bias.grad.view(-1)[::2].zero_()
    model.blocks[1].down.weight.grad.masked_fill_(model.blocks[1].down.weight.grad > 0, 0.0)


def _clipped_by_norm(model, optimizer, step):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def _clipped_by_a_list(model, optimizer, step):
    nn.utils.clip_grad_norm_(list(model.blocks[1].parameters()), 0.01, norm_type=1)


def _clipped_by_largest(model, optimizer, step):
    nn.utils.clip_grad_norm_(model.parameters(), 0.02, norm_type=float("inf"))


def _clipped_by_value(model, optimizer, step):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def _clipped_twice(model, optimizer, step):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    nn.utils.clip_grad_value_(model.parameters(), 0.003)


def _assigned(model, optimizer, step):
    for p in model.parameters():
        p.grad = torch.full(p.shape, 0.1 * (step + 1), dtype=p.dtype)


def _assigned_from_itself(model, optimizer, step):
    model.head.weight.grad = model.head.weight.grad.clone().abs()
    model.first.bias.grad = model.first.bias.grad * 3


def _dropped_some(model, optimizer, step):
    model.head.weight.grad = None
    model.blocks[1].up.weight.grad = None


def _dropped_by_the_model(model, optimizer, step):
    if step == 1:
        model.zero_grad()


def _zeroed(model, optimizer, step):
    if step == 1:
        model.zero_grad(set_to_none=False)
        optimizer.zero_grad(set_to_none=False)


def _dropped_by_the_optimizer(model, optimizer, step):
    if step == 1:
        optimizer.zero_grad()


def _noise(model, optimizer, step):
    source = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad.add_(torch.randn(p.shape, generator=source), alpha=0.01)


def _through_data(model, optimizer, step):
    for p in model.parameters():
        p.grad.data.mul_(0.5)
    model.head.weight.grad.data[0] = 0.3


def _only_read(model, optimizer, step):
    for p in model.parameters():
        assert p.grad.norm() >= 0
        assert p.grad.abs().sum().isfinite()
        assert copy.deepcopy(p.grad).shape == p.shape


def _sign(model, optimizer, step):
    for p in model.parameters():
        p.grad.copy_(p.grad.sign() * 0.01)


BETWEEN = {
    function.__name__.strip("_"): function
    for function in (
        *(_halved, _scaled_by_operator, _added_to, _masked, _clipped_by_norm, _clipped_by_a_list, _clipped_by_largest),
        *(_clipped_by_value, _clipped_twice, _assigned, _assigned_from_itself, _dropped_some, _dropped_by_the_model),
        *(_zeroed, _dropped_by_the_optimizer, _noise, _through_data, _only_read, _sign),
    )
}


def _with_between(ranks, plan, how, optimizer, precision="no"):
    model = tower()
    reference = copy.deepcopy(model)
    plain = optimizer(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=optimizer, precision=precision)
    for step, batch in enumerate(inputs(4)):
        plain_step(reference, batch, ranks.world_size, step, lambda m, x, *_: loss_of(m, x))
        BETWEEN[how](reference, plain, step)
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).float().backward()
        BETWEEN[how](model, stepping, step)
        stepping.step()
        stepping.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize(("plan", "n"), PLACES)
@pytest.mark.parametrize("how", BETWEEN)
def test_what_is_done_to_gradients_counts(world, how, plan, n):
    assert max(world(n).run(_with_between, plan, how, _sgd, timeout_s=20)) <= 2e-6


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
@pytest.mark.parametrize("how", ["halved", "masked", "clipped_by_norm", "assigned", "dropped_by_the_model", "added_to"])
def test_what_is_done_to_gradients_of_16_bit_weights_counts(world, how, plan):
    # Gradients are kept in fp32; weights that compute in bf16 leave three digits.
    assert max(world(2).run(_with_between, plan, how, _sgd, "bf16", timeout_s=20)) <= 2e-2


# How often a script steps, and drops what it has. Each takes (model, optimizer, backward of a batch by its number).


def _never_dropped(model, optimizer, backward):
    for number in range(3):
        backward(number)
        optimizer.step()


def _stepped_twice(model, optimizer, backward):
    for number in range(3):
        backward(number)
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()


def _dropped_before(model, optimizer, backward):
    for number in range(3):
        model.zero_grad()
        backward(number)
        optimizer.step()


def _a_batch_thrown_away(model, optimizer, backward):
    for number in range(4):
        backward(number)
        if number == 1:
            model.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()


def _several_backwards(model, optimizer, backward):
    for number in range(0, 4, 2):
        backward(number)
        backward(number + 1)
        optimizer.step()
        for p in model.parameters():
            p.grad = None


def _clipped_and_never_dropped(model, optimizer, backward):
    for number in range(3):
        backward(number)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.step()


def _no_backward(model, optimizer, backward):
    optimizer.step()
    backward(0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


LOOPS = {
    function.__name__.strip("_"): function
    for function in (
        *(_never_dropped, _stepped_twice, _dropped_before, _a_batch_thrown_away, _several_backwards),
        *(_clipped_and_never_dropped, _no_backward),
    )
}


def _looped(ranks, plan, how, precision, optimizer=_adamw):
    model = tower()
    reference = copy.deepcopy(model)
    plain = optimizer(reference.parameters())
    sharded, stepper, stepping = prepare(ranks, model, plan, optimizer=optimizer, precision=precision)
    batches = inputs(4)
    LOOPS[how](
        reference,
        plain,
        lambda number: plain_step(reference, batches[number], ranks.world_size, number, lambda m, x, *_: loss_of(m, x)),
    )

    def backward(number):
        loss = loss_of(model, mine(batches[number], ranks.rank, ranks.world_size)).float()
        scaled = stepper.scaler.scale(loss)
        stepper.note_loss(loss)
        scaled.backward()

    LOOPS[how](model, stepping, backward)
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize(("plan", "n"), PLACES)
@pytest.mark.parametrize("how", LOOPS)
def test_steps_and_drops_do_what_they_do_in_torch(world, how, plan, n):
    assert max(world(n).run(_looped, plan, how, "no", timeout_s=20)) <= 3e-6


@pytest.mark.parametrize("plan", ["0", "2", "3", "2-opt", "3-disk"])
@pytest.mark.parametrize("how", ["never_dropped", "stepped_twice", "clipped_and_never_dropped"])
def test_the_loss_scale_is_taken_off_once(world, how, plan):
    # torch's own clipping sees scaled gradients where nobody has unscaled them, as with torch's GradScaler.
    if how == "clipped_and_never_dropped":
        assert max(world(2).run(_unscaled, plan, timeout_s=20)) <= 2e-2
    else:
        assert max(world(2).run(_looped, plan, how, "fp16", timeout_s=20)) <= 2e-2


def _unscaled(ranks, plan):
    model = tower()
    reference = copy.deepcopy(model)
    plain = _adamw(reference.parameters())
    sharded, stepper, stepping = prepare(ranks, model, plan, optimizer=_adamw, precision="fp16")
    for step, batch in enumerate(inputs(3)):
        plain_step(reference, batch, ranks.world_size, step, lambda m, x, *_: loss_of(m, x))
        wanted = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        plain.step()
        loss = loss_of(model, mine(batch, ranks.rank, ranks.world_size)).float()
        scaled = stepper.scaler.scale(loss)
        stepper.note_loss(loss)
        scaled.backward()
        stepper.unscale()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert abs(norm.item() - wanted.item()) <= 2e-2 * max(1.0, wanted.item())
        stepping.step()
    return largest_difference(weights_of(sharded), reference)


def _seen(ranks, plan):
    """Shapes, dtypes and values of what a script sees, and what it sees afterwards."""
    model = tower()
    reference = copy.deepcopy(model)
    _, _, stepping = prepare(ranks, model, plan)
    batch = inputs(1)[0]
    plain_step(reference, batch, ranks.world_size, 0, lambda m, x, *_: loss_of(m, x))
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert isinstance(p.grad, torch.Tensor), name
        assert (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)
        assert not p.grad.requires_grad
        torch.testing.assert_close(p.grad.clone(), q.grad, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(p.grad.norm(), q.grad.norm(), rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(
            torch.linalg.vector_norm(p.grad, 3), torch.linalg.vector_norm(q.grad, 3), rtol=1e-4, atol=1e-6
        )
        assert repr(p.grad).startswith("tensor(")
        assert shardwise.gradient(p).shape == p.shape
        part = shardwise.gradient(p, part=True)
        assert part.ndim == 1
        assert part.numel() <= p.numel()
    kept = model.head.weight.grad
    copied = kept.clone()
    stepping.step()
    torch.testing.assert_close(model.head.weight.grad.clone(), copied)
    stepping.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert shardwise.gradient(model.head.weight) is None
    with pytest.raises(ReleasedParameterError, match=r"head\.weight.*dropped"):
        kept.sum()


@pytest.mark.parametrize(("plan", "n"), PLACES)
def test_a_gradient_is_the_whole_gradient(world, plan, n):
    world(n).run(_seen, plan, timeout_s=20)


def _written_by_part(ranks, plan):
    model = tower()
    reference = copy.deepcopy(model)
    plain = _sgd(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=_sgd)
    for step, batch in enumerate(inputs(3)):
        plain_step(reference, batch, ranks.world_size, step, lambda m, x, *_: loss_of(m, x))
        for p in reference.parameters():
            p.grad.sign_().mul_(0.01)
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for p in model.parameters():
            shardwise.gradient(p, part=True).sign_().mul_(0.01)
        stepping.step()
        stepping.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize(("plan", "n"), PLACES)
def test_each_rank_may_write_its_part(world, plan, n):
    assert max(world(n).run(_written_by_part, plan, timeout_s=20)) <= 1e-6


def _part_in_a_hook(ranks, plan):
    """In a backward a part is what autograd has just brought: the engine's gradient is not there yet."""
    model = tower()
    seen = []

    def hook(parameter):
        seen.append(shardwise.gradient(parameter, part=True).shape == (parameter.numel(),))

    model.blocks[1].up.weight.register_post_accumulate_grad_hook(hook)
    train_both(ranks, model, plan, steps=3)
    return seen


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_a_part_read_in_a_backward_leaves_the_gradient_alone(world, plan):
    assert world(2).run(_part_in_a_hook, plan, timeout_s=20) == [[True] * 3] * 2


def _accumulated(ranks, plan):
    """Between micro-batches a script sees what there is, and may drop it."""
    model = tower()
    reference = copy.deepcopy(model)
    plain = _sgd(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=_sgd)
    for step, batch in enumerate(inputs(6)):
        plain_step(reference, batch, ranks.world_size, step, lambda m, x, *_: loss_of(m, x))
        sharded.sync_gradients = step % 3 == 2
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        if step == 3:
            reference.zero_grad()
            model.zero_grad()
        if step == 1:
            assert model.head.weight.grad.norm() > 0
            model.head.weight.grad.mul_(2)
            reference.head.weight.grad.mul_(2)
        if sharded.sync_gradients:
            plain.step()
            plain.zero_grad()
        stepping.step()
        stepping.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize(("plan", "n"), PLACES)
def test_accumulated_gradients_may_be_read_scaled_and_dropped(world, plan, n):
    assert max(world(n).run(_accumulated, plan, timeout_s=20)) <= 1e-6


def _different_reads(ranks):
    model = tower()
    prepare(ranks, model, "2")
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    read: Any = model.head.weight.grad.sum if ranks.rank == 0 else model.head.weight.grad.norm
    with pytest.raises(RankError, match="every rank reads the same"):
        read()


def test_ranks_that_read_different_gradients_are_told(world):
    world(2).run(_different_reads, timeout_s=20)


def _closure_outside(ranks, plan):
    """A backward that no forward announced: a penalty on weights that are whole."""
    model = tower()
    reference = copy.deepcopy(model)
    plain = _sgd(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=_sgd)
    for step, batch in enumerate(inputs(3)):
        plain_step(reference, batch, ranks.world_size, step, lambda m, x, *_: loss_of(m, x))
        (0.1 * sum(p.square().sum() for p in reference.parameters())).backward()
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        with sharded.gathered():
            penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
        penalty.backward()
        stepping.step()
        stepping.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize(("plan", "n"), IN_MEMORY)
def test_a_second_backward_may_begin_anywhere(world, plan, n):
    assert max(world(n).run(_closure_outside, plan, timeout_s=20)) <= 1e-6
