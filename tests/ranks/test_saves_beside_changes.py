"""Whatever changes an optimizer's states takes what a save has not copied of them yet before it does: not steps alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from rig.optimizers import Loop
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint import in_turn, snapshot
from shardwise.checkpoint.in_turn import CopiesInTurn
from shardwise.run.process import forget_run


class Decays(Loop):
    """Its momentum decays in every step, with a gradient or without, and by a method of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9)
                if p.grad is not None:
                    momentum.add_(p.grad)
                p.sub_(momentum, alpha=group["lr"])

    @torch.no_grad()
    def relax(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"].mul_(0.5)


class Run:
    """A model of three layers and its optimizer, behind one step."""

    def __init__(self, ranks: Any) -> None:
        forget_run()
        self.rank = ranks.rank
        self.accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
        torch.manual_seed(5)
        self.model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))
        self.optimizer = Decays([{"params": list(self.model.parameters())}])
        self.accelerator.prepare(self.model, self.optimizer)
        self.step()

    def step(self) -> None:
        self.accelerator.backward(self.model(torch.ones(2, 24)).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, folder: Path, change: Callable[[], Any]) -> None:
        """What is saved in the background, of which nothing is copied before `change`, is what a save that waits has."""
        self.accelerator.save_state(folder / "waiting")
        with no_copies() as go_on:
            self.accelerator.save_state(folder / "beside", async_=True)
            change()
            go_on.set()
            self.accelerator.finish_saving()
        name = f"rank-{self.rank:05d}.safetensors"
        assert (folder / "beside" / name).read_bytes() == (folder / "waiting" / name).read_bytes()


@contextmanager
def no_copies() -> Iterator[threading.Event]:
    """Until the event is set, the thread of a save copies nothing of an optimizer's states."""
    go_on, plain = threading.Event(), CopiesInTurn.copy

    def copy(copies: CopiesInTurn) -> None:
        assert go_on.wait(60)
        plain(copies)

    with (
        mock.patch.object(snapshot, "in_pieces", return_value=True),
        mock.patch.object(in_turn, "PIECE_NBYTES", 1000),
        mock.patch.object(CopiesInTurn, "copy", copy),
    ):
        try:
            yield go_on
        finally:
            go_on.set()


def _changed(ranks: Any, folder: str) -> None:
    run = Run(ranks)
    changes: dict[str, Callable[[], Any]] = {
        "step": run.step,
        "step without gradients": run.optimizer.step,
        "method": run.optimizer.relax,
        "loaded": lambda: run.optimizer.load_state_dict(run.optimizer.state_dict()),
        "cleared": run.optimizer.state.clear,
    }
    for name, change in changes.items():
        run.check(Path(folder, name), change)


def test_what_changes_states_has_them_copied_first(world, tmp_path):
    world(2).run(_changed, str(tmp_path))


def _interrupted(ranks: Any, folder: str) -> None:
    run = Run(ranks)

    def change() -> None:
        with mock.patch.object(CopiesInTurn, "hurry", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            run.step()
        run.step()

    run.check(Path(folder), change)


def test_a_step_behind_one_that_ctrl_c_has_met_before_the_copies_has_them_made(world, tmp_path):
    world(2).run(_interrupted, str(tmp_path))
