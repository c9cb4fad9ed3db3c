"""Ranks that hold or use other parts of a model than the others: they agree, and nobody waits for one that has none."""

from __future__ import annotations

import copy
import functools
import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardwise
from ranks.test_front_training import fresh
from rig.engine import as_on_a_device, largest_difference, prepare, weights_of
from shardwise.errors import CheckpointError, RankError, StoreError
from shardwise.run.local_sgd import LocalSGD

STAGES = (1, 2, 3)


class Lopsided(nn.Module):
    """A weight of six elements, of which one rank has all; an expert for each rank; and one that is frozen in the beginning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.randn(6))
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.frozen(self.experts[chosen](x * self.scale))


def batch(rank: int, number: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * rank + number))


def loss_of(model: nn.Module, rank: int, number: int = 0) -> Tensor:
    return model(batch(rank, number), rank).square().mean()


def plain_backward(model: nn.Module, world_size: int, number: int = 0, share: float = 1.0) -> None:
    for rank in range(world_size):
        (loss_of(model, rank, number) * share / world_size).backward()


# Forwards that gather nothing.


def _different_numbers_of_forwards(ranks: Any, plan: str, folder: str) -> None:
    paths = dict.fromkeys(("param", "optimizer"), folder)
    sharded, _, stepping = prepare(ranks, Lopsided(), plan, nvme_paths=paths)
    for number in range(2):
        loss_of(sharded.model, ranks.rank, number).backward()
        stepping.step()
        stepping.zero_grad()
        with torch.no_grad():
            for _ in range(ranks.rank):  # an evaluation of some ranks, as a script for DDP has it
                loss_of(sharded.model, ranks.rank)
            with sharded.generation():
                for _ in range(1 + ranks.rank):
                    loss_of(sharded.model, ranks.rank)


@pytest.mark.parametrize("plan", ["1", "2-opt", "1-disk", "2-disk"])
def test_ranks_run_different_numbers_of_forwards_that_gather_nothing(world, tmp_path, plan):
    world(3).run(_different_numbers_of_forwards, plan, str(tmp_path), timeout_s=30)


# Norms of gradients.


def _norms_around(ranks: Any, stage: int, way: str) -> None:
    """Norms of single gradients before and after a verb that touches weights of which this rank may hold nothing."""
    accelerator, model, plain = fresh(stage), Lopsided(), Lopsided()
    mine, theirs = (torch.optim.SGD(of.parameters(), lr=0.1) for of in (model, plain))
    accelerator.prepare(model, mine)
    accelerator.backward(loss_of(model, ranks.rank))
    plain_backward(plain, ranks.world_size)

    def compare() -> None:
        for (name, own), right in zip(model.named_parameters(), plain.parameters(), strict=True):
            if right.grad is not None:
                assert torch.allclose(own.grad.norm(), right.grad.norm(), rtol=1e-4), (name, way)

    compare()
    if way == "clip_norm":
        accelerator.clip_grad_norm_([model.scale], 0.01)
        nn.utils.clip_grad_norm_([plain.scale], 0.01)
    elif way == "clip_all":
        accelerator.clip_grad_norm_(model.parameters(), 0.01)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    elif way == "clip_value":
        accelerator.clip_grad_value_([model.scale], 0.001)
        nn.utils.clip_grad_value_([plain.scale], 0.001)
    elif way == "step":
        for clip, of in ((accelerator.clip_grad_norm_, model), (nn.utils.clip_grad_norm_, plain)):
            clip(of.parameters(), 0.01)
        for optimizer in (mine, theirs):
            optimizer.step()
    compare()


@pytest.mark.parametrize("way", ["clip_norm", "clip_all", "clip_value", "step"])
@pytest.mark.parametrize("stage", STAGES)
def test_norms_are_known_anew_on_every_rank(world, stage, way):
    """Of three ranks two hold nothing of what is clipped."""
    world(3).run(_norms_around, stage, way, timeout_s=30)


# Between micro-batches.


def _between_micro_batches(ranks: Any, stage: int, way: str) -> None:
    """What a script reads and drops between two micro-batches, of which each rank's reach another expert."""
    accelerator, model, plain = fresh(stage, gradient_accumulation_steps=2), Lopsided(), Lopsided()
    mine, theirs = (torch.optim.SGD(of.parameters(), lr=0.1) for of in (model, plain))
    accelerator.prepare(model, mine)
    for number in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, ranks.rank, number))
            plain_backward(plain, ranks.world_size, number, 0.5)
            if not accelerator.sync_gradients and way == "read":
                for name, own in model.named_parameters():
                    right = plain.get_parameter(name).grad
                    assert (own.grad is None) == (right is None), name
                    assert right is None or torch.allclose(own.grad.norm(), right.norm(), rtol=1e-4), name
            elif not accelerator.sync_gradients and way == "drop one":
                for of in (model, plain):
                    of.experts[1].weight.grad = of.experts[1].bias.grad = None
            elif not accelerator.sync_gradients:
                for of in (model, plain):
                    of.zero_grad()
            mine.step()
            mine.zero_grad()
        if accelerator.sync_gradients:
            theirs.step()
            theirs.zero_grad()
    with shardwise.gathered(model):
        assert largest_difference(dict(model.named_parameters()), plain) < 1e-6


WAYS = [
    *((stage, way) for stage in (2, 3) for way in ("read", "drop one", "drop all")),
    (0, "drop all"),
    (1, "drop all"),
]


@pytest.mark.parametrize(("stage", "way"), WAYS)
def test_gradients_of_a_micro_batch_are_every_ranks_where_they_are_averaged(world, stage, way):
    world(3).run(_between_micro_batches, stage, way, timeout_s=30)


# Thawing.


def backward(loss: Tensor, *, records: bool) -> None:
    """records: a graph of the backward, as for a penalty of this rank's batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph")
        loss.backward(create_graph=records)


def _thawed_beside_a_graph(ranks: Any, plan: str) -> None:
    """One rank's backward records a graph when weights are first trained."""
    model = Lopsided()
    sharded, _, stepping = prepare(
        ranks, model, plan, optimizer=lambda _: torch.optim.SGD(model.parameters(), lr=0.1), whole_adapters=False
    )
    plain = Lopsided()
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(3):
        if number == 1:
            for of in (model, plain):
                of.frozen.requires_grad_(True)
        plain_backward(plain, ranks.world_size, number)
        backward(loss_of(model, ranks.rank, number), records=number == 1 and ranks.rank == 0)
        ranks.require_same("behind the backward", {"number": number})
        for optimizer in (stepping, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), plain) < 1e-6


@pytest.mark.parametrize("plan", ["1", "3"])
def test_weights_are_thawed_together_where_one_rank_keeps_a_graph(world, plan):
    world(3).run(_thawed_beside_a_graph, plan, timeout_s=30)


def _nested_beside_a_graph(ranks: Any) -> None:
    model = Lopsided()
    sharded, _, _ = prepare(ranks, model, "3", units=["Linear"])
    backward(loss_of(model, ranks.rank), records=ranks.rank == 0)
    with sharded.gathered(), sharded.gathered([model.scale, model.experts[0].weight]):
        assert all(p.numel() for p in model.parameters())
    with sharded.generation(), sharded.gathered([model.scale]), torch.no_grad():
        loss_of(model, ranks.rank)


def test_blocks_in_blocks_gather_the_same_where_one_rank_keeps_a_graph(world):
    world(3).run(_nested_beside_a_graph, timeout_s=30)


# Parts of a forward that record nothing.


class Encoded(nn.Module):
    """A part runs without a graph, where a batch needs it; another one may be recomputed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.encoder, self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.reentrant = reentrant

    def forward(self, x: Tensor, needed: bool) -> Tensor:
        if needed:
            with torch.no_grad():
                x = self.encoder(x)
        if not self.reentrant:
            return self.head(self.body(x))
        for _ in range(2):  # in two segments: its gradients come twice
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=True)
        return self.head(x)


def _encodes_on_one_rank(ranks: Any, reentrant: bool) -> None:
    model, plain = Encoded(reentrant), Encoded(False)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    # As where collectives hold the device alone: reductions begin in the backward.
    with mock.patch.object(type(ranks), "blocking", False):
        make = functools.partial(torch.optim.SGD, lr=0.1)
        sharded, _, stepping = prepare(ranks, model, "3", optimizer=make, units=["Linear"])
        for number in range(3):
            model(batch(ranks.rank, number), ranks.rank == 0).square().mean().backward()
            ranks.require_same("behind the backward", {"number": number})
            for rank in range(ranks.world_size):
                x = batch(rank, number)
                if rank == 0:
                    x = plain.encoder(x).detach()
                for _ in range(2 if reentrant else 1):
                    x = plain.body(x)
                (plain.head(x).square().mean() / ranks.world_size).backward()
            for optimizer in (stepping, theirs):
                optimizer.step()
                optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), plain) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_ranks_agree_on_late_gradients_where_one_runs_a_part_without_a_graph(world, reentrant):
    world(2).run(_encodes_on_one_rank, reentrant, timeout_s=30)


# Drives of one rank.


def _states_meet_a_drive(ranks: Any, verb: str, folder: str) -> str:
    """The error of each rank, when reads of parts of slabs fail on one in a verb that writes states or masters."""
    from shardwise.offload.nvme import FileSlab

    model = Lopsided()
    paths = dict.fromkeys(("param", "optimizer"), folder)

    def made(_: Any) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(model.parameters(), lr=0.1)  # with states from the beginning

    def call() -> None:
        if verb == "thaw":
            model.frozen.requires_grad_(True)
            loss_of(model, ranks.rank).backward()
            stepping.step()
        else:
            shardwise.set_full(model.scale, verb, torch.ones(6))

    failing = mock.patch.object(FileSlab, "read_part", side_effect=StoreError("the drive is gone."))
    with as_on_a_device():
        _sharded, _, stepping = prepare(ranks, model, "3-disk", optimizer=made, nvme_paths=paths)
        loss_of(model, ranks.rank).backward()
        stepping.step()
        stepping.zero_grad()
        with failing if ranks.rank == 0 else nullcontext(), pytest.raises((StoreError, RankError)) as caught:
            call()
        ranks.require_same("behind the error", {"verb": verb})
    return str(caught.value)


@pytest.mark.parametrize("verb", ["thaw", "master", "sum"])
def test_a_drive_that_fails_on_one_rank_is_every_ranks_error(world, tmp_path, verb):
    for text in world(2).run(_states_meet_a_drive, verb, str(tmp_path), timeout_s=30):
        assert "the drive is gone" in text


# Ranks that train alone.


def _left_over(ranks: Any, dropped: bool) -> None:
    """A block of local SGD ends with gradients of weights that not every rank has used."""
    accelerator, model, plain = fresh(0), Lopsided(), Lopsided()
    mine, theirs = (torch.optim.SGD(of.parameters(), lr=0.1) for of in (model, plain))
    accelerator.prepare(model, mine)
    with LocalSGD(accelerator, model, local_sgd_steps=8):
        accelerator.backward(loss_of(model, ranks.rank))
        if dropped:
            model.scale.grad = None
            for expert in model.experts[1:]:
                expert.weight.grad = expert.bias.grad = None
    plain_backward(plain, ranks.world_size)
    if dropped:
        plain.scale.grad = None
        for expert in plain.experts[1:]:
            expert.weight.grad = expert.bias.grad = None
    for optimizer in (mine, theirs):
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(dict(model.named_parameters()), plain) < 1e-6


@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_that_ranks_bring_out_of_local_sgd_are_every_ranks(world, dropped):
    world(3).run(_left_over, dropped, timeout_s=30)


def _saved_apart(ranks: Any, folder: str, inside: bool) -> tuple[Any, Any]:
    """What an optimizer keeps, an average and a weight, before and after a save and a load behind local SGD, or in it."""
    accelerator, model = fresh(0), Lopsided()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    average = accelerator.ema(model, decay=0.5)

    def kept() -> Any:
        states = optimizer.state_dict()["state"]
        with average.swapped():
            averaged = [p.detach().clone() for p in model.parameters()]
        return copy.deepcopy(states), averaged, [p.detach().clone() for p in model.parameters()]

    def step(number: int) -> None:
        accelerator.backward(loss_of(model, ranks.rank, number))
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    with LocalSGD(accelerator, model, local_sgd_steps=8):
        step(0)
        step(1)
        if inside:
            before = kept()
            accelerator.save_state(folder)
    if not inside:
        before = kept()
        accelerator.save_state(folder)
    accelerator.load_state(folder)
    after = kept()
    step(2)  # it goes on
    return before, after


@pytest.mark.parametrize("inside", [False, True])
def test_a_save_of_ranks_that_have_trained_alone_keeps_the_first_ranks_states(world, tmp_path, inside):
    found = world(3).run(_saved_apart, str(tmp_path / "state"), inside, timeout_s=30)
    (states, averaged, weights), _ = found[0]
    assert sum(bool(state) for state in states.values()) < sum(1 for _ in Lopsided().parameters()) - 2
    for _, after in found:
        torch.testing.assert_close(after, (states, averaged, weights), rtol=0, atol=0)


# Buffers of one rank.


def _saves_an_odd_buffer(ranks: Any, folder: str) -> str:
    accelerator, model = fresh(1), Lopsided()
    model.register_buffer("seen", torch.ones(3))
    accelerator.prepare(model)
    if ranks.rank == 1:
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        model.seen = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointError) as caught:
        accelerator.save_state(folder)
    ranks.require_same("behind the error", {})
    return str(caught.value)


def test_a_buffer_that_cannot_be_saved_on_one_rank_is_every_ranks_error(world, tmp_path):
    for text in world(3).run(_saves_an_odd_buffer, str(tmp_path / "state"), timeout_s=30):
        assert "which a checkpoint cannot hold" in text
