"""Ctrl-C, an exit or an exception of the script's own, anywhere: what comes afterwards has the numbers of plain torch.

torch calls the hooks behind a forward for an Exception only. Everything here is raised on every rank at one place, as in a
notebook or by an early exit of a script; one rank alone is the last test.
"""

from __future__ import annotations

import copy
import datetime
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ranks.test_front_training import fresh
from rig.engine import (
    PLANS,
    Tower,
    adamw,
    inputs,
    largest_difference,
    loss_of,
    mine,
    plain_step,
    prepare,
    tower,
    train_both,
    trained,
    weights_of,
)


class Stop(BaseException):
    """A script's own."""


KINDS: dict[str, type[BaseException]] = {"ctrl-c": KeyboardInterrupt, "exit": SystemExit, "own": Stop}
SOME = ["0", "2", "3", "3-all"]


@contextmanager
def raising(kind: type[BaseException], hang: Callable[[Callable[..., None]], Any]) -> Iterator[None]:
    """Inside, the hook that `hang` registers raises; the block expects it."""

    def hook(*_: Any) -> None:
        raise kind

    handle = hang(hook)
    try:
        with pytest.raises(kind):
            yield
    finally:
        handle.remove()


def _in_forward(ranks: Any, plan: str, kind: str, where: str, precision: str) -> None:
    model = tower()
    place: Any = {"block": model.blocks[1], "inner": model.blocks[2].down, "head": model.head, "model": model}[where]

    def stop(sharded: Any, stepping: Any, step: int) -> None:
        x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
        if step in (0, 3):
            with raising(KINDS[kind], place.register_forward_pre_hook):
                model(x).sum().backward()
        if step == 3:  # what comes next need not be a training step
            with raising(KINDS[kind], place.register_forward_hook), torch.no_grad():
                model(x)
            with torch.no_grad():
                assert torch.isfinite(model(x)).all()
            with raising(KINDS[kind], place.register_forward_pre_hook):
                model(x)
            with sharded.gathered():
                assert torch.isfinite(model(x)).all()

    train_both(ranks, model, plan, between=stop, precision=precision, tolerance=1e-6 if precision == "no" else 0.05)


@pytest.mark.parametrize("where", ["block", "inner", "head", "model"])
@pytest.mark.parametrize("plan", SOME)
def test_an_interrupt_in_a_forward_changes_no_number(world, plan, where):
    world(2).run(_in_forward, plan, "ctrl-c", where, "no", timeout_s=30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["0", "3"])
def test_nor_does_it_in_16_bits_or_of_another_kind(world, plan, kind):
    """After it inputs are cast again."""
    world(1).run(_in_forward, plan, kind, "inner", "bf16", timeout_s=30)
    world(2).run(_in_forward, plan, kind, "inner", "bf16", timeout_s=30)


class Catching(Tower):
    """Its own forward catches what ends a block, and goes on without it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            try:
                x = block(x)
            except Stop:
                x = x * 2
        return self.head(x)


class Leaves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise Stop


def _caught_inside(ranks: Any, plan: str) -> None:
    torch.manual_seed(5)
    model = Catching()
    model.blocks[1].register_forward_pre_hook(_leave_on_odd)
    train_both(ranks, model, plan)


def _leave_on_odd(module: Any, args: Any) -> None:
    if float(args[0].detach().sum()) > 0:
        raise Stop


@pytest.mark.parametrize("plan", SOME)
def test_a_model_may_catch_what_ends_a_block(world, plan):
    world(2).run(_caught_inside, plan, timeout_s=30)


def _hook_of_the_script_fails_first(ranks: Any, plan: str) -> None:
    """torch then calls the hook behind a forward whose hook before it was never called."""
    model = tower()

    def stop(sharded: Any, stepping: Any, step: int) -> None:
        def refuse(*_: Any) -> None:
            raise RuntimeError("mine")

        handle = model.blocks[1].register_forward_pre_hook(refuse, prepend=True)
        with pytest.raises(RuntimeError, match="mine"):
            model(mine(inputs(1)[0], ranks.rank, ranks.world_size))
        handle.remove()

    train_both(ranks, model, plan, between=stop)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_an_error_before_the_engine_has_heard_of_a_forward(world, plan):
    world(2).run(_hook_of_the_script_fails_first, plan, timeout_s=30)


def _recomputed(model: Tower, x: Tensor, reentrant: bool) -> Tensor:
    x = model.first(x)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return model.head(x)


class Recomputed(Tower):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return _recomputed(self, x, self.reentrant)


def _in_backward(ranks: Any, plan: str, then: str, where: str) -> None:
    """What a backward had brought before it was interrupted counts, parameter by parameter, as in torch."""
    torch.manual_seed(5)
    model = Recomputed() if where == "recomputation" else tower()
    reference = copy.deepcopy(model)
    plain = adamw(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan)

    def stop(of: Any, x: Tensor, share: float) -> None:
        loss = loss_of(of, x) * share
        if where == "recomputation":
            with raising(KeyboardInterrupt, of.blocks[1].up.register_forward_pre_hook):
                loss.backward()
            return
        with raising(KeyboardInterrupt, of.blocks[1].down.weight.register_hook):
            loss.backward()

    n = ranks.world_size
    for step, batch in enumerate(inputs(5)):
        if step in (0, 2):
            if where == "recomputation":  # the forward must run undisturbed
                for rank in range(n):
                    _stop_in_recomputation(reference, mine(batch, rank, n), 1 / n)
                _stop_in_recomputation(model, mine(batch, ranks.rank, n), 1.0)
            else:
                for rank in range(n):
                    stop(reference, mine(batch, rank, n), 1 / n)
                stop(model, mine(batch, ranks.rank, n), 1.0)
            if then == "step":
                plain.step()
                stepping.step()
            if then in ("step", "zero_grad"):
                plain.zero_grad()
                stepping.zero_grad()
            if then == "drop":  # before anything else has looked at gradients
                reference.zero_grad()
                model.zero_grad()
            if then == "scale":
                assert _scaled(model) == pytest.approx(_scaled(reference), rel=1e-5)
        plain_step(reference, batch, n, step, lambda m, x, *_: loss_of(m, x))
        loss_of(model, mine(batch, ranks.rank, n)).backward()
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


def _scaled(of: nn.Module) -> list[float]:
    """Halves each gradient. Its norm before, -1 where there is none."""
    found: list[float] = []
    for parameter in of.parameters():
        found.append(-1.0 if parameter.grad is None else float(parameter.grad.norm()))
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)
    return found


def _stop_in_recomputation(of: Any, x: Tensor, share: float) -> None:
    loss = loss_of(of, x) * share
    with raising(KeyboardInterrupt, of.blocks[1].up.register_forward_pre_hook):
        loss.backward()


@pytest.mark.parametrize("then", ["go on", "step", "zero_grad", "drop", "scale"])
@pytest.mark.parametrize("plan", SOME)
def test_an_interrupted_backward_leaves_what_it_had_brought(world, plan, then):
    world(1).run(_in_backward, plan, then, "hook", timeout_s=30)
    world(2).run(_in_backward, plan, then, "hook", timeout_s=30)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_so_does_an_interrupted_recomputation(world, plan):
    world(2).run(_in_backward, plan, "go on", "recomputation", timeout_s=30)


def _in_step(ranks: Any, plan: str, clipping: float | None, fused: bool) -> None:
    def made(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4, fused=fused)

    model = tower()
    reference = copy.deepcopy(model)
    plain = made(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=made, clipping=clipping)
    for step, batch in enumerate(inputs(4)):
        plain_step(reference, batch, ranks.world_size, step, lambda m, x, *_: loss_of(m, x))
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        if clipping is not None:
            nn.utils.clip_grad_norm_(reference.parameters(), clipping)
        for optimizer in (plain, stepping):
            if step in (0, 2):
                with raising(KeyboardInterrupt, optimizer.register_step_pre_hook):
                    optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "1", "3", "3-all"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_interrupted_step_can_be_taken_again(world, plan, fused):
    world(2).run(_in_step, plan, 0.05, fused, timeout_s=30)


def _in_gathered(ranks: Any, plan: str, modify: bool) -> None:
    model = tower()

    def stop(sharded: Any, stepping: Any, step: int) -> None:
        x = mine(inputs(1)[0], ranks.rank, ranks.world_size)

        def block() -> None:
            with sharded.gathered(modify=modify):
                assert torch.isfinite(model(x)).all()
                if step % 2:
                    with raising(Stop, model.blocks[1].register_forward_hook):
                        model(x)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            block()

    train_both(ranks, model, plan, between=stop)


@pytest.mark.parametrize("plan", ["0", "3", "3-all"])
@pytest.mark.parametrize("modify", [False, True])
def test_an_interrupt_inside_of_gathered(world, plan, modify):
    world(2).run(_in_gathered, plan, modify, timeout_s=30)


def _one_interrupted_in_gathered(ranks: Any) -> str:
    sharded, _, _ = prepare(ranks, tower(), "3")
    try:
        with sharded.gathered(modify=True):
            if ranks.rank == 1:
                raise KeyboardInterrupt
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_the_others_hear_of_one_that_is_interrupted_in_gathered(world):
    first, second = world(2).run(_one_interrupted_in_gathered, timeout_s=30)
    assert first == "RankError: rank 1 failed: KeyboardInterrupt"
    assert second.startswith("KeyboardInterrupt")


def _in_generation(ranks: Any, plan: str, budget: Any) -> None:
    model = tower()

    def stop(sharded: Any, stepping: Any, step: int) -> None:
        x = mine(inputs(1)[0], ranks.rank, ranks.world_size)

        def block() -> None:
            with sharded.generation(), torch.no_grad():
                model(x)
                with raising(Stop, model.blocks[step % 3].up.register_forward_hook):
                    model(x)
                model(x)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            block()

    train_both(ranks, model, plan, between=stop, generation_memory_budget=budget)


@pytest.mark.parametrize("plan", ["0", "3"])
@pytest.mark.parametrize("budget", ["auto", None])
def test_an_interrupt_while_a_model_generates(world, plan, budget):
    world(2).run(_in_generation, plan, budget, timeout_s=30)


def _kept_elsewhere(ranks: Any, plan: str) -> int:
    """The script keeps activations on its own; an interrupt takes its hooks and the engine's apart."""
    model = tower()
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    def stop(sharded: Any, stepping: Any, step: int) -> None:
        x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
        with (
            raising(KeyboardInterrupt, model.blocks[1].register_forward_hook),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, x).backward()
        stepping.zero_grad()

    train_both(ranks, model, plan, between=stop)
    before = len(held)
    assert before
    (torch.ones(3, requires_grad=True) * 2).exp().sum().backward()
    return len(held) - before


@pytest.mark.parametrize("plan", ["0", "3"])
def test_hooks_of_saved_tensors_are_taken_off(world, plan):
    assert world(2).run(_kept_elsewhere, plan, timeout_s=30) == [0, 0]


def _dropped(ranks: Any, plan: str) -> tuple[bool, bool]:
    """A forward is interrupted, and what was prepared is deleted. Whether anything packs before that, and behind it."""

    def packs() -> bool:
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None

    model = tower()
    prepared = prepare(ranks, model, plan)
    with raising(KeyboardInterrupt, model.blocks[1].register_forward_hook):
        model(mine(inputs(1)[0], ranks.rank, ranks.world_size))
    before = packs()
    del model, prepared
    gc.collect()
    return before, packs()


def test_hooks_of_a_model_that_is_gone_are_taken_off_too(world):
    assert world(2).run(_dropped, "3", timeout_s=30) == [(True, False)] * 2


def _between_batches(ranks: Any, stage: int) -> None:
    """A notebook's cell is interrupted in the middle of an epoch, and run again: the epoch begins anew, as in torch."""
    accelerator = fresh(stage, gradient_accumulation_steps=2)
    model = tower()
    reference = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference))
    data = torch.cat(inputs(1, samples=8 * ranks.world_size))
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def cell(stop_at: int | None) -> None:
        for number, batch in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
            if number == stop_at:
                raise KeyboardInterrupt

    caught: list[BaseException] = []  # as IPython keeps it, with the frames of the loop
    try:
        cell(1)
    except KeyboardInterrupt as error:
        caught.append(error)
    cell(None)
    assert not accelerator.gradient_state.in_dataloader
    every = data.view(4, ranks.world_size, 2, 5)
    for first, second in ((0, 1), (0, 1), (2, 3)):
        for number in (first, second):
            for part in every[number]:
                (loss_of(reference, part) / (2 * ranks.world_size)).backward()
        plain.step()
        plain.zero_grad()
    with accelerator_weights(model) as found:
        assert largest_difference(found, reference) <= 1e-6
    accelerator.free_memory()


@contextmanager
def accelerator_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    import shardwise

    with shardwise.gathered(model):
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_cell_that_was_interrupted_is_run_again(world, stage):
    world(2).run(_between_batches, stage, timeout_s=30)


def _one_alone(ranks: Any, where: str) -> tuple[str, float]:
    """Rank 1 is interrupted and goes; the other one is told."""
    import time

    from shardwise import Accelerator, DeepSpeedPlugin
    from shardwise.run.plugins import InitProcessGroupKwargs
    from shardwise.run.process import forget_run

    forget_run()
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=3 if where == "later" else 4))
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3), kwargs_handlers=[timeout])
    model = tower()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    x = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    if where == "later":
        for _ in range(2):
            accelerator.backward(loss_of(model, x))
            optimizer.step()
            optimizer.zero_grad()
    began = time.monotonic()
    try:
        if ranks.rank == 1:
            with raising(KeyboardInterrupt, model.blocks[1].register_forward_pre_hook):
                model(x)
            time.sleep(5)
            return "interrupted", 0.0
        accelerator.backward(loss_of(model, x))
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    finally:
        forget_run()
    return "nothing", 0.0


@pytest.mark.parametrize("where", ["at first", "later"])
def test_the_others_of_one_that_is_interrupted_end_in_a_sentence(world, where):
    (told, seconds), (other, _) = world(2).run(_one_alone, where, timeout_s=40)
    assert other == "interrupted"
    assert told.startswith("RankError: rank 1 keeps the others waiting: it "), told
    assert "test_interrupts.py" in told
    assert "rank 0 waited for the other ranks in " in told
    assert "did not come" in told
    assert seconds < 10


def test_every_plan_is_known():
    assert set(SOME) <= set(PLANS)
