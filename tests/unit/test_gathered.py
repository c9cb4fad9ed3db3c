"""Reading the weights of a prepared model from outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._guards import TracingContext, tracing

import shardwise
from shardwise.errors import ReleasedParameterError
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.ranks.ranks import Ranks
from shardwise.zero.sharded import ShardedModel


def test_gathered_makes_weights_readable_and_only_inside() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    plan = Plan.from_stage(3, offload_optimizer="cpu", offload_param="cpu")
    ShardedModel(model, plan=plan, ranks=Ranks.join(use_cpu=True), precision=Precision.named("no"))
    with pytest.raises(ReleasedParameterError, match=r"0\.weight.*shardwise\.gathered"):
        model[0].weight.sum()
    with shardwise.gathered(model):
        assert torch.equal(model[0].weight, before)
    with pytest.raises(ReleasedParameterError):
        model[0].weight.sum()
    context = TracingContext(None)
    with tracing(context), pytest.raises(ReleasedParameterError, match=r"torch\.compile met .*dynamo_backend"):
        model[0].weight.sum()


def test_gathered_leaves_a_model_that_is_not_prepared_alone() -> None:
    model = nn.Linear(2, 2)
    with shardwise.gathered(model):
        assert model.weight.sum().isfinite()
