"""`parameter.data = values` between what has memory and what has none, while a model is built."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.building.initialising import deferring, is_deferred, value_of


def test_a_real_parameter_takes_values_without_memory_and_the_other_way_round():
    torch.manual_seed(3)
    plain = nn.Linear(100, 100)
    torch.manual_seed(3)
    with deferring():
        layer = nn.Linear(100, 100)
        assert is_deferred(layer.weight)
        assert not is_deferred(layer.bias)
        small, large = layer.bias, layer.weight
        small.data = large[0] * 2  # as PEFT's initialisations by a decomposition do
        assert layer.bias is small
        assert is_deferred(small)
        large.data = torch.ones(100, 100, device="cpu").tril().clone()
    assert small.requires_grad
    assert torch.equal(value_of(small), plain.weight[0] * 2)
    found = value_of(large) if is_deferred(large) else large.detach()
    assert torch.equal(found, torch.ones(100, 100).tril())


def test_assignments_between_equals_are_torchs_own():
    layer = nn.Linear(3, 3)
    with deferring():
        layer.weight.data = torch.zeros(3, 3)
    assert torch.equal(layer.weight, torch.zeros(3, 3))
