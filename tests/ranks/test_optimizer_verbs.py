"""Methods that an optimizer's class has beside `step`, and its closure, work on every rank or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rig.engine import inputs, loss_of, mine, prepare
from rig.optimizers import (
    AdamWOneCounter,
    Lion,
    Loop,
    ScheduleFree,
    Sophia,
)
from rig.trials import net, prepared, refusal, step


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

    model, stepping = prepared(ranks, kind, "2")
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
    step(ranks, model, stepping, inputs(1)[0])
    assert stepping.param_groups[0]["step"] == 2


def test_a_step_without_gradients_counts_as_in_torch(world):
    world(2).run(_without_gradients)


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

    model, stepping = prepared(ranks, Sophia, "2")
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

    model, stepping = prepared(ranks, RowHessian, "2")
    step(ranks, model, stepping, inputs(1)[0])
    try:
        stepping.update_hessian()
    except OptimizerError as error:
        return str(error)
    return ""


def test_a_method_of_its_own_is_tried_before_it_works(world):
    assert all("RowHessian.update_hessian() cannot work on shards" in text for text in world(2).run(_rows))


class Measures(Lion):
    """Has a look at its parameters, and says what it saw."""

    @torch.no_grad()
    def norm(self) -> float:
        return float(torch.stack([p.norm() for group in self.param_groups for p in group["params"]]).norm())

    @torch.no_grad()
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.param_groups if group["params"] is not None]


def _measured(ranks: Any) -> tuple[str, list[float]]:
    from shardwise.errors import OptimizerError

    model, stepping = prepared(ranks, Measures, "2")
    step(ranks, model, stepping, inputs(1)[0])
    try:
        stepping.norm()
    except OptimizerError as error:
        return str(error), stepping.rates()
    return "", []


def test_what_a_method_returns_is_of_the_whole_or_refused(world):
    for text, rates in world(2).run(_measured):
        assert "Measures.norm()" in text
        assert "what it returned was of this rank's own parts" in text
        assert rates == [1e-2]
