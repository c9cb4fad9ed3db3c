"""Library code that gives weights other memory, or rebuilds them, leaves a prepared model as it leaves a plain one."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

import shardwise
from rig.engine import (
    Tower,
    inputs,
    largest_difference,
    loss_of,
    mine,
    prepare,
    tower,
    train_both,
    train_changed,
    weights_of,
)
from shardwise.errors import WriteError
from shardwise.zero import handed

pytestmark = pytest.mark.thinned(2)

PLANS = ("0", "1", "2", "3", "2-opt", "3-all")


def flatten(weights):
    """What cuDNN does to the weights of a recurrent layer: it moves them into a buffer of its own, past their versions."""
    buffer = torch.cat([weight.detach().reshape(-1) for weight in weights])
    parts = buffer.split([weight.numel() for weight in weights])
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(weights)):
        for weight, part in zip(weights, parts, strict=True):
            weight.set_(part.view(weight.shape))


# Between steps, against plain torch. Each takes (model, step).


def _set(model, step):
    torch.manual_seed(step)
    with torch.no_grad():
        for weight in (model.blocks[1].up.weight, model.head.bias):
            weight.set_((torch.randn(weight.shape) * 0.1).to(weight.dtype))


def _flattened(model, step):
    flatten([model.blocks[0].up.weight, model.blocks[0].down.weight, model.head.bias])
    with torch.no_grad():
        model.head.bias.add_(0.1)


def _from_vector(model, step):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, model.parameters())


def _called_functionally(model, step):
    halved = {name: value.detach() / 2 for name, value in model.named_parameters()}
    torch.func.functional_call(model, halved, (torch.ones(2, 5),))


def _emptied(model, step):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict({name: value * 0.9 for name, value in state.items()})


def _shared(model, step):
    model.share_memory()
    with torch.no_grad():
        model.head.weight.mul_(0.9)


def _applied(model, step):
    model._apply(lambda tensor: tensor * 0.9)


MOVES = {
    "set_": _set,
    "past the versions": _flattened,
    "vector_to_parameters": _from_vector,
    "functional_call": _called_functionally,
    "to_empty": _emptied,
    "share_memory": _shared,
    "_apply": _applied,
}


def _moved(ranks, plan, how, precision):
    return train_changed(ranks, plan, precision, MOVES[how])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", MOVES)
def test_weights_that_get_other_memory_are_trained_from_what_they_hold_there(world, how, plan):
    for difference in world(2).run(_moved, plan, how, "no"):
        assert difference <= 1e-6


@pytest.mark.parametrize("plan", ["1", "3"])
@pytest.mark.parametrize("how", ["set_", "past the versions"])
def test_their_masters_follow_them(world, how, plan):
    for difference in world(2).run(_moved, plan, how, "bf16"):
        assert difference <= 3e-2


def _frozen(ranks, plan):
    model = tower()
    model.blocks.requires_grad_(False)
    sharded, _, _ = prepare(ranks, model, plan)
    with shardwise.gathered(model, modify=True):
        flatten([model.blocks[0].up.weight])
        with torch.no_grad():
            model.blocks[0].up.weight.fill_(3.0 + ranks.rank)
    return {name: float(value.mean()) for name, value in weights_of(sharded).items()}["blocks.0.up.weight"]


@pytest.mark.parametrize("plan", ["0", "3"])
def test_what_is_written_into_frozen_weights_elsewhere_counts(world, plan):
    assert world(2).run(_frozen, plan) == [3.0, 3.0]


def _of_another_kind(ranks, plan):
    model = tower()
    _, _, stepping = prepare(ranks, model, plan)
    for step, batch in enumerate(inputs(2)):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        if step == 1:
            with torch.no_grad():
                model.head.bias.set_(torch.ones(4))
            with pytest.raises(WriteError, match=r"head\.bias.*\(3,\).*other memory.*\(4,\)"):
                stepping.step()
        else:
            stepping.step()
        stepping.zero_grad()


@pytest.mark.parametrize("plan", ["0", "2"])
def test_memory_of_another_shape_is_refused(world, plan):
    world(2).run(_of_another_kind, plan)


class Reader(nn.Module):
    """Reads its input as a sequence. flatten: a line that scripts write into such forwards."""

    def __init__(self, kind, flatten):
        super().__init__()
        self.rnn = kind(5, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)
        self.flatten = flatten

    def forward(self, x):
        if self.flatten == "its own":
            self.rnn.flatten_parameters()
        elif self.flatten == "past it":
            flatten(self.rnn._flat_weights)
        return self.head(self.rnn(x.view(len(x), 1, 5).expand(-1, 3, -1))[0])


def _reads(ranks, plan, kind, how):
    torch.manual_seed(3)
    model = Reader(kind, how)
    real = handed._flatten
    asked = []
    handed._flatten = lambda rnn: asked.append(rnn) or flatten(rnn._flat_weights)
    try:
        sharded, reference = train_both(ranks, model, plan, steps=5)
        prepared = [rnn for rnn in asked if rnn is not reference.rnn]
        asked.clear()
        sharded.release()
        model.rnn.flatten_parameters()
        return len(prepared), len(asked)
    finally:
        handed._flatten = real


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_that_flatten_their_weights_in_every_forward_train(world, kind, plan):
    assert world(2).run(_reads, plan, kind, "its own") == [(0, 1)] * 2


@pytest.mark.parametrize("plan", PLANS)
def test_so_do_those_whose_weights_are_flattened_past_the_engine(world, plan):
    world(2).run(_reads, plan, nn.LSTM, "past it")


class Normalised(Tower):
    """Layers whose weights are made anew at each forward."""

    def __init__(self, how):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would rather see the newer ones
            for layer in (self.first, self.blocks[1].up, self.head):
                how(layer)
                if hasattr(layer, "weight_v"):  # torch copies no module with a weight that it has already made
                    layer.weight = layer.weight.detach()


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "older weight_norm": nn.utils.weight_norm,
    "older spectral_norm": nn.utils.spectral_norm,
}


def _normalised(ranks, plan, how, assigned):
    torch.manual_seed(5)
    model = Normalised(
        NORMS[how]
    ).eval()  # in training spectral_norm counts its forwards, of which one process runs more
    if not assigned:
        train_both(ranks, model, plan, steps=4, tolerance=3e-6)
        return
    # What is assigned to a weight that is made of others is set, with `set_`, behind them.
    reference = copy.deepcopy(model)
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in inputs(3):
        for one in (reference, model):
            with shardwise.gathered(model) if plan == "3" else contextlib.nullcontext():
                one.head.weight = one.head.weight.detach() * 0.5
        for rank in range(ranks.world_size):
            (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 3e-6


@pytest.mark.parametrize("plan", ["0", "2", "3"])
@pytest.mark.parametrize("how", NORMS)
def test_weights_that_are_made_of_others_train(world, how, plan):
    world(2).run(_normalised, plan, how, False)


@pytest.mark.parametrize("plan", ["0", "2", "3"])
@pytest.mark.parametrize("how", ["weight_norm"])
def test_assigning_to_a_weight_that_is_made_of_others_writes_them(world, how, plan):
    world(2).run(_normalised, plan, how, True)
