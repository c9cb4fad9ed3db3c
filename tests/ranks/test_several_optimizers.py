"""Several optimizers in one clipping, and optimizers whose parameters are no prepared model's: as in plain torch."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from shardwise import Accelerator, DeepSpeedPlugin, GradScalerKwargs
from shardwise.errors import PrepareError
from shardwise.run.process import forget_run


def fresh(stage=0, precision="no", **keywords):
    forget_run()
    plugin = DeepSpeedPlugin(zero_stage=stage) if stage else None
    handlers = [GradScalerKwargs(init_scale=256.0)]
    return Accelerator(
        cpu=True, mixed_precision=precision, deepspeed_plugin=plugin, kwargs_handlers=handlers, **keywords
    )


def net(seed, width=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))


def batch(rank, step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(models, x):
    return sum((model(x) * (number + 1)).square().mean() for number, model in enumerate(models))


def optimizers_of(models, shared):
    if shared:  # two optimizers over each other's halves of one model
        (model,) = models
        return [torch.optim.SGD(model[0].parameters(), lr=0.5), torch.optim.AdamW(model[2].parameters(), lr=0.05)]
    return [torch.optim.SGD(models[0].parameters(), lr=0.5), torch.optim.AdamW(models[1].parameters(), lr=0.05)]


def clip(clips, models, how):
    every = itertools.chain(*(model.parameters() for model in models))
    if how == "value":
        return clips.clip_grad_value_(every, 0.03)
    return clips.clip_grad_norm_(every, 0.2, float(how))


def plain(ranks, shared, how):
    models = [net(1)] if shared else [net(1), net(2, 3)]
    optimizers = optimizers_of(models, shared)
    norms = []
    for step in range(3):
        for rank in range(ranks):
            (loss_of(models, batch(rank, step)) / ranks).backward()
        norms.append(clip(nn.utils, models, how))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [dict(model.state_dict()) for model in models], norms


def _clipped(ranks, stage, precision, shared, how):
    accelerator = fresh(stage, precision)
    models = [net(1)] if shared else [net(1), net(2, 3)]
    optimizers = optimizers_of(models, shared)
    accelerator.prepare(*models, *optimizers)
    norms = []
    for step in range(3):
        accelerator.backward(loss_of(models, batch(ranks.rank, step)))
        norms.append(clip(accelerator, models, how))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [accelerator.get_state_dict(model) for model in models], norms


@pytest.mark.parametrize("how", ["2", "inf", "value"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_one_clipping_over_several_optimizers_has_one_norm(world, n, stage, shared, how):
    if stage in (1, 2) and not (shared and how == "2"):
        pytest.skip("stages 1 and 2 with the case that is most unlike the others")
    wanted, norms = plain(n, shared, how)
    found = world(n).run(_clipped, stage, "no", shared, how)
    for state, model in zip(found[0][0], wanted, strict=True):
        for name, value in model.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    for _, own in found:
        for norm, expected in zip(own, norms, strict=True):
            assert (norm is None) == (expected is None)
            if norm is not None:
                torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_in_fp16_several_optimizers_share_one_loss_scale_and_one_norm(world, n, stage):
    _, norms = plain(n, False, "2")
    for _, own in world(n).run(_clipped, stage, "fp16", False, "2"):
        torch.testing.assert_close(torch.stack(own), torch.stack(norms), rtol=2e-2, atol=1e-3)


# Optimizers beside the engine.


def _beside(ranks, precision):
    accelerator = fresh(0, precision, gradient_accumulation_steps=2)
    model, other, twin = net(1), net(2), net(2)
    optimizer, beside = torch.optim.AdamW(model.parameters()), torch.optim.SGD(other.parameters(), lr=0.1)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(beside, lambda step: 1 / (1 + step))
    wanted = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 / (1 + step))
    accelerator.prepare(model, optimizer, beside, schedule)
    for step in range(4):
        x = batch(0, step)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of([model, other], x))
            ((twin(x) * 2).square().mean() / 2).backward()
            both = itertools.chain(model.parameters(), other.parameters())
            norm = accelerator.clip_grad_norm_(both, 1e9)
            assert (norm is None) == (step % 2 == 0)
            for one in (optimizer, beside, schedule):
                one.step()
            optimizer.zero_grad()
            beside.zero_grad()
            if step % 2:
                reference.step()
                wanted.step()
                reference.zero_grad()
    for a, b in zip(other.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert schedule.get_last_lr() == wanted.get_last_lr()
    assert type(pickle.loads(pickle.dumps(beside))) is torch.optim.SGD


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_on_one_rank_an_optimizer_of_another_model_steps_as_in_plain_torch(world, precision):
    world(1).run(_beside, precision)


def _overflow(ranks):
    accelerator = fresh(0, "fp16")
    other = net(2)
    optimizer = accelerator.prepare(torch.optim.SGD(other.parameters(), lr=0.1))
    before, scale = copy.deepcopy(other.state_dict()), accelerator.scaler.value
    accelerator.backward(other(batch(0, 0)).sum() * float("inf"))
    optimizer.step()
    assert accelerator.optimizer_step_was_skipped
    assert accelerator.scaler.coming == scale / 2
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])


def test_in_fp16_an_overflow_skips_its_step(world):
    world(1).run(_overflow)


def _saved(ranks, folder):
    accelerator = fresh()
    other = net(2)
    optimizer = accelerator.prepare(torch.optim.AdamW(other.parameters(), lr=0.1))
    accelerator.backward(other(batch(0, 0)).sum())
    optimizer.step()
    accelerator.save_state(folder)
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    accelerator.load_state(folder)
    assert str(optimizer.state_dict()) == str(kept)


def test_its_states_are_in_a_checkpoint(world, tmp_path):
    world(1).run(_saved, str(tmp_path / "saved"))


def _later(ranks):
    accelerator = fresh(2)
    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accelerator.prepare(optimizer)
    accelerator.prepare(model)
    accelerator.backward(loss_of([model], batch(0, 0)))
    optimizer.step()
    return accelerator.get_state_dict(model)


def test_on_one_rank_an_optimizer_may_be_prepared_before_its_model(world):
    (state,) = world(1).run(_later)
    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of([model], batch(0, 0)).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def _refused(ranks):
    with pytest.raises(PrepareError, match="before any model"):
        fresh().prepare(torch.optim.SGD(net(1).parameters(), lr=0.5))


def test_with_several_ranks_it_is_refused_because_nobody_would_average_its_gradients(world):
    world(2).run(_refused)
