"""A backward gathers what it reads wherever the loss came from, or ends in an error of Python's: never in a signal.

The numbers are a plain model's. Each way is taken from the first step on, and by a model whose first steps went the plain way.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rig.engine import Block, Tower, inputs, loss_of, mine, prepare, train_both
from shardwise.errors import ReleasedParameterError

pytestmark = pytest.mark.thinned(3)


@dataclass
class Data:
    out: Tensor


class Holder:
    def __init__(self, out):
        self.out = out


Named = namedtuple("Named", "out")

PACKED = {
    "tuple": lambda x: (x,),
    "dict": lambda x: {"out": x},
    "namedtuple": Named,
    "dataclass": Data,
    "object": Holder,
    "namespace": lambda x: SimpleNamespace(out=x),
    "userdict": lambda x: UserDict(out=x),
    "set": lambda x: {x},
    "closure": lambda x: lambda: x,
    "generator": lambda x: (item for item in (x,)),
}


def _opened(value: Any) -> Tensor:
    if isinstance(value, (dict, UserDict)):
        return value["out"]
    if hasattr(value, "out"):
        return value.out
    return value() if callable(value) else next(iter(value))


class Packing(Tower):
    """Hands its output, or that of each block, over in an object. last: how the last weight is read."""

    def __init__(self, how, where, last):
        super().__init__()
        self.how, self.where, self.last = how, where, last
        self.scale = nn.Parameter(torch.full((12,), 1.5))
        if where == "blocks":
            self.blocks = nn.ModuleList(PackingBlock(how) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = _opened(block(x)) if self.where == "blocks" else block(x)
        x = self.head(x) if self.last == "matmul" else x * self.scale
        return PACKED[self.how](x) if self.where == "root" else x


class PackingBlock(Block):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return PACKED[self.how](super().forward(x))


def _loss_of_packed(model, x, rank, step):
    out = model(x)
    return (out if isinstance(out, Tensor) else _opened(out)).square().mean()


def _packed(ranks, how, where, last):
    torch.manual_seed(5)
    train_both(ranks, Packing(how, where, last), "3", loss_of=_loss_of_packed, steps=4)


@pytest.mark.parametrize("last", ["matmul", "elementwise"])
@pytest.mark.parametrize("where", ["root", "blocks"])
@pytest.mark.parametrize("how", PACKED)
def test_outputs_may_be_handed_over_in_anything(world, how, where, last):
    world(2).run(_packed, how, where, last)


# What a block may do to its input. Each takes (block, x).
WRITING = {
    "relu": lambda block, x: nn.functional.relu(x, inplace=True),
    "add": lambda block, x: x.add_(block.down.bias),
    "rows": lambda block, x: x[:, :2].mul_(0.5),
    "twice": lambda block, x: x.mul_(0.9).sigmoid_(),
}


class WritingBlock(Block):
    """Writes into its input before it computes. recomputes: the rest, in the backward."""

    def __init__(self, how, recomputes):
        super().__init__()
        self.how, self.recomputes = how, recomputes

    def forward(self, x):
        WRITING[self.how](self, x)
        rest = super().forward
        return checkpoint(rest, x, use_reentrant=False) if self.recomputes else rest(x)


class WritingTower(Tower):
    """Reads the input of each block also behind it, when it has been written into."""

    def __init__(self, how, recomputes):
        super().__init__()
        self.blocks = nn.ModuleList(WritingBlock(how, recomputes) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x)
            x = 0.5 * x + y
        return self.head(x)


def _written(ranks, how, plan, recomputes):
    torch.manual_seed(5)
    train_both(ranks, WritingTower(how, recomputes), plan, steps=4)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("plan", ["0", "3", "3-all"])
@pytest.mark.parametrize("how", WRITING)
def test_a_block_may_write_into_its_input(world, how, plan, recomputes):
    world(2).run(_written, how, plan, recomputes)


# Losses that do not come from what the model returned. Each takes (model, x, this rank's step).


def _caught(name):
    def loss(model, x):
        caught = []
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: caught.append(out))
        model(x)
        handle.remove()
        return caught[0].square().mean()

    return loss


def _penalised(model, x):
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def _penalised_among_forwards(model, x):
    first = model(x).square().mean()
    penalty = _penalised(model, x + 1)
    return first + penalty + model(x - 1).square().mean()


def _twice_through_one_graph(model, x):
    out = model(x)
    return out.square().mean() + out.abs().mean()


class Forces(Tower):
    """Its forward takes gradients by itself."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            energy = super().forward(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.head(self.first(force))


class Aside(Tower):
    """A block keeps a loss in an attribute; nothing else of the model is used."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            self.aside = (block.up(x).square().mean() + x.square().mean()) if block is self.blocks[1] else self.aside
        return self.head(x)

    aside: Any = None


def _kept_aside(model, x):
    model(x)
    return model.aside


WAYS = {
    "a block's output that a hook caught": (Tower, _caught("blocks.1")),
    "a tensor inside of a block": (Tower, _caught("blocks.1.up")),
    "a gradient penalty": (Tower, _penalised),
    "a gradient penalty among forwards": (Tower, _penalised_among_forwards),
    "two losses of one output": (Tower, _twice_through_one_graph),
    "forces in the forward": (Forces, lambda model, x: model(x).square().mean()),
    "an attribute": (Aside, _kept_aside),
}


def _on_a_way(ranks, way, plan, plain_steps):
    made, loss = WAYS[way]

    def of(model, x, rank, step):
        return loss_of(model, x) if step < plain_steps else loss(model, x)

    torch.manual_seed(5)
    train_both(ranks, made(), plan, loss_of=of, steps=4, tolerance=3e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_may_come_from_anywhere(world, way, plan, n):
    world(n).run(_on_a_way, way, plan, 0, timeout_s=20)


FOLLOWED_LATER = [
    "a block's output that a hook caught",
    "a gradient penalty",
    "a gradient penalty among forwards",
    "two losses of one output",
]


@pytest.mark.parametrize("way", FOLLOWED_LATER)
def test_a_loss_may_come_from_elsewhere_than_before(world, way):
    world(2).run(_on_a_way, way, "3", 3, timeout_s=20)


READ = {
    "pow": lambda m: m.head.weight.pow(2).sum(),
    "abs": lambda m: m.blocks[0].up.weight.abs().sum(),
    "norm": lambda m: m.blocks[1].up.weight.norm(),
    "matmul": lambda m: (m.head.weight @ m.head.weight.T).square().sum(),
    "call": lambda m: m.blocks[2](torch.ones(2, 12)).square().mean(),
    "cat": lambda m: torch.cat([p.reshape(-1) for p in m.parameters()]).square().sum(),
}


def _read_in_gathered(ranks, how, plan):
    """A penalty on weights is computed in `gathered`, its backward comes behind it."""

    def of(model, x, rank, step):
        sharded = found.get(id(model))
        if sharded is None:
            return loss_of(model, x) + 0.1 * READ[how](model)
        loss = loss_of(model, x)
        with sharded.gathered():
            return loss + 0.1 * READ[how](model)

    found: dict[int, Any] = {}
    torch.manual_seed(5)
    model = Tower()
    reference = copy.deepcopy(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    found[id(model)] = sharded
    for step, batch in enumerate(inputs(3)):
        for rank in range(ranks.world_size):
            (of(reference, mine(batch, rank, ranks.world_size), rank, step) / ranks.world_size).backward()
        plain.step()
        plain.zero_grad()
        of(model, mine(batch, ranks.rank, ranks.world_size), ranks.rank, step).backward()
        stepping.step()
        stepping.zero_grad()
    with sharded.gathered():
        for (name, weight), (_, wanted) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("plan", ["3", "3-all", "3-disk"])
@pytest.mark.parametrize("how", READ)
def test_weights_read_in_gathered_have_a_backward_behind_it(world, how, plan):
    world(2).run(_read_in_gathered, how, plan, timeout_s=20)


def _surprise(ranks, name):
    """The way changes once the engine has stopped to follow weights: an error names the weight, and the next step works."""
    from shardwise.zero.guard import explain

    torch.manual_seed(5)
    model = Tower()
    _, _, stepping = prepare(ranks, model, "3")
    for batch in inputs(4):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    batch = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    with pytest.raises(RuntimeError, match="is at version") as caught:
        _caught(name)(model, batch).backward()
    told = explain(caught.value)
    del caught
    gc.collect()
    loss_of(model, batch).backward()
    stepping.step()
    return str(told)


def test_a_way_that_nobody_took_before_is_an_error_that_names_the_weight(world):
    for text in world(2).run(_surprise, "blocks.1.up", timeout_s=20):
        assert "'blocks.1.up.weight'" in text
        assert "gathered" in text


def _transformed(ranks, kind):
    from torch.func import functional_call, grad, jvp, vmap

    torch.manual_seed(5)
    model, reference = Tower(), Tower()
    reference.load_state_dict(model.state_dict())
    x = inputs(1)[0]
    _, _, stepping = prepare(ranks, model, "3")
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own way to its rules for jvp
    run = {
        "vmap": lambda m: vmap(m)(x),
        "jvp": lambda m: jvp(m, (x,), (torch.ones_like(x),))[1],
        "grad": lambda m: grad(lambda value: m(value).sum())(x),
        "functional_call": lambda m: functional_call(m, dict(m.named_parameters()), x),
    }[kind]
    for _ in range(2):
        torch.testing.assert_close(run(model), run(reference), rtol=0, atol=1e-6)
        loss_of(model, mine(x, ranks.rank, ranks.world_size)).backward()
        stepping.zero_grad()


@pytest.mark.parametrize("kind", ["vmap", "jvp", "grad", "functional_call"])
def test_transforms_of_torch_func_run_over_a_sharded_model(world, kind):
    world(2).run(_transformed, kind, timeout_s=20)


class Late(Tower):
    """Its first blocks get gradients only after some steps."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, step):
        with torch.set_grad_enabled(self.how != "no_grad" or step > 2):
            x = self.blocks[0](self.first(x))
        x = x.detach() if self.how == "detach" and step <= 2 else x
        return self.head(self.blocks[2](self.blocks[1](x)))


def _late(ranks, how, plan):
    torch.manual_seed(5)
    train_both(ranks, Late(how), plan, loss_of=lambda m, x, rank, step: m(x, step).square().mean(), steps=7)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("plan", ["2", "3", "3-all"])
@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_blocks_that_get_gradients_later_train_from_then_on(world, how, plan, n):
    world(n).run(_late, how, plan, timeout_s=20)


def _freed(ranks):
    """What a graph keeps of the engine closes no circle."""
    torch.manual_seed(5)
    model = Tower()
    sharded, stepper, stepping = prepare(ranks, model, "3")
    loss = loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size))
    engine = weakref.ref(sharded)
    sharded.release()
    del sharded, stepper, stepping, model
    gc.collect()
    del loss
    gc.collect()
    return engine() is None


def test_the_engine_goes_with_the_last_graph(world):
    assert world(2).run(_freed) == [True, True]


class Keeping(Tower):
    """Keeps what it has computed, as layers keep a loss of their own beside their output."""

    def forward(self, x):
        for layer in (self.first, *self.blocks, self.head):
            x = layer(x)
            layer.kept = x
        return x


def _dropped(ranks, plan, steps):
    """What is alive of a model that is dropped with gradients, and with the graph that it has kept."""
    model = Keeping()
    sharded, optimizer, stepping = prepare(ranks, model, plan)
    x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    for _ in range(steps):
        loss_of(model, x).backward()
        stepping.step()
        stepping.zero_grad()
    loss_of(model, x).backward()
    found = {
        "model": weakref.ref(model),
        "engine": weakref.ref(sharded),
        "weight": weakref.ref(model.first.weight),
        "gradients": weakref.ref(sharded.trained()[0].gradients),
    }
    del model, sharded, optimizer, stepping
    gc.collect()
    return [name for name, thing in found.items() if thing() is not None]


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("plan", ["0", "2-opt", "3", "3-all"])
def test_a_model_that_is_dropped_is_gone_with_its_gradients_and_graphs(world, plan, steps):
    assert world(2).run(_dropped, plan, steps) == [[], []]


def _outlived(ranks, plan, steps):
    model = Tower()
    prepared = prepare(ranks, model, plan)
    x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    for _ in range(steps):
        loss_of(model, x).backward()
    loss = loss_of(model, x.requires_grad_())
    del model, prepared
    gc.collect()
    loss.backward()


@pytest.mark.parametrize("steps", [0, 4])
def test_a_backward_that_outlives_a_sharded_model_says_so(world, steps):
    with pytest.raises(ReleasedParameterError, match="of a model that is gone or no longer prepared"):
        world(2).run(_outlived, "3", steps)
    world(2).run(_outlived, "0", steps)


class Layered(nn.Linear):
    """Computes with an input of any layout."""

    def forward(self, x):
        return torch.sparse.mm(x, self.weight) + self.bias if x.is_sparse else super().forward(x)


class LayoutTower(Tower):
    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.blocks = nn.ModuleList(Layered(12, 12) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + self.called(block, x)
        return self.head(x)

    def called(self, block, x):
        if self.layout == "sparse":
            return block(x.to_sparse())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has said that nested tensors are a prototype
            nested = torch.nested.as_nested_tensor([x, x[:1]], layout=getattr(torch, self.layout))
        return block(nested).unbind()[0]


def _laid_out(ranks, layout, plan):
    torch.manual_seed(5)
    train_both(ranks, LayoutTower(layout), plan, steps=4)


@pytest.mark.parametrize("plan", ["0", "3"])
@pytest.mark.parametrize("layout", ["sparse", "strided", "jagged"])
def test_inputs_of_any_layout(world, layout, plan):
    world(2).run(_laid_out, layout, plan)
