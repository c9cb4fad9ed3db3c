"""Weights that numpy has seen: on a CPU torch never again resizes such a storage, and the engine goes on nevertheless."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn

import shardwise
from rig.engine import SHARDED, Tower, inputs, mine, prepare, train_both
from shardwise.files.writer import as_bytes


class Watched(nn.Module):
    """A linear layer whose forward shows its weight to numpy, and computes with a view that autograd keeps."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.seen: list[numpy.ndarray] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.weight.detach().numpy())
        return x + torch.relu(x @ self.weight.T)


def _watched_tower() -> Tower:
    torch.manual_seed(5)
    model = Tower(2)
    model.blocks.insert(1, Watched())
    return model


def _train(ranks, plan, frozen):
    model = _watched_tower()
    model.blocks[1].weight.requires_grad_(not frozen)
    watched = model.blocks[1]

    def look(sharded, stepping, step):
        with shardwise.gathered(watched):
            kept = watched.weight.detach().numpy()
            copy = kept.copy()
        assert numpy.array_equal(kept, copy), "the view of a weight that was released has its values"

    train_both(ranks, model, plan, between=look, units=["Block", "Watched"], whole_adapters=False)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("plan", SHARDED)
def test_training_goes_on_when_numpy_has_seen_a_weight(world, plan, frozen):
    world(2).run(_train, plan, frozen)


def _late_view(ranks):
    model = _watched_tower()
    prepare(ranks, model, "3", units=["Block", "Watched"])
    with shardwise.gathered(model):
        view = model.head.weight.detach()
    view.numpy()  # of a storage that is empty by now
    model(mine(inputs(1)[0], ranks.rank, ranks.world_size)).sum().backward()


def test_a_weight_that_numpy_saw_after_its_release_can_be_gathered(world):
    world(2).run(_late_view)


def _nothing_changes(ranks, plan):
    """Without the script's numpy the storage is the same one for good: what autograd saved are views of what is gathered."""
    torch.manual_seed(5)
    model = Tower(2)
    sharded, stepper, _ = prepare(ranks, model, plan, units=["Block"])
    buffers = [part for unit in sharded.units for part in unit.parts]
    before = [part.whole.untyped_storage()._cdata for part in buffers]
    for batch in inputs(2):
        with sharded.gathered():
            pass
        model(mine(batch, ranks.rank, ranks.world_size)).square().mean().backward()
        stepper.step()
        stepper.zero_grad()
    with shardwise.gathered(model), torch.no_grad():  # written, and kept where it rests
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert [part.whole.untyped_storage()._cdata for part in buffers] == before
    assert all(part.whole.untyped_storage().resizable() for part in buffers)


@pytest.mark.parametrize("plan", SHARDED)
def test_a_weight_that_numpy_has_not_seen_keeps_its_storage(world, plan):
    world(2).run(_nothing_changes, plan)


def _addresses(ranks):
    """A storage that was replaced within a forward is nobody's: its address may be that of any tensor made since."""
    model = _watched_tower()
    sharded, _, _ = prepare(ranks, model, "3", units=["Block", "Watched"])
    unit = next(unit for unit in sharded.units if unit.name == "blocks.1")
    part, saved = unit.parts[0], sharded._hooks.saved
    with sharded.gathered():
        old = part.whole.view(-1)
        old.numpy()
        assert saved.begin()
        assert saved.owner(old) is unit
    unit.gather()  # its storage was given to whoever has seen it
    unit.arrive()
    assert part.whole.untyped_storage()._cdata != old.untyped_storage()._cdata
    assert saved.owner(old) is None
    assert saved.owner(part.whole) is unit
    unit.release()
    saved.end()


def test_a_storage_that_was_replaced_owns_nothing(world):
    world(2).run(_addresses)


TENSORS = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.arange(6.0).bfloat16(),
    "complex64": torch.polar(torch.ones(4), torch.arange(4.0)),
    "conjugated": torch.polar(torch.ones(4), torch.arange(4.0)).conj(),
    "bool": torch.tensor([True, False, True]),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(6)[2:5],
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_bytes_of_a_tensor_are_its_own_and_leave_its_storage_resizable(kind):
    tensor = TENSORS[kind]
    expected = bytes(tensor.resolve_conj().contiguous().untyped_storage())
    if kind == "part":
        expected = tensor.numpy().tobytes()
        tensor = torch.arange(6)[2:5]
    assert bytes(as_bytes(tensor)) == expected
    assert tensor.untyped_storage().resizable()


def test_bytes_outlive_the_name_of_their_tensor():
    view = as_bytes(torch.full((1000,), 7, dtype=torch.uint8))
    torch.full((1000,), 9, dtype=torch.uint8)
    assert bytes(view) == bytes([7] * 1000)
    view[0] = 1
    assert view[0] == 1
