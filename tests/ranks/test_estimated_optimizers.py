"""The estimate of an optimizer is the ledger of a run with it: to the byte, by role and tier, on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rig.engine import OTHER_PLANS, PLANS, Block, as_on_a_device, inputs, loss_of, mine, shard, trained
from rig.optimizers import Lamb, Lion, Loop
from shardwise.config.sections import EngineConfig
from shardwise.estimate.bytes import AT_REST, Choice, Run, estimate
from shardwise.estimate.keeping import Stepper
from shardwise.step.optimizer import ShardedOptimizer


class Net(nn.Module):
    """Matrices of 4,096 elements, from which on states of 8 bits are, and of odd shapes; vectors; two units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 64)
        self.block = Block(64, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.first(x))))


class RowsAndLists(Loop):
    """Keeps a list of what has a number for each row, a dictionary with the last two gradients, and a number of Python's."""

    def one(self, p, grad, group, state):
        rows = grad.reshape(p.shape[0], -1).norm(dim=1)
        state["rows"] = [rows, rows.double()]
        state["last"] = {"gradients": [*state.get("last", {"gradients": []})["gradients"], grad.clone()][-2:]}
        state["count"] = state.get("count", 0) + 1
        p.sub_(grad / (grad.norm() + 1e-3), alpha=group["lr"])


def adamw_8bit(parameters: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)


def _two_groups(parameters: Any) -> Any:
    """Matrices keep an average of gradients, vectors nothing: settings that a group has."""
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.ndim == 2], "momentum": 0.9},
        {"params": [p for p in held if p.ndim < 2]},
    ]
    return torch.optim.SGD(groups, lr=1e-2)


def _matrices(own: list[Any]) -> list[Any]:
    return [p for p in own if p.ndim == 2]


def _others(own: list[Any]) -> list[Any]:
    return [p for p in own if p.ndim != 2]


optim = torch.optim
# name -> [(the optimizer, which of the trained parameters it is given)]
OPTIMIZERS: dict[str, list[tuple[Any, Any]]] = {
    "AdamW": [(optim.AdamW, list)],
    "AMSGrad": [(partial(optim.Adam, amsgrad=True), list)],
    "SGD": [(partial(optim.SGD, lr=1e-2), list)],
    "momentum": [(partial(optim.SGD, lr=1e-2, momentum=0.9), list)],
    "groups": [(_two_groups, list)],
    "Adagrad": [(optim.Adagrad, list)],  # whose constructor makes its states
    "RMSprop": [(partial(optim.RMSprop, centered=True, momentum=0.9), list)],
    "Lion": [(Lion, list)],
    "Muon": [(optim.Muon, _matrices), (optim.AdamW, _others)],
    "two AdamWs": [(optim.AdamW, _matrices), (optim.AdamW, _others)],
    "Adafactor": [(optim.Adafactor, list)],
    "Lamb": [(Lamb, list)],
    "lists": [(RowsAndLists, list)],
    "AdamW8bit": [(adamw_8bit, list)],
}
# The elements of a chunk that a file of scales takes whole pages of.
PAGES = 1 << 18
_ALL = PLANS | OTHER_PLANS


def _ledgers(ranks: Any, name: str, plan: str, dtype: str, cuda: bool) -> dict[tuple[str, str], int]:
    """What the engine says it holds between a step and the next backward."""
    with as_on_a_device(PAGES) if cuda else nullcontext():
        torch.manual_seed(3)
        model = Net()
        stepping = [make(choose(trained(model))) for make, choose in OPTIMIZERS[name]]
        sharded = shard(ranks, model, plan, optimizer_state_dtype=dtype)
        steppers = [ShardedOptimizer(each, [sharded]) for each in stepping]
        for number, batch in enumerate(inputs(3)):
            loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
            gradients = sharded.ledger() if number == 2 else {}
            for each in stepping:
                each.step()
            for each in stepping:
                each.zero_grad()
        found: dict[tuple[str, str], int] = {(str(r), str(t)): n for (r, t), n in gradients.items() if r == "gradient"}
        for ledger in (sharded.ledger(), *(stepper.ledger() for stepper in steppers)):
            for (role, tier), nbytes in ledger.items():
                key = str(role), str(tier)
                found[key] = found.get(key, 0) + (nbytes if role != "gradient" else 0)
        return {key: nbytes for key, nbytes in found.items() if nbytes}


def _estimated(name: str, plan: str, size: int, dtype: str, cuda: bool) -> tuple[dict[tuple[str, str], int], Any]:
    with torch.device("meta"):
        model = Net()
    steppers = [Stepper(make, choose(trained(model)), name) for make, choose in OPTIMIZERS[name]]
    options = EngineConfig(optimizer_state_dtype=dtype)
    run = Run(world_size=size, cuda=cuda, steppers=steppers, options=options)
    found = estimate(model, Choice(*_ALL[plan]), run)
    return {(row, str(tier)): nbytes for (row, tier), nbytes in found.nbytes.items() if row in AT_REST}, found


def _hold(world: Any, name: str, plan: str, size: int = 2, dtype: str = "fp32", cuda: bool = False) -> None:
    wanted, found = _estimated(name, plan, size, dtype, cuda)
    ledgers = world(size).run(_ledgers, name, plan, dtype, cuda)
    states = [sum(n for (role, _), n in ledger.items() if role == "optimizer") for ledger in ledgers]
    fullest = max(range(size), key=states.__getitem__)
    assert ledgers[fullest] == wanted
    if len(found.states) == 1:
        assert len(set(states)) == 1
    else:  # masters are the same on each
        assert [total - states[0] for total in states] == [total - found.states[0] for total in found.states]


TIERS = ("1", "1-disk", "3", "3-all", "3-disk")
COVER = [
    (n, p)
    for row, n in enumerate(OPTIMIZERS)
    for column, p in enumerate(TIERS)
    if (row + column) % 4 == 1 or n in ("Muon", "two AdamWs")
]
REST = [(n, p) for n in OPTIMIZERS for p in (*TIERS, "0") if (n, p) not in COVER]


@pytest.mark.parametrize(("name", "plan"), [*COVER, *(pytest.param(*c, marks=pytest.mark.full) for c in REST)])
def test_the_estimate_is_the_ledger(world, name, plan):
    _hold(world, name, plan)


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "lists"])
@pytest.mark.parametrize(("plan", "size"), [("0", 2), ("3", 1), ("3-disk", 1), ("2", 3)])
def test_it_is_at_any_number_of_ranks(world, name, plan, size):
    _hold(world, name, plan, size)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["AdamW", "Lion", "Muon", "two AdamWs", "Lamb", "Adafactor", "AdamW8bit"])
def test_moments_that_visit_a_device_rest_as_they_are_coded(world, name, dtype):
    """Those that are known as moments; codes and rows that an optimizer keeps itself stay as they are."""
    for plan in ("3-opt", "3-disk") if name in ("AdamW", "Muon", "two AdamWs") else ("3-all",):
        _hold(world, name, plan, dtype=dtype, cuda=True)
