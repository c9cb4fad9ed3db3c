"""What a script for DDP does with weights between passes, at stage 3: on all ranks, and on one that the others wait for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ranks.test_front_training import Net, data, fresh, loss_of
from rig.heard import heard
from shardwise.errors import ReleasedParameterError, WriteError
from shardwise.zero import lending
from shardwise.zero.sharded import find_sharded
from shardwise.zero.unit import Weights


def _train(accelerator, model, optimizer, steps=1):
    rank, x = accelerator.process_index, data(8)[:]
    for _ in range(steps):
        accelerator.backward(loss_of(model, [part[rank::2] for part in x]))
        optimizer.step()
        optimizer.zero_grad()


@torch.enable_grad()
def _plain(steps):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, data(8)[:]).backward()
        optimizer.step()
    return model


def _prepared(stage=3):
    accelerator, model = fresh(stage), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def _same(state, model):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def _average(ranks):
    """An EMA over `model.parameters()` after each step."""
    accelerator, model, optimizer = _prepared()
    with heard() as said:
        shadow = [p.clone() for p in Net().parameters()]
        wanted = [p.clone() for p in shadow]
        for step in range(3):
            _train(accelerator, model, optimizer)
            with torch.no_grad():
                for mean, parameter in zip(shadow, model.parameters(), strict=True):
                    mean.sub_(0.1 * (mean - parameter))
                for mean, parameter in zip(wanted, _plain(step + 1).parameters(), strict=True):
                    mean.sub_(0.1 * (mean - parameter))
        torch.testing.assert_close(shadow, wanted, rtol=1e-5, atol=1e-6)
        assert sum("between passes" in line for line in said) == (ranks.rank == 0)
        _train(accelerator, model, optimizer)
        _same(accelerator.get_state_dict(model) or _plain(4).state_dict(), _plain(4))
    accelerator.free_memory()


def test_what_every_rank_reads_after_a_step_is_what_that_step_has_made(world):
    world(2).run(_average, timeout_s=60)


def _writes(ranks):
    """Every rank clamps its weights between two steps."""
    accelerator, model, optimizer = _prepared()
    _train(accelerator, model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    state = accelerator.get_state_dict(model)
    if ranks.rank == 0:
        for (name, value), wanted in zip(state.items(), _plain(1).parameters(), strict=True):
            torch.testing.assert_close(value, wanted.detach() / 2, msg=name)
    accelerator.free_memory()


def test_what_every_rank_writes_counts(world):
    world(2).run(_writes, timeout_s=60)


def _alone(ranks):
    """Rank 0 saves, swaps an average in, evaluates and swaps back, while the others go on to a step, and to their end."""
    accelerator, model, optimizer = _prepared()
    x = data(8)[:][0]
    for step in (1, 2):
        _train(accelerator, model, optimizer)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            plain = _plain(step)
            _same(accelerator.unwrap_model(model).to(torch.float32).state_dict(), plain)
            stored = [p.detach().cpu().clone() for p in model.parameters()]
            with torch.no_grad():
                torch.testing.assert_close(model(x), plain(x))
                for parameter in model.parameters():
                    parameter.data.copy_(parameter.data * 0.5)
                for parameter in plain.parameters():
                    parameter.mul_(0.5)
                for _ in range(3):
                    torch.testing.assert_close(model(x), plain(x))
                for parameter, value in zip(model.parameters(), stored, strict=True):
                    parameter.data.copy_(value)
    _train(accelerator, model, optimizer)
    _same(accelerator.get_state_dict(model) or _plain(3).state_dict(), _plain(3))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _same(model.state_dict(), _plain(3))
    accelerator.wait_for_everyone()
    model.eval()
    with torch.no_grad():  # all of them: units come and go as in any evaluation
        model(x)
    assert all(unit.state is Weights.RELEASED for unit in find_sharded(model).units)
    accelerator.free_memory()


def test_a_rank_alone_reads_and_evaluates_behind_a_barrier(world):
    world(2).run(_alone, timeout_s=60)


def _keeps(ranks):
    accelerator, model, optimizer = _prepared()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with torch.no_grad():
            model.head.weight.mul_(2)
    with pytest.raises(WriteError, match="between passes on rank 0"):
        _train(accelerator, model, optimizer)
    _train(accelerator, model, optimizer)
    _same(accelerator.get_state_dict(model) or _plain(1).state_dict(), _plain(1))
    accelerator.free_memory()


def test_what_a_rank_alone_leaves_written_is_an_error_on_all(world):
    world(2).run(_keeps, timeout_s=60)


def _refused(ranks):
    """No barrier before it, and the other rank does not read."""
    lending.LIMIT_S = 0.5
    try:
        accelerator, model, _ = _prepared()
        if ranks.rank == 0:
            with pytest.raises(ReleasedParameterError, match="not on every rank"):
                model.head.weight.sum()
        ranks.barrier()
        assert isinstance(copy.copy(model), nn.Module)
        accelerator.free_memory()
    finally:
        lending.LIMIT_S = 60.0


def test_a_read_that_the_others_do_not_come_to_is_an_error_in_time(world):
    world(2).run(_refused, timeout_s=60)


def _one_after_another(ranks):
    """Each rank reads other weights than the others do."""
    accelerator, model, optimizer = _prepared()
    accelerator.wait_for_everyone()
    for index in range(2):
        block = model.blocks[(index + ranks.rank) % 3]
        torch.testing.assert_close(
            block.weight.detach().clone(), Net().blocks[(index + ranks.rank) % 3].weight.detach()
        )
    if ranks.rank == 1:
        assert model.head.weight.shape == (1, 6)
        model.head.weight.sum()
    _train(accelerator, model, optimizer)
    accelerator.end_training()


def test_ranks_read_different_weights_behind_a_barrier(world):
    world(2).run(_one_after_another, timeout_s=60)
