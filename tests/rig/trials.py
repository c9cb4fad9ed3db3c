"""Training with an optimizer that torch does not know, beside plain torch or until it is refused."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rig.engine import inputs, largest_difference, loss_of, mine, plain_step, prepare, weights_of
from rig.optimizers import Sophia


class Net(nn.Module):
    """Parameters of no, one, two and four dimensions, and one of more than 512 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.wide = nn.Linear(32, 40)
        self.head = nn.Linear(40, 3)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).view(-1, 1, 4, 4)
        x = torch.tanh(self.wide(self.conv(x).flatten(1)))
        return self.head(x) * self.scale.exp()


def net() -> Net:
    torch.manual_seed(5)
    return Net()


def groups(parameters: Any, **settings: Any) -> list[dict[str, Any]]:
    """The group without weight decay first, as timm has it."""
    held = list(parameters)
    return [
        {"params": [p for p in held if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2, **settings},
        {"params": [p for p in held if p.ndim > 1], "weight_decay": 0.1, **settings},
    ]


def refusal(ranks: Any, kind: Any, plan: str, make: Any = None) -> str | None:
    """Train with a `kind` under `plan` beside plain torch; the words of the refusal, if it is refused."""
    from shardwise.errors import OptimizerError

    model = net()
    reference = copy.deepcopy(model)
    build = make or (lambda parameters: kind(groups(parameters)))
    plain = build(reference.parameters())
    try:
        sharded, _, stepping = prepare(ranks, model, plan, optimizer=build)
    except OptimizerError as error:
        return str(error)
    modes = hasattr(kind, "train")
    for step, batch in enumerate(inputs(5)):
        if modes:
            plain.train()
            stepping.train()
        expected = plain_step(reference, batch, ranks.world_size, step, loss_of)[ranks.rank]
        loss = loss_of(model, mine(batch, ranks.rank, ranks.world_size))
        loss.backward()
        assert abs(loss.item() - expected) <= 1e-5, (step, loss.item(), expected)
        if kind is Sophia and step % 2 == 0:
            plain.update_hessian()
            try:
                stepping.update_hessian()
            except OptimizerError as error:
                return str(error)
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
        if modes:
            plain.eval()
            stepping.eval()
            if plan != "3":  # readable at rest: the averages are published
                assert largest_difference({n: p.detach() for n, p in model.named_parameters()}, reference) <= 2e-6
    assert largest_difference(weights_of(sharded), reference) <= 2e-6
    return None


def prepared(ranks: Any, make: Any, plan: str = "2", model: nn.Module | None = None) -> Any:
    """(model, the optimizer) under a plan, or the words of the refusal."""
    from shardwise.errors import OptimizerError

    model = net() if model is None else model
    try:
        _, _, stepping = prepare(ranks, model, plan, optimizer=make)
    except OptimizerError as error:
        return str(error)
    return model, stepping


def step(ranks: Any, model: nn.Module, stepping: Any, batch: Tensor) -> None:
    loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
    stepping.step()
    stepping.zero_grad()
