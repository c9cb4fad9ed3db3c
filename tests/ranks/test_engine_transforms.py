"""torch.func's transforms inside of blocks at stage 3, also in the steps in which saved tensors are followed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.func import grad, hessian, jacrev, vjp, vmap

from rig.engine import Block, Tower, inputs, loss_of, mine, prepare, train_both
from shardwise.zero.access import gathered

WAYS = {
    "grad": lambda run, x: grad(lambda value: run(value).sin().sum())(x),
    "vjp": lambda run, x: vjp(run, x)[1](torch.ones_like(x))[0],
    "vmap of grad": lambda run, x: vmap(grad(lambda row: run(row).sin().sum()))(x),
    "jacrev": lambda run, x: vmap(jacrev(run))(x).sum(1),
    "hessian": lambda run, x: vmap(hessian(lambda row: run(row).sin().sum()))(x).sum(1),
}


class Transformed(Tower):
    """Blocks that take derivatives of themselves, those of `apart` on rank 1 alone."""

    def __init__(self, way: str, rank: int = 0, apart: tuple[int, ...] = ()) -> None:
        super().__init__()
        skipped = apart if rank != 1 else ()
        self.blocks = nn.ModuleList(Forces(way, n not in skipped) for n in range(3))


class Forces(Block):
    def __init__(self, way: str, takes: bool) -> None:
        super().__init__()
        self.way, self.takes = way, takes

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes:
            return super().forward(x)
        return x + 0.1 * torch.tanh(WAYS[self.way](lambda value: torch.tanh(self.up(value)) @ self.down.weight.T, x))


def _train(ranks, way, plan):
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own way to its rules for jvp
    torch.manual_seed(5)
    train_both(ranks, Transformed(way), plan, steps=4, units=["Forces"])


@pytest.mark.parametrize("plan", ["3", "3-all"])
@pytest.mark.parametrize("way", WAYS)
def test_a_block_takes_its_own_derivatives(world, way, plan):
    world(2).run(_train, way, plan, timeout_s=30)


def _apart(ranks):
    """Where the transform failed, it failed on one rank, and the others waited in their backward."""
    torch.manual_seed(5)
    model = Transformed("grad", ranks.rank, (0, 2))
    _, _, stepping = prepare(ranks, model, "3", units=["Forces"])
    for batch in inputs(4):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()


def test_ranks_may_take_them_in_other_blocks(world):
    world(3).run(_apart, timeout_s=30)


def _leaves_torch_as_it_was(ranks):
    before = graph.disable_saved_tensors_hooks
    torch.manual_seed(5)
    model = Transformed("grad")
    prepare(ranks, model, "3", units=["Forces"])
    x = inputs(1)[0]
    failing = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    failing.remove()
    assert graph.disable_saved_tensors_hooks is before
    loss_of(model, x).backward()
    assert graph.disable_saved_tensors_hooks is before
    with gathered(model):
        weight = model.blocks[0].up.weight
        assert grad(lambda value: (weight @ value).sum())(torch.ones(12)).shape == (12,)
    assert graph.disable_saved_tensors_hooks is before
    # A script's own hooks around a transform are refused by torch, and so they are here.
    with graph.save_on_cpu(), pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        model(x)
    loss_of(model, x).backward()


def test_torch_is_left_as_it_was(world):
    world(2).run(_leaves_torch_as_it_was, timeout_s=30)
