"""Models built and loaded without memory: the same numbers as an ordinary build, in shards."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rig.engine import PLANS, prepare, tower, trained, weights_of
from rig.tiny import batches, share, tiny_llama, with_lora
from shardwise import initialising
from shardwise.errors import LoadingError, PrepareError, RankError
from shardwise.initialising import is_deferred, sources_of
from shardwise.loading import build_without_memory, building


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    """Ranks import this module and take the value from `defer_all`; this is for what runs in the test's process."""
    monkeypatch.setattr(initialising, "SMALL_NUMEL", 1)


class Odd(nn.Module):
    """Everything that torch's modules do to their weights when they are made, and some that scripts do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.embedding = nn.Embedding(17, 12, padding_idx=3)
        self.attention = nn.MultiheadAttention(12, 4)
        self.lstm = nn.LSTM(12, 7)
        self.convolution = nn.Conv1d(12, 9, 3)
        self.norm = nn.BatchNorm1d(12)
        self.scaled = nn.Parameter(torch.randn(30, 5) * 0.1 + torch.eye(30, 5))
        self.ones = nn.Parameter(torch.ones(13))
        self.cut = nn.Parameter(torch.zeros(7, 9))
        self.half = nn.Linear(6, 10, dtype=torch.bfloat16)
        self.register_buffer("table", torch.arange(40.0).sin()[:, None] * torch.rand(1, 20))
        self.register_buffer("hidden", torch.rand(3, 3), persistent=False)
        nn.init.orthogonal_(self.convolution.weight)
        nn.init.trunc_normal_(self.cut, std=0.7)
        nn.init.kaiming_normal_(self.first.weight)
        with torch.no_grad():
            self.embedding.weight[5:9] = self.embedding.weight[1:5]
            self.embedding.weight[10] = 7.0
            self.scaled[::2].mul_(3)
        self.tied = nn.Linear(12, 17, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, x):
        return self.first(x)


def _built_inside(ranks, build, plan, precision):
    initialising.SMALL_NUMEL = 1
    # Every rank has a seed of its own: rank 0's numbers are everybody's, as with a model that has memory.
    torch.manual_seed(7)
    expected = build()
    after = torch.rand(3)
    torch.manual_seed(7 + ranks.rank)
    with building():
        model = build()
    if ranks.rank == 0:
        assert torch.equal(torch.rand(3), after)
    assert all(parameter.is_meta for parameter in model.parameters() if parameter.numel() > 1)
    from rig.engine import shard

    sharded = shard(ranks, model, plan, precision, sources=sources_of(model))
    found = weights_of(sharded)
    names = dict(expected.named_parameters())
    assert found.keys() == names.keys()
    for name, value in names.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    state = sharded.state_dict()
    if ranks.rank == 0:
        assert list(state) == list(expected.state_dict())
        for name, value in expected.state_dict().items():
            # Masters keep the user's own values, whatever the weights compute in.
            assert torch.equal(state[name], value), name
    for (name, found_buffer), (_, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(found_buffer, wanted), name


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_own_modules_start_with_the_numbers_of_an_ordinary_build(world, plan, size):
    world(size).run(_built_inside, Odd, plan, "no")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_transformers_model_starts_with_the_numbers_of_an_ordinary_build(world, precision):
    world(2).run(_built_inside, tiny_llama, "3", precision)
