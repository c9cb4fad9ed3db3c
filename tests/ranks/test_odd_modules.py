"""Modules that are unlike a linear: what plain torch trains is trained, with its numbers, or refused by a sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ranks.test_front_training import fresh
from rig.engine import Block, Tower, inputs, loss_of, mine, prepare, tower, train_both
from shardwise.errors import PrepareError

pytestmark = pytest.mark.thinned(2)

SOME = ["0", "1", "2", "3", "3-all"]


class SmallBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.1]))
        self.gain = nn.Parameter(torch.tensor(0.9))
        self.empty = nn.Parameter(torch.empty(0, 12))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain + self.shift + (x @ self.empty.t()).sum(-1, keepdim=True)


class Sizes(Tower):
    """Weights of no element, of one, and without dimensions, in blocks and outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.blocks = nn.ModuleList(SmallBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.nothing.sum()


class OnlySmall(nn.Module):
    """Fewer elements than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one


class Doubled(nn.Module):
    """A parametrization with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


class Tied(Tower):
    """One weight in two blocks and at the root, and a module that is in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[1].down = self.blocks[0].down
        self.extra = nn.Linear(12, 20)
        self.extra.weight = self.blocks[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.extra(x).mean(-1, keepdim=True)


def _weight_norm() -> nn.Module:
    model = Tower()
    for linear in (model.blocks[0].up, model.blocks[2].down, model.head):
        parametrizations.weight_norm(linear)
    return model


def _spectral_norm() -> nn.Module:
    model = Tower()
    for linear in (model.blocks[0].up, model.blocks[2].down, model.head):
        parametrizations.spectral_norm(linear)
    return model


def _orthogonal() -> nn.Module:
    model = Tower()
    parametrizations.orthogonal(model.blocks[1].up)
    return model


def _registered() -> nn.Module:
    model = Tower()
    for linear in (model.first, model.blocks[1].down):
        parametrize.register_parametrization(linear, "weight", Doubled(), unsafe=True)
    return model


def _tied_and_normed() -> nn.Module:
    model = Tied()
    parametrizations.weight_norm(model.head)
    parametrize.register_parametrization(model.blocks[0].down, "bias", Doubled(), unsafe=True)
    return model


def _older() -> nn.Module:
    """torch's older form, which computes the weight in a hook before the forward."""
    model = Tower()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.blocks[0].up)
    nn.utils.spectral_norm(model.blocks[1].down)
    return model


def _lazy_made() -> nn.Module:
    model = Tower()
    model.head = nn.LazyLinear(3)
    model(torch.ones(1, 5))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": Sizes,
    "one element": OnlySmall,
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "orthogonal": _orthogonal,
    "a parametrization": _registered,
    "tied": Tied,
    "tied and normed": _tied_and_normed,
    "older norms": _older,
    "lazy, after a batch": _lazy_made,
}


def _trained(ranks: Any, plan: str, kind: str) -> None:
    # Spectral norms move statistics on at each forward, so that the plain model must run as many; and older ones keep a tensor
    # with a graph, which torch does not copy.
    if kind in ("spectral_norm", "older norms"):
        _equal_on_all_ranks(ranks, plan, kind)
    else:
        train_both(ranks, _made(kind), plan, tolerance=1e-5)


def _made(kind: str) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[kind]()


def _equal_on_all_ranks(ranks: Any, plan: str, kind: str) -> None:
    """Every rank has the same batch, so one plain model plays them all in one forward."""
    model, reference = _made(kind), _made(kind)
    sharded, _, stepping = prepare(ranks, model, plan)
    plain = torch.optim.AdamW(reference.parameters(), lr=3e-3, eps=1e-4)
    for batch in inputs(5):
        expected, loss = loss_of(reference, batch), loss_of(model, batch)
        assert torch.allclose(loss, expected, atol=1e-5)
        expected.backward()
        loss.backward()
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
    wanted = dict(reference.named_parameters())
    with sharded.gathered():
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, wanted[name], atol=1e-5), name
    for buffer, other in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(buffer, other, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("plan", SOME)
def test_it_is_trained_as_in_plain_torch(world, plan, kind):
    world(1).run(_trained, plan, kind, timeout_s=30)
    world(2).run(_trained, plan, kind, timeout_s=30)


def _lazy(ranks: Any, stage: int) -> None:
    model = Tower()
    model.head = nn.LazyLinear(3)
    accelerator = fresh(stage)
    with pytest.raises(PrepareError, match=r"head\.weight of this Tower has no shape yet: its module is lazy"):
        accelerator.prepare(model, torch.optim.SGD(model.first.parameters(), lr=0.1))
    accelerator.free_memory()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_lazy_module_is_refused(world, stage):
    world(1).run(_lazy, stage, timeout_s=30)
    world(2).run(_lazy, stage, timeout_s=30)


# After prepare.


def _replace_head(model: Any) -> None:
    model.head = nn.Linear(12, 3)


def _replace_weight(model: Any) -> None:
    model.blocks[1].up.weight = nn.Parameter(torch.randn(20, 12))


def _append(model: Any) -> None:
    model.blocks.append(copy.deepcopy(tower().blocks[0]))


def _set_item(model: Any) -> None:
    model.blocks[1] = tower().blocks[0]


def _register(model: Any) -> None:
    model.blocks[0].register_parameter("more", nn.Parameter(torch.ones(3)))


def _deep(model: Any) -> None:
    model.blocks[2].up = nn.Sequential(nn.Linear(12, 20), nn.Tanh())


def _thaw_later(model: Any) -> None:
    model.head = nn.Linear(12, 3).requires_grad_(False)
    loss_of(model, inputs(1)[0][:4])  # nobody trains it, in plain torch either
    model.head.requires_grad_(True)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "replaced": (_replace_head, "head.weight"),
    "a parameter": (_replace_weight, "blocks.1.up.weight"),
    "appended": (_append, "blocks.3.up.weight"),
    "in a list": (_set_item, "blocks.1.up.weight"),
    "registered": (_register, "blocks.0.more"),
    "deep": (_deep, "blocks.2.up.0.weight"),
    "thawed later": (_thaw_later, "head.weight"),
}


def _changed(ranks: Any, plan: str, change: str, steps: int) -> None:
    sharded, _, stepping = prepare(ranks, tower(), plan)
    model, x = sharded.model, mine(inputs(1)[0], ranks.rank, ranks.world_size)
    for _ in range(steps):
        loss_of(model, x).backward()
        stepping.step()
        stepping.zero_grad()
    act, name = CHANGES[change]
    act(model)
    for _ in range(2):
        with pytest.raises(PrepareError, match=f"^{name} has come into this Tower after it was prepared"):
            loss_of(model, x)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_weights_that_come_later_are_refused(world, plan, change):
    world(2).run(_changed, plan, change, 2, timeout_s=30)


def _inserted(ranks: Any, plan: str) -> None:
    """`insert` calls no hook of torch: the first training forward looks."""
    sharded, _, _ = prepare(ranks, tower(), plan)
    sharded.model.blocks.insert(0, tower().blocks[0])
    with pytest.raises(PrepareError, match="has come into this Tower"):
        loss_of(sharded.model, inputs(1)[0])


@pytest.mark.parametrize("plan", ["0", "3"])
def test_so_are_those_that_no_hook_sees_before_the_first_step(world, plan):
    world(2).run(_inserted, plan, timeout_s=30)


def _harmless(ranks: Any, plan: str) -> None:
    """Modules without weights, weights moved about, and a block less: as in plain torch."""
    model = tower()

    def change(sharded: Any, stepping: Any, step: int) -> None:
        for of in (model, reference):
            if step == 1:
                of.dropout = nn.Identity()
            if step == 2:
                of.blocks[0], of.blocks[2] = of.blocks[2], of.blocks[0]
            if step == 3:
                del of.blocks[1]

    reference = copy.deepcopy(model)
    plain = torch.optim.AdamW(reference.parameters(), lr=3e-3, eps=1e-4)
    sharded, _, stepping = prepare(ranks, model, plan)
    for step, batch in enumerate(inputs(6)):
        loss_of(reference, batch).backward()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
        change(sharded, stepping, step)
    wanted = dict(reference.named_parameters())
    with sharded.gathered():
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, wanted[name], atol=1e-6), name


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_other_changes_are_as_in_plain_torch(world, plan):
    world(2).run(_harmless, plan, timeout_s=30)
