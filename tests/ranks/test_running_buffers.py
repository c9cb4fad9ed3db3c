"""Buffers that forwards change are rank 0's on every rank after a step, as under DDP; others cost nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ranks.test_front_training import fresh
from rig.engine import adamw, inputs, mine, prepare, tower, trained, weights_of
from rig.heard import heard
from shardwise.config.check import merged

SOME = ["0", "1", "2", "3", "3-all"]


class Counting(nn.Module):
    """Statistics of a script's own: one that is changed in place, one that is replaced, and none that is not used in turn."""

    moving: Tensor
    count: Tensor
    still: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving", torch.zeros(12))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("still", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.moving = 0.9 * self.moving + 0.1 * x.mean(0)
                self.count += 1
        return x - self.moving


class Normed(nn.Module):
    """A block with statistics of torch's and of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12, bias=False)  # of one before a norm the gradient is noise
        self.norm = nn.BatchNorm1d(12)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.up(x))
        return x + self.instance(x.view(-1, 4, 3)).view(-1, 12)


class Net(nn.Module):
    def __init__(self, *, counting: bool = False, recomputes: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.blocks = nn.ModuleList(Normed() for _ in range(2))
        self.counting = Counting() if counting else nn.Identity()
        self.head = nn.Linear(12, 3)
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.head(self.counting(x))


def net(**kind: bool) -> Net:
    torch.manual_seed(4)
    return Net(**kind)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _as_under_ddp(ranks: Any, plan: str, counting: bool, recomputes: bool, accumulate: int) -> None:
    """The same script under torch's DDP, buffer by buffer on every rank; in the middle it evaluates."""
    model = net(counting=counting, recomputes=recomputes)
    reference: Any = copy.deepcopy(model)
    if ranks.world_size > 1:
        reference = DistributedDataParallel(reference)
    plain = adamw(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan)
    batches = inputs(4 * accumulate)
    for number, batch in enumerate(batches):
        x = mine(batch, ranks.rank, ranks.world_size)
        last = number % accumulate == accumulate - 1
        sharded.sync_gradients = last
        if ranks.world_size > 1:
            reference.require_backward_grad_sync = last
        for of in (reference, model):
            (_loss(of, x) / accumulate).backward()
        if not last:
            continue
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
        if number == accumulate - 1 or number == len(batches) - 1:
            found, expected = (_evaluated(of, x) for of in (model, reference))  # DDP sends its buffers at the first
            assert torch.allclose(found, expected, atol=1e-5)
            wanted = dict(getattr(reference, "module", reference).named_buffers())
            for name, buffer in model.named_buffers():
                if "counting" in name and ranks.world_size > 1:  # DDP loses those that are replaced
                    continue
                assert torch.allclose(buffer, wanted[name], atol=1e-5), (number, name, buffer, wanted[name])
            _agree(ranks, model)
    expected = dict(getattr(reference, "module", reference).named_parameters())
    for name, weight in weights_of(sharded).items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name


def _agree(ranks: Any, model: nn.Module) -> None:
    for other in ranks.gather_objects([buffer.tolist() for buffer in model.buffers()]):
        assert other == [buffer.tolist() for buffer in model.buffers()]


def _evaluated(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(x)
    model.train()
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "recomputed by the script"])
@pytest.mark.parametrize("plan", SOME)
def test_buffers_are_those_of_ddp(world, plan, recomputes):
    """Where the script itself recomputes, statistics move on twice, as torch's do."""
    world(1).run(_as_under_ddp, plan, False, recomputes, 1, timeout_s=30)
    world(2).run(_as_under_ddp, plan, False, recomputes, 1, timeout_s=30)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_buffers_are_those_of_ddp_with_accumulation(world, plan):
    world(2).run(_as_under_ddp, plan, False, False, 2, timeout_s=30)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_statistics_of_a_script_of_its_own(world, plan):
    world(1).run(_as_under_ddp, plan, True, False, 1, timeout_s=30)


def _own_agree(ranks: Any, plan: str) -> None:
    model = net(counting=True)
    _, _, stepping = prepare(ranks, model, plan)
    for batch in inputs(3):
        _loss(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        _agree(ranks, model)
        stepping.step()
        stepping.zero_grad()
    assert int(model.counting.count) == 3  # type: ignore[arg-type, union-attr]
    if ranks.rank == 0 and plan == "0":  # which evaluates alone: no message is due
        _evaluated(model, inputs(1)[0])


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_replaced_buffers_agree_too(world, plan):
    world(2).run(_own_agree, plan, timeout_s=30)


def _messages(ranks: Any, kind: str) -> list[int]:
    """Broadcasts in each of five steps."""
    model: nn.Module = tower() if kind == "still" else net()
    if kind == "still":
        model.register_buffer("inverse", torch.ones(4))
    _, _, stepping = prepare(ranks, model, "2")
    found = []
    for batch in inputs(5):
        before = ranks.counts["broadcast"]
        _loss(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
        found.append(ranks.counts["broadcast"] - before)
    return found


def test_buffers_that_stay_are_never_sent(world):
    assert world(2).run(_messages, "still", timeout_s=30) == [[0] * 5] * 2
    assert world(2).run(_messages, "changing", timeout_s=30) == [[1] * 5] * 2


def _shapes_that_part(ranks: Any) -> None:
    """A buffer that grows on one rank is left alone, and hurts no other."""
    model = net(counting=True)
    _, _, stepping = prepare(ranks, model, "3")
    for step, batch in enumerate(inputs(4)):
        if step == 2 and ranks.rank == 1:
            model.counting.still = torch.full((7,), 5.0)  # type: ignore[union-attr]
        _loss(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    assert model.counting.still.tolist() == ([5.0] * 7 if ranks.rank else [1.0] * 3)  # type: ignore[union-attr]
    assert int(model.counting.count) == 4  # type: ignore[arg-type, union-attr]


def test_a_buffer_of_another_shape_is_left_to_its_rank(world):
    world(2).run(_shapes_that_part, timeout_s=30)


class Late(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.starts = False

    def forward(self, x: Tensor) -> Tensor:
        if self.starts:
            self.seen += 1
        return self.linear(x)


def _late(ranks: Any) -> list[str]:
    with heard() as said:
        model = Late()
        _, _, stepping = prepare(ranks, model, "3")
        for step, batch in enumerate(inputs(5)):
            model.starts = step > 2
            _loss(model, mine(batch, ranks.rank, ranks.world_size)).backward()
            stepping.step()
            stepping.zero_grad()
    return said


def test_what_begins_to_change_later_is_said(world):
    for said in world(2).run(_late, timeout_s=30):
        assert len(said) == 1
        assert "buffers of the model are changed by now" in said[0]


def _by_the_engine(ranks: Any, mode: str) -> None:
    """Recomputed by the engine, blocks move their statistics on once, as if nothing were recomputed."""
    accelerator = fresh(3)
    accelerator._run.config = merged(accelerator._run.config, activation_checkpointing=mode)
    model = net()
    reference = copy.deepcopy(model)
    optimizer, plain = adamw(trained(model)), adamw(trained(reference))
    accelerator.prepare(model, optimizer)
    for batch in inputs(4, samples=6):
        accelerator.backward(_loss(model, batch))
        _loss(reference, batch).backward()
        for stepping in (optimizer, plain):
            stepping.step()
            stepping.zero_grad()
    for (name, buffer), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.allclose(buffer, expected, atol=1e-5), (name, buffer, expected)
    accelerator.free_memory()


@pytest.mark.parametrize("mode", ["all", "auto"])
def test_statistics_move_on_once_where_the_engine_recomputes(world, mode):
    world(1).run(_by_the_engine, mode, timeout_s=30)
    world(2).run(_by_the_engine, mode, timeout_s=30)


def _of_other_kinds(ranks: Any) -> None:
    """A nested and a sparse buffer beside statistics: they are left alone, in a recomputation too."""
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype")
    accelerator = fresh(0)
    accelerator._run.config = merged(accelerator._run.config, activation_checkpointing="all")
    model = net()
    for block in model.blocks:
        if ranks.world_size == 1:  # which cannot be sent when a model is prepared
            block.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        block.register_buffer("sparse", torch.eye(3).to_sparse())
    optimizer = adamw(trained(model))
    accelerator.prepare(model, optimizer)
    for batch in inputs(4, samples=6):
        accelerator.backward(_loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert int(model.blocks[0].norm.num_batches_tracked) == 4
    assert torch.equal(model.blocks[0].sparse.to_dense(), torch.eye(3))
    accelerator.free_memory()


def test_buffers_of_other_kinds_are_left_alone(world):
    world(1).run(_of_other_kinds, timeout_s=30)
    world(2).run(_of_other_kinds, timeout_s=30)
