"""An optimizer that torch does not know has torch's numbers on shards, or is refused before its first step, and told why."""

from __future__ import annotations

import copy
import random
import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rig.engine import inputs, largest_difference, loss_of, plain_step, prepare, weights_of
from rig.optimizers import (
    NOWHERE,
    SEVERAL,
    SHARDED,
    WHOLE,
    Blockwise,
    Iterates,
    Lamb,
    LambClips,
    Lion,
    Loop,
    Noisy,
    Prodigy,
    RowNorm,
    StateInConstructor,
)
from rig.trials import groups, net, prepared, refusal, step
from shardwise.step.optimizer import find_sharded_optimizer
from shardwise.step.trial import Trial

pytestmark = pytest.mark.thinned(3)

EVERY = SHARDED | WHOLE | SEVERAL | NOWHERE
# "2-opt" rests on the CPU, which on a CPU is in place; "3-disk" visits.
PLANS = ("0", "1", "2", "3", "2-opt", "3-disk")


def _case(name: str, plan: str) -> Any:
    """`make test` has each where ranks step whole parameters and where they step parts, and on the other plans what trains."""
    in_short = plan in ("0", "2") or name in SHARDED or (name in ("Lamb", "AdafactorLike") and plan in ("3", "3-disk"))
    return pytest.param(name, plan, marks=() if in_short else pytest.mark.full)


def _trains_or_is_refused(ranks: Any, name: str, plan: str) -> str | None:
    return refusal(ranks, EVERY[name], plan)


@pytest.mark.parametrize(("name", "plan"), [_case(name, plan) for name in EVERY for plan in PLANS])
def test_it_has_torchs_numbers_or_is_refused_by_name(world, name, plan):
    texts = world(3).run(_trains_or_is_refused, name, plan)
    on_drive = name in ("ScheduleFree", "Sophia") and plan == "3-disk"
    expected = name in NOWHERE or (name in SEVERAL and plan != "0") or on_drive
    if not expected:
        assert texts == [None] * 3
    for text in texts if expected else ():
        assert name in text
        assert "group" in text or "state" in text or "closure" in text
        assert text == texts[0]


def _warmed_up(ranks: Any, kind: Any, tensors: bool, plan: str) -> str | None:
    """A scheduler that begins at 0 was made before prepare: in the trial nothing would move."""

    def make(parameters: Any) -> Any:
        found = kind(groups(parameters, lr=torch.tensor(1e-2) if tensors else 1e-2))
        torch.optim.lr_scheduler.LambdaLR(found, lambda step: min(1.0, step / 2))
        assert all(float(group["lr"]) == 0 for group in found.param_groups)
        return found

    found = prepared(ranks, make, plan)
    if isinstance(found, str):
        return found
    assert all(float(group["lr"]) == 0 for group in found[1].param_groups)
    return None


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("kind", [Lion, Lamb, LambClips, RowNorm, Prodigy])
def test_it_is_tried_with_rates_above_zero(world, kind, tensors):
    for text in world(3).run(_warmed_up, kind, tensors, "2"):
        assert kind.__name__ in text if kind.__name__ in SEVERAL else text is None


KNOWN = {"LBFGS": torch.optim.LBFGS, "SparseAdam": torch.optim.SparseAdam}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_torchs_own_that_no_stage_can_have_are_refused_by_name(world, name, n):
    for text in world(n).run(prepared, KNOWN[name], "0"):
        assert name in text
        assert "every zero_stage" in text


class Watched(Loop):
    """Keeps things of every kind, and changes them in a step."""

    of_all = 0

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
        type(self).of_all += 1
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
        by_prepare = ("step", "zero_grad", "add_param_group", "generator", "step_was_skipped")
        kept = {k: v for k, v in vars(stepping).items() if k not in by_prepare}
        settings = [{k: v for k, v in g.items() if k != "params"} for g in kept.pop("param_groups")]
        kept = {k: v for k, v in kept.items() if not callable(v) and not k.startswith("_")}
        return repr((settings, kept)), [id(v) for g in settings for v in g.values()], [id(v) for v in kept.values()]

    def generators() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()),
            stepping.generator.get_state().tolist(),
        ]  # fmt: skip

    Watched.of_all = 0  # workers are reused
    torch.manual_seed(9)
    before, drawn = seen(), generators()
    prepare(ranks, model, "2", optimizer=lambda _: stepping)
    assert seen() == before
    assert generators() == drawn
    assert calls == []
    step(ranks, model, stepping, inputs(1)[0])
    assert Watched.of_all == 1
    assert (stepping.count, stepping.seen, float(stepping.numbers["last"])) == (1, [0, 1], 1.0)
    assert calls == ["before", "after"]
    assert stepping.chosen.__self__ is stepping


def test_a_trial_leaves_the_users_optimizer_and_random_numbers_alone(world):
    world(2).run(_left_alone)


def _noise(ranks: Any) -> str | None:
    torch.manual_seed(3)

    def make(parameters: Any) -> Any:
        return Noisy(parameters)

    found = prepared(ranks, make, "0")
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
        step(ranks, model, stepping, batch)
    assert largest_difference({n: p.detach() for n, p in model.named_parameters()}, reference) <= 1e-6
    return None


def test_one_that_draws_random_numbers_works_on_one_rank_only(world):
    assert world(1).run(_noise) == [None]
    assert all("random numbers" in text for text in world(3).run(_noise))


def _disturbed(ranks: Any, trials: int) -> str | None:
    """As if another thread of the process drew a number in each of the first `trials` rehearsals."""
    plain, left = Trial._rehearse, [0] * trials

    def rehearse(self: Trial, way: Any, verbs: Any, *args: Any) -> Any:
        found = plain(self, way, verbs, *args)
        if len(verbs) > 1 and left:
            left.pop()
            found.draws = True
        return found

    with mock.patch.object(Trial, "_rehearse", rehearse):
        found = prepared(ranks, Lion, "0")
    return found if isinstance(found, str) else None


def test_random_numbers_of_another_thread_are_not_the_optimizers(world):
    assert world(2).run(_disturbed, 3) == [None, None]
    assert all("random numbers" in text for text in world(2).run(_disturbed, 9))


def _changed_later(ranks: Any, plan: str) -> tuple[bool, str]:
    """Without weight decay this Lamb works element by element; with it, it does not."""
    from shardwise.errors import OptimizerError

    model, stepping = prepared(ranks, lambda p: Lamb(p, weight_decay=0.0), plan)
    batches = inputs(4)
    step(ranks, model, stepping, batches[0])
    stepping.param_groups[0]["lr"] = 0.5  # a schedule
    step(ranks, model, stepping, batches[1])
    stepping.param_groups[0]["weight_decay"] = 0.1
    before = [p.clone() for group in stepping.param_groups for p in group["params"]]
    text = ""
    try:
        step(ranks, model, stepping, batches[2])
    except OptimizerError as error:
        text = str(error)
    after = [p for group in stepping.param_groups for p in group["params"]]
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    stepping.param_groups[0]["weight_decay"] = 0.0
    stepping.zero_grad()
    step(ranks, model, stepping, batches[3])
    return moved, text


def test_settings_that_make_it_another_optimizer_are_tried_when_they_come(world):
    for moved, text in world(3).run(_changed_later, "2"):
        assert not moved
        assert "Lamb cannot work on shards" in text
    assert all(moved and not text for moved, text in world(3).run(_changed_later, "0"))


class Decays(Loop):
    """With weight decay it looks at all parameters."""

    def group(self, group: Any) -> None:
        size = sum(float(p.norm()) for p in group["params"] if p.grad is not None)
        self.factor = 1 - group["weight_decay"] * size

    def one(self, p: Tensor, grad: Tensor, group: Any, state: Any) -> None:
        p.mul_(self.factor).sub_(grad, alpha=group["lr"])


def _added(ranks: Any, kind: Any, decay: float) -> str:
    from shardwise.errors import OptimizerError

    model = net()
    model.head.requires_grad_(False)
    _, stepping = prepared(ranks, lambda p: kind(p, weight_decay=0.0), "2", model)
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
        stepping.param_groups[0]["beta"] = 0.9  # which is tried, without the group that was refused
    step(ranks, model, stepping, inputs(1)[0])
    return text


def test_a_group_that_is_added_is_tried_too(world):
    assert world(2).run(_added, Lamb, 0.0) == ["", ""]
    assert world(2).run(_added, Lamb, 0.1) == ["", ""]  # whole, beside a group in shards
    assert all("in group 1" in text for text in world(2).run(_added, Decays, 0.1))


class OddMatrices(Iterates):
    def one(self, p: Tensor, grad: Tensor, group: Any, state: Any) -> None:
        if p.ndim < 2:
            p.sub_(grad, alpha=group["lr"])
        else:
            super().one(p, grad, group, state)


def _vectors(ranks: Any, kind: Any, plan: str, frozen: bool) -> str | None:
    """Only vectors are trained. frozen: matrices are in the group too, and may be thawed later."""
    model = net()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)  # without dimensions it would have no row at all
    found = prepared(ranks, lambda p: kind(model.parameters() if frozen else p), plan, model)
    return found if isinstance(found, str) else None


def test_what_matters_is_what_the_groups_hold(world):
    pool = world(2)
    assert pool.run(_vectors, OddMatrices, "2", False) == [None] * 2
    assert all("OddMatrices" in text for text in pool.run(_vectors, OddMatrices, "2", True))


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
    found = prepared(ranks, Lion, plan, model)
    if isinstance(found, str):
        return found
    for batch in inputs(2):
        loss_of(model, batch.double()).backward()
        found[1].step()
        found[1].zero_grad()
    return None


def test_weights_of_64_bits_are_tried_in_64(world):
    assert world(2).run(_double_precision, "2") == [None, None]


def _large_in_the_second(ranks: Any) -> Any:
    """Moments in 8 bits are for large parameters: here only the second of two groups that are alike has one."""
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 300, bias=False))

    def make(parameters: Any) -> Any:
        return Blockwise([{"params": [p]} for p in parameters])

    found = prepared(ranks, make, "2", model)
    return found if isinstance(found, str) else find_sharded_optimizer(found[1])._trial.wholes


def test_groups_that_are_alike_are_tried_with_parameters_of_their_sizes(world):
    assert world(2).run(_large_in_the_second) == [frozenset({1})] * 2


class OwnStep(torch.optim.AdamW):
    """Derived from torch's, with a step of its own that knows nothing of fused kernels."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


def _derived(ranks: Any, plan: str) -> None:
    model = net()
    reference = copy.deepcopy(model)
    plain = OwnStep(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=OwnStep, clipping=0.05)
    for number, batch in enumerate(inputs(3)):
        plain_step(reference, batch, ranks.world_size, number, loss_of)
        assert nn.utils.clip_grad_norm_(reference.parameters(), 0.05) > 0.05
        plain.step()
        plain.zero_grad()
        step(ranks, model, stepping, batch)
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "2", "3-disk"])
def test_a_class_derived_from_torchs_is_clipped_too(world, plan):
    world(2).run(_derived, plan)
