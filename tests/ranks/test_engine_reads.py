"""Weights that are read in the forward of another module than their own: gathered for it, and the numbers of a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rig.engine import Block, Tower, inputs, loss_of, prepare, train_both
from rig.heard import heard
from shardwise.errors import ReleasedParameterError


class Reading(Tower):
    """Reads weights of its blocks by itself, in one of WAYS."""

    def __init__(self, way: str, checkpointing: bool = False) -> None:
        super().__init__()
        self.way, self.checkpointing = way, checkpointing
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way == "before":
            x = x + self.blocks[2].down.bias
        for block in self.blocks:
            x = checkpoint(self.run, block, x, use_reentrant=False) if self.checkpointing else self.run(block, x)
        if self.way == "all at once":
            x = x * torch.stack([block.up.weight for block in self.blocks]).mean()
        if self.way == "a view":
            x = x @ self.blocks[0].up.weight.t() @ self.blocks[1].down.weight.t()
        if self.way == "a regulariser":
            grams = [p @ p.T for name, p in self.named_parameters() if "blocks" in name and p.ndim == 2]
            x = x * (1 + 1e-2 * sum(gram.norm() for gram in grams))
        if self.way == "now and then" and self.step % 3 == 2:
            x = F.linear(x, self.blocks[1].down.weight[:, :12])
        return self.head(x)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        x = block(x)
        return x + self.blocks[0].down.bias if self.way == "between" else x


WAYS = ["before", "between", "all at once", "a view", "a regulariser", "now and then"]


def _loss(model: Reading, x: Tensor, rank: int, step: int) -> Tensor:
    model.step = step
    return loss_of(model, x)


def _train(ranks, way, plan, checkpointing):
    torch.manual_seed(3)
    train_both(ranks, Reading(way, checkpointing), plan, loss_of=_loss)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("plan", ["3", "3-all"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_another_module_are_read_in_a_forward(world, way, plan, checkpointing):
    world(2).run(_train, way, plan, checkpointing, timeout_s=20)


class Apart(Tower):
    """Each rank reads the weight of another block."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, *self.blocks):
            x = block(x)
        return self.head(x + self.blocks[self.rank].up.bias.sum())


def _apart(ranks):
    torch.manual_seed(3)
    model = Apart(ranks.rank)
    with torch.no_grad():
        expected = model(inputs(1)[0])
    sharded, stepper, _ = prepare(ranks, model)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs(1)[0]), expected)
    for batch in inputs(3):
        loss_of(model, batch).backward()
        stepper.step()
        stepper.zero_grad()
    with torch.no_grad():
        mine = model(inputs(1)[0])
    with sharded.gathered(), torch.no_grad():
        torch.testing.assert_close(model(inputs(1)[0]), mine)


def test_each_rank_may_read_another_weight(world):
    world(3).run(_apart, timeout_s=20)


class Half(Block):
    """Recomputes one of its layers, and hands its output over where nobody sees it."""

    def __init__(self, reentrant: bool, recomputes: bool) -> None:
        super().__init__()
        self.reentrant, self.recomputes = reentrant, recomputes

    def forward(self, x: Tensor) -> Any:
        up = checkpoint(self.up, x, use_reentrant=self.reentrant) if self.recomputes else self.up(x)
        return lambda: x + self.down(torch.relu(up))


class Halves(Tower):
    def __init__(self, reentrant: bool, recomputing: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Half(reentrant, n in recomputing) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)()
        return self.head(x)


def _halves(ranks, reentrant, plan, recomputing):
    torch.manual_seed(3)
    train_both(ranks, Halves(reentrant, recomputing[ranks.rank]), plan, units=["Half"])


@pytest.mark.parametrize("recomputing", [((0, 1, 2), (0, 1, 2)), ((1,), (0, 2))], ids=["", "apart"])
@pytest.mark.parametrize("plan", ["3", "3-all"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_of_a_block_may_be_recomputed_where_nobody_announces_it(world, reentrant, plan, recomputing):
    world(2).run(_halves, reentrant, plan, recomputing, timeout_s=30)


def _said(ranks):
    with heard() as lines:
        torch.manual_seed(3)
        model = Reading("between")
        prepare(ranks, model)
        for batch in inputs(2):
            loss_of(model, batch).backward()
    told = [line for line in lines if "not of its own module" in line]
    assert len(told) == (ranks.rank == 0)
    if told:
        assert "'blocks.0.down.bias' is read inside of the forward of Reading" in told[0]
    with pytest.raises(ReleasedParameterError):  # between forwards nobody would say when it is no longer needed
        model.blocks[0].down.bias.sum()


def test_it_is_said_once_and_only_in_forwards(world):
    world(2).run(_said, timeout_s=20)
