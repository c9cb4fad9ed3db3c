"""Checkpoints of runs in which what is trained changes: resumed, rolled back, and into models that freeze other weights."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch

from rig.engine import inputs, loss_of, mine, plain_step, tower
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.errors import CheckpointError
from shardwise.run.process import forget_run
from shardwise.zero.access import gathered

PLACES = [(0, "none", 1), (0, "none", 2), (2, "none", 2), (3, "none", 2), (3, "cpu", 2), (3, "nvme", 2)]
STEPS = 8
SAVED_AT = 4


def _adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4)


def _optimizer(model, knows):
    return _adamw([p for p in model.parameters() if knows or p.requires_grad])


def _thaw(model, optimizer, step, knows):
    """The head is trained from step 2 on, the first layer from step 6 on."""
    for when, module in ((2, model.head), (6, model.first)):
        if step == when:
            module.requires_grad_(True)
            if not knows:
                optimizer.add_param_group({"params": list(module.parameters()), "lr": 1e-3})


def _frozen(model):
    model.head.requires_grad_(False)
    model.first.requires_grad_(False)
    return model


def _run(stage, tier, model, knows):
    forget_run()
    place = {"offload_optimizer_device": tier, "offload_param_device": tier if stage == 3 else "none"} if stage else {}
    if tier == "nvme":
        place |= dict.fromkeys(("offload_optimizer_nvme_path", "offload_param_nvme_path"), tempfile.gettempdir())
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, **place))
    model, optimizer = accelerator.prepare(model, _optimizer(model, knows))
    return accelerator, model, optimizer


def _go(accelerator, model, optimizer, steps, knows, thaw=True):
    for step in steps:
        if thaw:
            _thaw(model, optimizer, step, knows)
        batch = inputs(STEPS)[step]
        accelerator.backward(loss_of(model, mine(batch, accelerator.process_index, accelerator.num_processes)))
        optimizer.step()
        optimizer.zero_grad()


def _plain(world_size, knows, steps, model=None, optimizer=None, thaw=True):
    model = _frozen(tower()) if model is None else model
    optimizer = _optimizer(model, knows) if optimizer is None else optimizer
    for step in steps:
        if thaw:
            _thaw(model, optimizer, step, knows)
        plain_step(model, inputs(STEPS)[step], world_size, step, loss_of)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _differs(model, reference):
    with gathered(model):
        return max((p - q).abs().max().item() for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def _resumed(ranks, stage, tier, knows, folder):
    accelerator, model, optimizer = _run(stage, tier, _frozen(tower()), knows)
    _go(accelerator, model, optimizer, range(SAVED_AT), knows)
    accelerator.save_state(folder)
    reference, _ = _plain(ranks.world_size, knows, range(STEPS))

    # A new process freezes what the first one froze at its beginning; its script knows when to thaw.
    again, model, optimizer = _run(stage, tier, _frozen(tower(seed=9)), knows)
    if not knows:
        model.head.requires_grad_(True)
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})
    with gathered(model.first, modify=True):
        model.first.load_state_dict(_frozen(tower()).first.state_dict())  # the base model
    again.load_state(folder)
    model.head.requires_grad_(True)
    _go(again, model, optimizer, range(SAVED_AT, STEPS), knows)
    assert _differs(model, reference) <= 2e-6
    found, (_, plain) = optimizer.state_dict()["state"], _plain(ranks.world_size, knows, range(STEPS))
    assert {n: float(s["step"]) for n, s in found.items()} == {
        n: float(s["step"]) for n, s in plain.state_dict()["state"].items()
    }


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(("stage", "tier", "n"), PLACES)
def test_a_run_with_thawed_weights_is_resumed(world, tmp_path, stage, tier, n, knows):
    world(n).run(_resumed, stage, tier, knows, str(tmp_path / "saved"), timeout_s=60)


def _rolled_back(ranks, stage, tier, kept, folder):
    accelerator, model, optimizer = _run(stage, tier, _frozen(tower()), True)
    _go(accelerator, model, optimizer, range(2), True)
    accelerator.save_state(folder, include_frozen=kept)
    _go(accelerator, model, optimizer, range(2, 5), True)
    if not kept:
        with pytest.raises(CheckpointError, match=r"2 frozen weight.* not those .*head.bias"):
            accelerator.load_state(folder)
        return
    accelerator.load_state(folder)
    reference, plain = _plain(ranks.world_size, True, range(2))
    assert _differs(model, reference) <= 2e-6
    reference.head.requires_grad_(True)
    reference, _ = _plain(ranks.world_size, True, range(5, STEPS), reference, plain)
    _go(accelerator, model, optimizer, range(5, STEPS), True)
    assert _differs(model, reference) <= 2e-6


@pytest.mark.parametrize("kept", [True, "shared", False])
@pytest.mark.parametrize(("stage", "tier", "n"), [(0, "none", 2), (3, "none", 2), (3, "cpu", 1)])
def test_a_run_is_rolled_back_to_before_a_thaw(world, tmp_path, stage, tier, n, kept):
    world(n).run(_rolled_back, stage, tier, kept, str(tmp_path / "saved"), timeout_s=60)


def _thawed_first(ranks, folder):
    """Weights are thawed before load_state; they still have the values that they had when they were saved, frozen."""
    accelerator, model, optimizer = _run(3, "none", _frozen(tower()), True)
    _go(accelerator, model, optimizer, range(2), True)
    accelerator.save_state(folder)
    again, model, optimizer = _run(3, "none", tower(), True)
    again.load_state(folder)
    reference, plain = _plain(ranks.world_size, True, range(2))
    for m in (model, reference):
        m.requires_grad_(True)
    _go(again, model, optimizer, range(2, 5), True, thaw=False)
    _plain(ranks.world_size, True, range(2, 5), reference, plain, thaw=False)
    assert _differs(model, reference) <= 2e-6


def test_weights_that_are_thawed_before_a_load_keep_their_values(world, tmp_path):
    world(2).run(_thawed_first, str(tmp_path / "saved"), timeout_s=60)


def _missing_group(ranks, folder):
    accelerator, model, optimizer = _run(3, "none", _frozen(tower()), False)
    _go(accelerator, model, optimizer, range(SAVED_AT), False)
    accelerator.save_state(folder)
    again, model, optimizer = _run(3, "none", _frozen(tower()), False)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(CheckpointError, match=r"2 parameters with model0/head.bias.*add_param_group"):
        again.load_state(folder)
    assert optimizer.state_dict()["param_groups"] == before


def test_a_group_that_was_added_is_asked_for(world, tmp_path):
    world(2).run(_missing_group, str(tmp_path / "saved"), timeout_s=60)


def _weights(model):
    with gathered(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def _other_groups(ranks, folder):
    """Groups that differ in what is frozen alone: torch raises ValueError for them."""
    accelerator, model, optimizer = _run(3, "none", _frozen(tower()), True)
    _go(accelerator, model, optimizer, range(2), True, thaw=False)
    accelerator.save_state(folder)
    again, model, optimizer = _run(3, "none", _frozen(tower()), False)
    before = copy.deepcopy(optimizer.state_dict())
    weights = _weights(model)
    with pytest.raises(
        CheckpointError, match=r"groups of optimizer 0 were saved with \d+ parameters, and have \d+ here"
    ):
        again.load_state(folder)
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})
    with pytest.raises(CheckpointError, match=r"optimizer 0 was saved with 1 parameter group.*has 2 here"):
        again.load_state(folder)
    assert optimizer.state_dict()["param_groups"][:1] == before["param_groups"]
    assert optimizer.state_dict()["state"] == before["state"] == {}
    assert all(torch.equal(value, weights[name]) for name, value in _weights(model).items())


def test_other_groups_of_frozen_weights_are_refused(world, tmp_path):
    world(2).run(_other_groups, str(tmp_path / "saved"), timeout_s=60)


def _groups_in_their_places(ranks, folder):
    """Of groups that hold nothing trained, each gets its own settings back."""
    accelerator, model, optimizer = _run(3, "none", _frozen(tower()), False)
    for rate, module in ((0.5, model.first), (0.25, model.head)):
        optimizer.add_param_group({"params": list(module.parameters()), "lr": rate})
    accelerator.save_state(folder)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    accelerator.load_state(folder)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 0.5, 0.25]


def test_groups_of_frozen_weights_get_their_own_settings(world, tmp_path):
    world(2).run(_groups_in_their_places, str(tmp_path / "saved"), timeout_s=60)
