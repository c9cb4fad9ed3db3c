"""An optimizer that nobody can judge, or drive, is refused in words that say what it does and what to give instead."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rig.optimizers import (
    Lion,
    Lookahead,
    Loop,
    Sam,
)
from rig.trials import net, prepared


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
    found = prepared(ranks, makes[name], "2", model)
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

    found = prepared(ranks, make, "2")
    return found if isinstance(found, str) else None


def test_a_step_that_was_replaced_on_the_object_is_refused(world):
    assert world(1).run(_replaced, "scheduled") == [None]
    assert world(1).run(_replaced, "compiled") == [None]
    assert "was replaced on the object" in world(1).run(_replaced, "own")[0]


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
    from accelerate.utils import TorchDynamoPlugin

    from shardwise import Accelerator
    from shardwise.errors import OptimizerError
    from shardwise.run.process import forget_run

    forget_run()
    model = net()
    inner = torch.optim.AdamW(model.parameters())
    try:
        accelerator = Accelerator(cpu=True)
        if how == "accelerate":
            AcceleratorState(cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
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
