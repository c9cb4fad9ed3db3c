"""A norm has the same bits wherever gradients rest, and in every process: that is what decides what a clipped step is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rig.engine import tower
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.ranks.ranks import Ranks
from shardwise.step.clipping import power_sum
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero import norms, sums
from shardwise.zero.sharded import ShardedModel


class Away(torch.Tensor):
    """As if in host memory, beside a device: `to` brings it up, and nothing else may read it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [one.as_subclass(torch.Tensor) if isinstance(one, Away) else one for one in args]
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", 0)  # any but the one that is asked for
        if func is torch.Tensor.to:
            assert torch.device("cpu") in plain[1:], plain[1:]
            return plain[0].clone() if len(plain) == 2 else plain[0].to(*plain[1:])
        assert func not in (torch.linalg.vector_norm, torch._foreach_norm), "it is measured where it rests"
        return func(*plain, **(kwargs or {}))


def away(values: torch.Tensor) -> torch.Tensor:
    return values.clone().as_subclass(Away)


def test_what_rests_elsewhere_is_measured_on_the_device():
    values = [torch.randn(n) for n in (5, 1, 3000)]
    device = torch.device("cpu")
    expected = power_sum(values, 2.0, device, torch.float32)
    for places in ([1], [0, 2], [0, 1, 2]):
        mixed = [away(one) if place in places else one for place, one in enumerate(values)]
        assert torch.equal(power_sum(mixed, 2.0, device, torch.float32), expected)
    assert torch.equal(sums.squared_norm(away(values[2]), device), sums.squared_norm(values[2]))
    assert power_sum([], 2.0, device, torch.float64).dtype == torch.float64


def test_what_is_narrow_is_measured_as_it_is_when_it_is_wide():
    narrow = torch.randn(10_001).bfloat16()
    assert torch.equal(sums.squared_norm(narrow), sums.squared_norm(narrow.float()))


def test_what_is_narrow_has_the_power_sum_that_it_has_when_it_is_wide():
    narrow = [torch.randn(n).bfloat16() for n in (10_001, 7)]
    device = torch.device("cpu")
    for order in (2.0, 1.0, 3.0, 0.5):
        expected = power_sum([one.float() for one in narrow], order, device, torch.float32)
        for places in ([], [0], [0, 1]):
            mixed = [away(one) if place in places else one for place, one in enumerate(narrow)]
            assert torch.equal(power_sum(mixed, order, device, torch.float32), expected)


def test_a_sum_has_the_same_bits_whichever_squares_a_backward_has_measured():
    torch.manual_seed(3)
    net = tower(12)
    ranks = Ranks.join(use_cpu=True, timeout_s=60)
    model = ShardedModel(net, plan=Plan.from_stage(3), ranks=ranks, precision=Precision.named("no"))
    held = ShardedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), [model]).held
    net(torch.randn(8, 5)).square().sum().backward()
    plain = held.square()
    every = list(model.trained())
    for _ in range(50):
        for trained, known in zip(every, torch.randint(2, (len(every),)).tolist(), strict=True):
            trained.sums.square = sums.squared_norm(trained.gradients.at_rest) if known else None
        assert torch.equal(held.square(), plain)


def test_single_norms_are_measured_on_the_device(monkeypatch: pytest.MonkeyPatch):
    model, _ = _strays()
    (gradients,) = {id(g): g for g in norms_of(model)._gradients}.values()
    monkeypatch.setattr(type(gradients), "parts", lambda self, index: [p.bfloat16() for p in self.sums.parts(index)])
    plain = norms_of(model).of(gradients, 0, 2.0)
    norms_of(model).forget()
    assert torch.equal(plain, gradients.sums.parts(0)[0].bfloat16().float().norm())
    monkeypatch.setattr(
        type(gradients), "parts", lambda self, index: [away(p.bfloat16()) for p in self.sums.parts(index)]
    )
    assert torch.equal(norms_of(model).of(gradients, 0, 2.0), plain)


def norms_of(model: ShardedModel) -> norms.Norms:
    return model.engine.norms


def _strays() -> tuple[ShardedModel, ShardedOptimizer]:
    """A model whose optimizer steps every other of its weights, behind a backward."""
    torch.manual_seed(3)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
    ranks = Ranks.join(use_cpu=True, timeout_s=60)
    model = ShardedModel(net, plan=Plan.from_stage(0), ranks=ranks, precision=Precision.named("no"))
    optimizer = torch.optim.SGD(list(net.parameters())[::2], lr=0.1)
    stepper = ShardedOptimizer(optimizer, [model])
    net(torch.randn(8, 16)).square().sum().backward()
    return model, stepper


def test_gradients_that_no_optimizer_steps_are_summed_in_the_models_order():
    model, stepper = _strays()
    parameters = list(model.model.parameters())
    names = {id(p): name for name, p in model.model.named_parameters()}
    orders = []
    for given in (parameters, parameters[::-1], copy.copy(parameters[7:] + parameters[:7])):
        shards = stepper.groups.chosen(given)
        orders.append([names[id(shard.parameter)] for shard in shards if id(shard.parameter) in stepper.groups.strays])
    assert orders[0] == [name for place, name in enumerate(names.values()) if place % 2]
    assert orders[1] == orders[2] == orders[0]
