"""Copies of a prepared model, in memory and in files: plain modules of their own, and nothing of the engine goes with them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardwise
from ranks.test_front_training import fresh
from rig.engine import Tower, adamw, inputs, loss_of, mine, prepare, shard, tower, trained, weights_of
from rig.tiny import tiny_llama
from shardwise.config.check import merged
from shardwise.errors import ReleasedParameterError
from shardwise.zero.sharded import find_sharded


def _through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _through_pickle,
    "torch.save": _through_a_file,
}
SOME = ["0", "2", "3", "3-all"]


def _copied(ranks: Any, plan: str, way: str) -> None:
    reference = tower()
    sharded, _, stepping = prepare(ranks, tower(), plan)
    model, plain = sharded.model, adamw(trained(reference))
    batches = inputs(6)

    def train(of: nn.Module, optimizer: Any, number: int) -> None:
        x = batches[number] if of is not model else mine(batches[number], ranks.rank, ranks.world_size)
        loss_of(of, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(2):
        train(model, stepping, number)
        train(reference, plain, number)
    with sharded.gathered():
        found = WAYS[way](model)
    then = copy.deepcopy(reference)
    assert type(found) is Tower
    assert find_sharded(found) is None
    assert all(type(p) is nn.Parameter and p.grad is None and p.requires_grad for p in found.parameters())
    # Its weights have memory of their own, each.
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in found.parameters())
    _close(found, then)
    # Both go on by themselves: the copy as a plain model does, and the model as if there were none.
    alone, expected = adamw(trained(found)), adamw(trained(then))
    for number in range(2, 4):
        train(model, stepping, number)
        train(reference, plain, number)
        train(found, alone, number + 2)
        train(then, expected, number + 2)
    _close(found, then)
    for name, weight in weights_of(sharded).items():
        assert torch.allclose(weight, reference.get_parameter(name), atol=1e-6)
    # It can be prepared in its turn, and copied again.
    with shard(ranks, found, plan).gathered():
        _close(WAYS[way](found), then)


def _close(found: nn.Module, expected: nn.Module) -> None:
    wanted = dict(expected.named_parameters())
    assert wanted.keys() == dict(found.named_parameters()).keys()
    for name, parameter in found.named_parameters():
        assert torch.allclose(parameter, wanted[name], atol=1e-6), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", SOME)
def test_a_copy_inside_gathered_is_a_plain_model(world, plan, way):
    world(1).run(_copied, plan, way, timeout_s=30)
    world(2).run(_copied, plan, way, timeout_s=30)


def _outside(ranks: Any, plan: str, way: str) -> str:
    sharded, _, stepping = prepare(ranks, tower(), plan)
    loss_of(sharded.model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    stepping.step()
    try:
        found = WAYS[way](sharded.model)
    except ReleasedParameterError as error:
        return str(error)
    for name, weight in weights_of(sharded).items():
        assert torch.equal(weight, found.get_parameter(name))
    return ""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", SOME)
def test_outside_it_works_or_says_what_to_do(world, plan, way):
    for said in world(2).run(_outside, plan, way, timeout_s=30):
        if plan in ("0", "2"):
            assert not said
        else:
            assert "'first.weight' was read" in said
            assert "shardwise.gathered(model)" in said


def _part(ranks: Any) -> None:
    sharded = shard(ranks, tower(), "3")
    block = sharded.model.blocks[1]
    with shardwise.gathered(block):
        found = copy.deepcopy(block)
        with pytest.raises(ReleasedParameterError, match=r"'first\.weight' was read"):
            copy.deepcopy(sharded.model)
    x = torch.ones(2, 12)
    assert torch.equal(found(x), tower().blocks[1](x))


def test_a_part_is_copied_alone(world):
    world(2).run(_part, timeout_s=30)


def _averaged(ranks: Any, plan: str) -> None:
    reference = tower()
    sharded, _, stepping = prepare(ranks, tower(), plan)
    plain = adamw(trained(reference))
    average_of = get_ema_multi_avg_fn(0.8)
    with sharded.gathered():
        average = AveragedModel(sharded.model, multi_avg_fn=average_of)
    expected = AveragedModel(reference, multi_avg_fn=average_of)
    for batch in inputs(4):
        loss_of(reference, batch).backward()
        loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
        expected.update_parameters(reference)
        with sharded.gathered():
            average.update_parameters(sharded.model)
    _close(average, expected)


@pytest.mark.parametrize("plan", SOME)
def test_averaged_model_inside_gathered(world, plan):
    world(1).run(_averaged, plan, timeout_s=30)
    world(2).run(_averaged, plan, timeout_s=30)


SETTINGS: dict[str, dict[str, Any]] = {
    "recomputed": {"activation_checkpointing": "all"},
    "loss of chunks": {"loss_chunk_tokens": 4},
    "loss of logits": {"loss_chunk_tokens": 4, "loss_keeps_logits": True},
}


def _of_a_library(ranks: Any, setting: str, way: str) -> None:
    """What the front end puts in place of a model's methods stays behind, too."""
    accelerator = fresh(3)
    accelerator._run.config = merged(accelerator._run.config, **SETTINGS[setting])
    reference, model = tiny_llama(), tiny_llama()
    model = accelerator.prepare(model)
    ids = torch.arange(8).view(1, 8)
    with shardwise.gathered(model):
        found = WAYS[way](model)
    assert found.loss_function is reference.loss_function
    for module in found.modules():
        assert module.forward.__func__ is type(module).forward
        assert module.forward.__self__ is module
    with torch.no_grad():
        for parameter in (*found.parameters(), *reference.parameters()):
            parameter.mul_(0.5)
    loss, expected = (m(ids, labels=ids).loss for m in (found, reference))
    assert torch.equal(loss, expected)
    loss.backward()
    accelerator.backward(model(ids, labels=ids).loss)
    accelerator.free_memory()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_replaced_methods_stay_with_the_model(world, way, setting):
    world(2).run(_of_a_library, setting, way, timeout_s=30)


def _saved(ranks: Any, path: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with shard(ranks, model, "3").gathered():
        torch.save(model, path)


def test_a_file_is_loaded_without_this_library(world, tmp_path: Path):
    path = tmp_path / "model.pt"
    world(1).run(_saved, str(path), timeout_s=30)
    script = (
        "import sys; sys.modules['shardwise'] = None; import torch\n"
        f"model = torch.load({str(path)!r}, weights_only=False); print(model(torch.ones(1, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "torch.Size([1, 2])" in done.stdout, done.stderr
