"""An optimizer that torch does not know has torch's numbers on shards, or is refused before its first step, and told why."""

from __future__ import annotations

import copy
import random
import time
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rig.engine import inputs, largest_difference, loss_of, mine, plain_step, prepare, weights_of
from rig.optimizers import (
    COUNT_FOR_ALL,
    NOWHERE,
    SHARDED,
    WHOLE,
    AdamWOneCounter,
    Galore,
    Lamb,
    LambClips,
    Lion,
    Lookahead,
    Loop,
    Noisy,
    Prodigy,
    RowNorm,
    Sam,
    ScheduleFree,
    Sophia,
    StateInConstructor,
)

EVERY = SHARDED | WHOLE | NOWHERE
# "2-opt" rests on the CPU, which on a CPU is in place; "3-disk" visits.
PLANS = ("0", "1", "2", "3", "2-opt", "3-disk")


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


def _trains_or_is_refused(ranks: Any, name: str, plan: str) -> str | None:
    return refusal(ranks, EVERY[name], plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", EVERY)
def test_it_has_torchs_numbers_or_is_refused_by_name(world, name, plan):
    texts = world(3).run(_trains_or_is_refused, name, plan)
    whole = plan == "0"
    on_drive = name in (*COUNT_FOR_ALL, "Sophia") and plan == "3-disk"
    expected = name in NOWHERE or (name in WHOLE and not whole) or on_drive
    if not expected:
        assert texts == [None] * 3
    for text in texts if expected else ():
        assert name in text
        assert "group" in text or "state" in text or "closure" in text
        assert text == texts[0]


def _prepared(ranks: Any, make: Any, plan: str = "2", model: nn.Module | None = None) -> Any:
    """(model, the optimizer) under a plan, or the words of the refusal."""
    from shardwise.errors import OptimizerError

    model = net() if model is None else model
    try:
        _, _, stepping = prepare(ranks, model, plan, optimizer=make)
    except OptimizerError as error:
        return str(error)
    return model, stepping


def _step(ranks: Any, model: nn.Module, stepping: Any, batch: Tensor) -> None:
    loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
    stepping.step()
    stepping.zero_grad()


def _warmed_up(ranks: Any, kind: Any, tensors: bool, plan: str) -> str | None:
    """A scheduler that begins at 0 was made before prepare: in the trial nothing would move."""

    def make(parameters: Any) -> Any:
        found = kind(groups(parameters, lr=torch.tensor(1e-2) if tensors else 1e-2))
        torch.optim.lr_scheduler.LambdaLR(found, lambda step: min(1.0, step / 2))
        assert all(float(group["lr"]) == 0 for group in found.param_groups)
        return found

    found = _prepared(ranks, make, plan)
    if isinstance(found, str):
        return found
    assert all(float(group["lr"]) == 0 for group in found[1].param_groups)
    return None


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("kind", [Lion, Lamb, LambClips, RowNorm, Prodigy])
def test_it_is_tried_with_rates_above_zero(world, kind, tensors):
    for text in world(3).run(_warmed_up, kind, tensors, "2"):
        assert text is None if kind is Lion else kind.__name__ in text


def _muon(parameters: Any) -> Any:
    return torch.optim.Muon([p for p in parameters if p.ndim == 2])


KNOWN = {
    "LBFGS": torch.optim.LBFGS,
    "Adafactor": torch.optim.Adafactor,
    "Muon": _muon,
    "SparseAdam": torch.optim.SparseAdam,
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_torchs_own_that_see_shapes_are_refused_at_stage_0_too(world, name, n):
    for text in world(n).run(_prepared, KNOWN[name], "0"):
        assert name in text
        assert "every zero_stage" in text


class Watched(Loop):
    """Keeps things of every kind, and changes them in a step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, table={"a": [0]}, rate=torch.tensor(0.5))
        self.count = 0
        self.seen = [0]
        self.numbers = {"last": torch.zeros(())}
        self.generator = torch.Generator().manual_seed(3)
        self.chosen = self.slow

    def slow(self) -> float:
        self.count += 1
        return 1.0

    def begin(self) -> None:
        self.chosen()
        self.seen.append(len(self.seen))
        self.numbers["last"].add_(1)
        torch.rand((), generator=self.generator)

    def group(self, group: Any) -> None:
        group["table"]["a"][0] += 1
        group["rate"].mul_(1.0)

    def one(self, p: Tensor, grad: Tensor, group: Any, state: Any) -> None:
        state["n"] = state.get("n", 0) + 1
        p.sub_(grad, alpha=group["lr"])


def _left_alone(ranks: Any) -> None:
    import numpy

    calls: list[str] = []
    model = net()
    stepping = Watched(groups(model.parameters()))
    stepping.register_step_pre_hook(lambda *_: calls.append("before"))
    stepping.register_step_post_hook(lambda *_: calls.append("after"))

    def seen() -> Any:
        kept = {
            k: v for k, v in vars(stepping).items() if k not in ("step", "zero_grad", "add_param_group", "generator")
        }
        settings = [{k: v for k, v in g.items() if k != "params"} for g in kept.pop("param_groups")]
        kept = {k: v for k, v in kept.items() if not callable(v) and not k.startswith("_")}
        return repr((settings, kept)), [id(v) for g in settings for v in g.values()], [id(v) for v in kept.values()]

    def generators() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()),
            stepping.generator.get_state().tolist(),
        ]  # fmt: skip

    torch.manual_seed(9)
    before, drawn = seen(), generators()
    prepare(ranks, model, "2", optimizer=lambda _: stepping)
    assert seen() == before
    assert generators() == drawn
    assert calls == []
    _step(ranks, model, stepping, inputs(1)[0])
    assert (stepping.count, stepping.seen, float(stepping.numbers["last"])) == (1, [0, 1], 1.0)
    assert calls == ["before", "after"]
    assert stepping.chosen.__self__ is stepping


def test_a_trial_leaves_the_users_optimizer_and_random_numbers_alone(world):
    world(2).run(_left_alone)


def _noise(ranks: Any) -> str | None:
    torch.manual_seed(3)

    def make(parameters: Any) -> Any:
        return Noisy(parameters)

    found = _prepared(ranks, make, "0")
    if isinstance(found, str):
        return found
    model, stepping = found
    reference = net()
    plain = make(reference.parameters())
    for batch in inputs(3):
        plain_step(reference, batch, 1, 0, loss_of)
        state = torch.get_rng_state()
        plain.step()
        plain.zero_grad()
        torch.set_rng_state(state)
        _step(ranks, model, stepping, batch)
    assert largest_difference({n: p.detach() for n, p in model.named_parameters()}, reference) <= 1e-6
    return None


def test_one_that_draws_random_numbers_works_on_one_rank_only(world):
    assert world(1).run(_noise) == [None]
    assert all("random numbers" in text for text in world(3).run(_noise))


def _changed_later(ranks: Any, plan: str) -> tuple[bool, str]:
    """Without weight decay this Lamb works element by element; with it, it does not."""
    from shardwise.errors import OptimizerError

    model, stepping = _prepared(ranks, lambda p: Lamb(p, weight_decay=0.0), plan)
    batches = inputs(4)
    _step(ranks, model, stepping, batches[0])
    stepping.param_groups[0]["lr"] = 0.5  # a schedule
    _step(ranks, model, stepping, batches[1])
    stepping.param_groups[0]["weight_decay"] = 0.1
    before = [p.clone() for group in stepping.param_groups for p in group["params"]]
    text = ""
    try:
        _step(ranks, model, stepping, batches[2])
    except OptimizerError as error:
        text = str(error)
    after = [p for group in stepping.param_groups for p in group["params"]]
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    stepping.param_groups[0]["weight_decay"] = 0.0
    stepping.zero_grad()
    _step(ranks, model, stepping, batches[3])
    return moved, text


def test_settings_that_make_it_another_optimizer_are_tried_when_they_come(world):
    for moved, text in world(3).run(_changed_later, "2"):
        assert not moved
        assert "Lamb cannot work on shards" in text
    assert all(moved and not text for moved, text in world(3).run(_changed_later, "0"))


def _added(ranks: Any, decay: float) -> str:
    from shardwise.errors import OptimizerError

    model = net()
    model.head.requires_grad_(False)
    _, stepping = _prepared(ranks, lambda p: Lamb(p, weight_decay=0.0), "2", model)
    groups_before = len(stepping.param_groups)
    model.head.requires_grad_(True)
    text = ""
    try:
        stepping.add_param_group({"params": list(model.head.parameters()), "weight_decay": decay})
    except OptimizerError as error:
        text = str(error)
    assert len(stepping.param_groups) == groups_before + (not text)
    if text:
        model.head.requires_grad_(False)
    _step(ranks, model, stepping, inputs(1)[0])
    return text


def test_a_group_that_is_added_is_tried_too(world):
    assert world(2).run(_added, 0.0) == ["", ""]
    assert all("in group 1" in text for text in world(2).run(_added, 0.1))


def _vectors(ranks: Any, kind: Any, plan: str, frozen: bool) -> str | None:
    """Only vectors are trained. frozen: matrices are in the group too, and may be thawed later."""
    model = net()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)  # without dimensions it would have no row at all
    found = _prepared(ranks, lambda p: kind(model.parameters() if frozen else p), plan, model)
    return found if isinstance(found, str) else None


def test_what_matters_is_what_the_groups_hold(world):
    pool = world(2)
    assert pool.run(_vectors, Galore, "2", False) == [None] * 2  # it leaves vectors alone
    assert all("Galore" in text for text in pool.run(_vectors, Galore, "2", True))
    assert pool.run(_vectors, RowNorm, "0", False) == [None] * 2  # a vector is its own row
    assert all("RowNorm" in text for text in pool.run(_vectors, RowNorm, "2", False))
    assert all("RowNorm" in text for text in pool.run(_vectors, RowNorm, "0", True))


class Still(Loop):
    own: ClassVar[dict[str, Any]] = {"gate": 0.0}

    def one(self, p: Tensor, grad: Tensor, group: Any, state: Any) -> None:
        p.sub_(grad, alpha=group["lr"] * group["gate"])


class HoldsModule(Lion):
    def __init__(self, params: Any, model: Any) -> None:
        super().__init__(params)
        self.model = model


class HoldsModuleInClosure(Lion):
    def __init__(self, params: Any, model: Any) -> None:
        super().__init__(params)
        self.look = lambda x: model(x) + 0


class HoldsLock(Lion):
    def __init__(self, params: Any) -> None:
        import threading

        super().__init__(params)
        self.lock = threading.Lock()


class HoldsMasters(Lion):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.masters = torch.zeros(2 << 20)


class FirstParameter(Loop):
    """Keeps a number for all with the first parameter, which a rank may not have."""

    def begin(self) -> None:
        first = self.state[self.param_groups[0]["params"][0]]
        first["n"] = first.get("n", 0) + 1

    def one(self, p: Tensor, grad: Tensor, group: Any, state: Any) -> None:
        p.sub_(grad, alpha=group["lr"])


def _why(ranks: Any, name: str) -> str | None:
    model = net()
    makes = {
        "did not move": Still,
        "HoldsModule": lambda p: HoldsModule(p, model),
        "'look'": lambda p: HoldsModuleInClosure(p, model),
        "'lock'": HoldsLock,
        "'masters'": HoldsMasters,
        "FirstParameter": FirstParameter,
        "the AdamW": lambda p: Lookahead(torch.optim.AdamW(p)),
        "closure": Sam,
    }
    found = _prepared(ranks, makes[name], "2", model)
    return found if isinstance(found, str) else None


@pytest.mark.parametrize(
    "words",
    ["did not move", "HoldsModule", "'look'", "'lock'", "'masters'", "FirstParameter", "the AdamW", "closure"],
)
def test_what_cannot_be_judged_is_refused_in_words(world, words):
    for text in world(3).run(_why, words):
        assert words in text


def _replaced(ranks: Any, how: str) -> str | None:
    def make(parameters: Any) -> Any:
        found = torch.optim.SGD(parameters, lr=1e-2)
        if how == "scheduled":
            torch.optim.lr_scheduler.StepLR(found, 1)
        elif how == "compiled":
            found.step = torch.compile(found.step, backend="eager")  # type: ignore[method-assign]
        else:
            found.step = lambda closure=None: None  # type: ignore[method-assign]
        return found

    found = _prepared(ranks, make, "2")
    return found if isinstance(found, str) else None


def test_a_step_that_was_replaced_on_the_object_is_refused(world):
    assert world(1).run(_replaced, "scheduled") == [None]
    assert world(1).run(_replaced, "compiled") == [None]
    assert "was replaced on the object" in world(1).run(_replaced, "own")[0]


class Sloppy(Loop):
    """Looks at the gradient of everything, and has a helper that a step calls."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.move(group, 1.0)

    def move(self, group: Any, share: float) -> None:
        for p in group["params"]:
            p.data.add_(p.grad.data, alpha=-group["lr"] * share)

    def parameters_in_all(self) -> int:
        return sum(1 for group in self.param_groups for _ in group["params"])


def _sloppy(ranks: Any, plan: str) -> str | None:
    return refusal(ranks, Sloppy, plan)


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_one_that_calls_its_own_methods_in_a_step_works(world, plan):
    assert world(3).run(_sloppy, plan) == [None] * 3


class Twice(Lion):
    """Calls a closure twice."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step(closure)


def _closure(ranks: Any, kind: Any) -> str:
    from shardwise.errors import OptimizerError

    model, stepping = _prepared(ranks, kind, "2")
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        stepping.zero_grad()
        loss = loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size))
        loss.backward()
        return loss

    try:
        first, second = stepping.step(closure), stepping.step(closure)
    except OptimizerError as error:
        assert not calls
        return str(error)
    assert len(calls) == 2
    assert second.item() < first.item()
    return ""


def test_a_closure_is_called_once_or_refused(world):
    assert world(2).run(_closure, Lion) == ["", ""]
    assert all("calls its closure 2 times" in text for text in world(2).run(_closure, Twice))


def _without_gradients(ranks: Any) -> None:
    """A step without any gradient counts, as in plain torch; one in the middle of an accumulation does not."""
    model = net()
    sharded, _, stepping = prepare(ranks, model, "2", optimizer=AdamWOneCounter)
    stepping.step()
    assert stepping.param_groups[0]["step"] == 1
    sharded.sync_gradients = False
    loss_of(model, inputs(1)[0]).backward()
    stepping.step()
    assert stepping.param_groups[0]["step"] == 1
    sharded.sync_gradients = True
    _step(ranks, model, stepping, inputs(1)[0])
    assert stepping.param_groups[0]["step"] == 2


def test_a_step_without_gradients_counts_as_in_torch(world):
    world(2).run(_without_gradients)


def _stepped_before(ranks: Any, kind: Any, plan: str) -> str | None:
    """States that are there before prepare are tried and taken over."""

    def make(parameters: Any) -> Any:
        held = list(parameters)
        found = kind(groups(held))
        source = torch.Generator().manual_seed(1)
        for p in held:
            p.grad = torch.randn(p.shape, generator=source)
        found.step()
        found.zero_grad()
        return found

    return refusal(ranks, kind, plan, make)


@pytest.mark.parametrize("plan", ["0", "2", "3-disk"])
@pytest.mark.parametrize("kind", [Lion, StateInConstructor])
def test_states_from_before_prepare_go_on(world, kind, plan):
    assert world(3).run(_stepped_before, kind, plan) == [None] * 3


def _in_16_bit(ranks: Any, plan: str) -> None:
    """What `eval` makes of the masters is what every rank computes with."""
    model = net()
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=ScheduleFree, precision="bf16")
    stepping.train()
    for batch in inputs(3):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    ways = []
    for verb in (stepping.eval, stepping.train):
        verb()
        with sharded.gathered():
            computing = {n: p.detach().clone() for n, p in model.named_parameters()}
        masters = sharded.whole.state_dict()
        everybody = ranks.gather_objects(computing)
        for name, value in (masters or {}).items():
            assert all(torch.equal(other[name], value.to(other[name].dtype)) for other in everybody), name
        ways.append(computing)
    assert any(not torch.equal(ways[0][name], ways[1][name]) for name in ways[0])


@pytest.mark.parametrize("plan", ["0", "1", "2", "3"])
def test_a_mode_of_its_own_reaches_every_rank_in_16_bit(world, plan):
    world(3).run(_in_16_bit, plan)


def _alone(ranks: Any) -> str:
    from shardwise.errors import OptimizerError

    model, stepping = _prepared(ranks, Sophia, "2")
    loss_of(model, inputs(1)[0]).backward()
    try:
        stepping.update_hessian(beta=0.5)  # no such argument
    except OptimizerError as error:
        return str(error)
    return ""


def test_a_method_that_fails_in_its_trial_changes_nothing(world):
    assert all("Sophia.update_hessian()" in text for text in world(2).run(_alone))


class RowHessian(Sophia):
    @torch.no_grad()
    def update_hessian(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.ndim:
                    mean = p.grad.square().mean(-1, keepdim=True).expand_as(p)
                    self.state[p]["hessian"] = mean.clone()


def _rows(ranks: Any) -> str:
    from shardwise.errors import OptimizerError

    model, stepping = _prepared(ranks, RowHessian, "2")
    _step(ranks, model, stepping, inputs(1)[0])
    try:
        stepping.update_hessian()
    except OptimizerError as error:
        return str(error)
    return ""


def test_a_method_of_its_own_is_tried_before_it_works(world):
    assert all("RowHessian.update_hessian() cannot work on shards" in text for text in world(2).run(_rows))


def _many_groups(ranks: Any) -> float:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(100)))
    began = time.perf_counter()
    rates = ({"params": [p], "lr": 1e-2 / (n + 1)} for n, p in enumerate(model.parameters()))
    prepare(ranks, model, "2", optimizer=lambda _: Lion(rates))
    return time.perf_counter() - began


def test_many_groups_are_tried_quickly(world):
    assert max(world(2).run(_many_groups)) < 20


def _double_precision(ranks: Any, plan: str) -> str | None:
    model = nn.Linear(5, 3).double()
    found = _prepared(ranks, Lion, plan, model)
    if isinstance(found, str):
        return found
    for batch in inputs(2):
        loss_of(model, batch.double()).backward()
        found[1].step()
        found[1].zero_grad()
    return None


def test_weights_of_64_bits_are_tried_in_64(world):
    assert world(2).run(_double_precision, "2") == [None, None]


class Shell:
    """An optimizer in the manner of apex: with groups, and no torch optimizer."""

    def __init__(self, inner: Any) -> None:
        self.optimizer = inner

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def _wrapped(ranks: Any, how: str) -> str:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState

    from shardwise import Accelerator
    from shardwise.errors import OptimizerError
    from shardwise.process import forget_run

    forget_run()
    model = net()
    inner = torch.optim.AdamW(model.parameters())
    try:
        accelerator = Accelerator(cpu=True)
        if how == "accelerate":
            AcceleratorState(cpu=True, _from_accelerator=True)
            outer: Any = AcceleratedOptimizer(inner)
        else:
            outer = Shell(inner)
        accelerator.prepare(model, outer)
    except OptimizerError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(True)
        forget_run()
    return ""


def test_objects_around_an_optimizer_are_refused_with_the_one_inside(world):
    text = world(1).run(_wrapped, "shell")[0]
    assert "Shell" in text
    assert ".optimizer, a AdamW" in text
    text = world(1).run(_wrapped, "accelerate")[0]
    assert "AcceleratedOptimizer" in text
    assert "AdamW" in text
