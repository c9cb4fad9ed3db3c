"""Local SGD beside plain torch: each rank plays all ranks' models, which train alone and are averaged every so many steps."""

import copy

import pytest
import torch
from torch import nn

from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.errors import ConfigError, PrepareError
from shardwise.run.joined import forget_run
from shardwise.run.local_sgd import LocalSGD


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.second = nn.Linear(6, 1)

    def forward(self, x, route):
        hidden = torch.tanh(self.norm(self.first(x)))
        return (self.second if route else self.last)(hidden)


def accelerator_of(clipping=None, **keywords):
    forget_run()
    plugin = None if clipping is None else DeepSpeedPlugin(zero_stage=0, gradient_clipping=clipping)
    return Accelerator(cpu=True, deepspeed_plugin=plugin, **keywords)


def batch(rank, index):
    generator = torch.Generator().manual_seed(100 * rank + index)
    # A route of its own: a rank whose weights had no gradient leaves them alone, whatever another rank does.
    return torch.randn(4, 5, generator=generator) * (1 + rank), rank == 1 and index > 2


def mean_of(models):
    with torch.no_grad():
        for together in zip(*(model.parameters() for model in models), strict=True):
            value = torch.stack(list(together)).mean(0)
            for parameter in together:
                parameter.copy_(value)


def plain(ranks, every, steps, micro, clipping):
    """The models and optimizers of all ranks after `steps` steps."""
    models = [Net() for _ in range(ranks)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-4) for model in models]
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for part in range(micro):
                x, route = batch(rank, step * micro + part)
                (model(x, route).square().mean() / micro).backward()
            if clipping is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % every == 0:
            mean_of(models)
    mean_of(models)
    return models, optimizers


def _locally(ranks, micro, clipping, by_script):
    accelerator = accelerator_of(None if by_script else clipping, gradient_accumulation_steps=micro)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=3 * micro) as local_sgd:
        for index in range(5 * micro):
            with accelerator.accumulate(model):
                x, route = batch(ranks.rank, index)
                accelerator.backward(model(x, route).square().mean())
                if by_script and accelerator.sync_gradients and clipping is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clipping)
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
    wanted, steppers = plain(ranks.world_size, 3, 5, micro, clipping)
    for (name, own), (_, theirs) in zip(model.named_parameters(), wanted[ranks.rank].named_parameters(), strict=True):
        torch.testing.assert_close(
            own.detach(), theirs.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, buffer in model.named_buffers():  # rank 0's, as behind any step
        torch.testing.assert_close(buffer, dict(wanted[0].named_buffers())[name], rtol=1e-5, atol=1e-6)

    # Together again: the mean of the ranks' gradients, with states of their own.
    reference = copy.deepcopy(wanted[0])
    reference.zero_grad()
    model.eval(), reference.eval()
    accelerator.sync_gradients = True
    accelerator.backward(model(batch(ranks.rank, 99)[0], False).square().mean() * micro)
    for rank in range(ranks.world_size):
        (reference(batch(rank, 99)[0], False).square().mean() / ranks.world_size).backward()
    torch.testing.assert_close(model.last.weight.grad, reference.last.weight.grad, rtol=1e-4, atol=1e-6)
    assert len(steppers) == ranks.world_size


@pytest.mark.parametrize(
    ("micro", "clipping", "by_script"),
    [(1, None, False), (1, 0.05, False), (2, 0.05, True)],
    ids=["plain", "clipped", "accumulated and clipped by the script"],
)
def test_ranks_train_alone_and_meet_in_the_mean_of_their_weights(world, micro, clipping, by_script):
    world(2).run(_locally, micro, clipping, by_script)


def _in_16_bits(ranks):
    accelerator = accelerator_of(mixed_precision="bf16")
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = accelerator.get_state_dict(model)
    with LocalSGD(accelerator, model, 2) as local_sgd:
        x = torch.full((1, 4), 1e-3 * (ranks.rank + 1))
        accelerator.backward(model(x).sum())
        optimizer.step()
        local_sgd.step()
    after = accelerator.get_state_dict(model)
    return (before["weight"] - after["weight"]).flatten().tolist() if before else None


def test_masters_are_averaged_and_not_what_they_round_to(world):
    moved, _ = world(2).run(_in_16_bits)
    assert moved == pytest.approx([1.5e-3] * 4, rel=1e-2)


def _overflowing(ranks):
    accelerator = accelerator_of(mixed_precision="fp16")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    skipped = []
    with LocalSGD(accelerator, model, 2) as local_sgd:
        for size in (1.0, 6e4 if ranks.rank == 1 else 1.0, 1.0):
            accelerator.backward(model(torch.full((2, 4), size)).sum())
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            skipped.append(accelerator.optimizer_step_was_skipped)
    return skipped, accelerator.scaler.value


def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(world):
    first, second = world(2).run(_overflowing)
    assert first == second
    assert first[0][1] is True


def _refused(ranks):
    found = []
    for stage in range(1, 4):
        forget_run()
        accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))
        model = nn.Linear(4, 4)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        with pytest.raises(PrepareError, match="needs zero_stage 0"):
            LocalSGD(accelerator, model, 4)
        with LocalSGD(accelerator, model, None, enabled=False) as local_sgd:
            local_sgd.step()
        found.append(stage)
    accelerator = accelerator_of()
    with pytest.raises(ConfigError, match="local_sgd_steps is 0"):
        LocalSGD(accelerator, nn.Linear(1, 1), 0)
    with pytest.raises(PrepareError, match="is not prepared"), LocalSGD(accelerator, nn.Linear(1, 1), 1):
        pass
    model = nn.Linear(4, 4)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with (
        pytest.raises(ConfigError, match="LocalSGD is called in another way"),
        LocalSGD(accelerator, model, 1 + ranks.rank),
    ):
        pass
    with (
        LocalSGD(accelerator, model, 1),
        pytest.raises(PrepareError, match="already"),
        LocalSGD(accelerator, model, 1),
    ):
        pass
    return found


def test_what_cannot_train_alone_is_refused(world):
    assert world(2).run(_refused) == [[1, 2, 3]] * 2


def _of_one(ranks):
    accelerator = accelerator_of()
    with LocalSGD(accelerator, nn.Linear(1, 1), 4) as local_sgd:
        local_sgd.step()
    return local_sgd.num_steps


def test_one_process_has_nothing_to_average(world):
    assert world(1).run(_of_one) == [1]
