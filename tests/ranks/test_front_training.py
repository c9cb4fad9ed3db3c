"""The Accelerator on real ranks: the numbers of one process of plain torch, and accelerate's semantics of each call."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shardwise import (
    Accelerator,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    find_executable_batch_size,
)
from shardwise.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    OptimizerError,
    PrepareError,
    RankError,
    ShardwiseError,
)
from shardwise.run.process import forget_run
from shardwise.zero.sharded import find_sharded


class Net(nn.Module):
    def __init__(self, seed=5):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def data(count=26):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def fresh(stage=0, offload="none", **keywords):
    forget_run()
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        offload_optimizer_device=offload if stage else "none",
        offload_param_device=offload if stage == 3 else "none",
        gradient_clipping=keywords.pop("clipping", None),
    )
    return Accelerator(cpu=True, deepspeed_plugin=plugin, **keywords)


def loss_of(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def plain(batches, steps_per_call, max_norm=None, accumulate=1):
    """Plain torch in one process on the given global batches, `accumulate` of them per step."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms, rates = [], []
    for start in range(0, len(batches), accumulate):
        part = batches[start : start + accumulate]
        for batch in part:
            (loss_of(model, batch) / accumulate).backward()
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        for _ in range(steps_per_call):
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
        optimizer.zero_grad()
    return {k: v.detach() for k, v in model.state_dict().items()}, norms, rates


def _plainest(ranks):
    accelerator = fresh(2, clipping=0.3, gradient_accumulation_steps=2)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    accelerator.prepare(model, optimizer, scheduler)
    for batch in accelerator.prepare(DataLoader(data(24), batch_size=2)):
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return accelerator.get_state_dict(model)


def test_accumulation_and_clipping_act_in_a_loop_that_knows_nothing_of_them(world):
    state = world(2).run(_plainest)[0]
    wanted, _, _ = plain([data(24)[i : i + 4] for i in range(0, 24, 4)], 2, 0.3, 2)
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def _train(ranks, stage, offload, accumulate, max_norm):
    accelerator = fresh(stage, offload, gradient_accumulation_steps=accumulate)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    plain_scheduler = scheduler.state_dict().keys()
    loader = DataLoader(data(24), batch_size=2)
    prepared = accelerator.prepare(scheduler, loader, optimizer, "a text", model)
    assert prepared[0] is scheduler
    assert prepared[2] is optimizer
    assert prepared[3:] == ("a text", model)
    loader = prepared[1]
    assert type(model) is Net
    assert accelerator.unwrap_model(model) is model
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    norms, rates = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients and max_norm is not None:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), max_norm).item())
            elif not accelerator.sync_gradients:
                assert accelerator.clip_grad_norm_(model.parameters(), 1.0) is None
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rates.append(scheduler.get_last_lr()[0])
    assert scheduler.state_dict().keys() == plain_scheduler
    assert not accelerator.optimizer_step_was_skipped
    return accelerator.get_state_dict(model), norms, rates


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "cpu"), (2, "none"), (3, "none"), (3, "cpu")])
@pytest.mark.parametrize(("accumulate", "max_norm"), [(1, None), (2, 0.3)])
def test_training_has_the_numbers_of_one_process(world, n, stage, offload, accumulate, max_norm):
    state, norms, rates = world(n).run(_train, stage, offload, accumulate, max_norm)[0]
    rows = [data(24)[i : i + 2 * n] for i in range(0, 24, 2 * n)]
    wanted, wanted_norms, wanted_rates = plain(rows, n, max_norm, accumulate)
    assert rates == pytest.approx(wanted_rates)
    assert norms == pytest.approx(wanted_norms, rel=1e-5)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def _steps(ranks, **settings):
    config = DataLoaderConfiguration(split_batches=settings.pop("split", False))
    accelerator = fresh(2, dataloader_config=config, **settings)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, scheduler, DataLoader(data(10), batch_size=2)
    )
    syncs, weights = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            syncs.append(accelerator.sync_gradients)
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        weights.append(accelerator.get_state_dict(model))
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]
    return syncs, scheduler.last_epoch, scheduler._step_count, moved


def test_the_last_batch_of_a_loader_ends_a_step(world):
    syncs, epochs, _, moved = world(2).run(_steps, gradient_accumulation_steps=2)[0]
    assert syncs == [False, True, True]  # 3 batches per rank
    assert epochs == 4
    assert moved == [True, True]
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False, adjust_scheduler=False)
    syncs, epochs, count, moved = world(2).run(_steps, gradient_accumulation_plugin=plugin)[0]
    assert syncs == [False, True, False]
    assert (epochs, count) == (2, 3)
    assert moved == [True, False]


def test_a_scheduler_steps_once_per_process_unless_batches_are_split(world):
    assert world(2).run(_steps)[0][1] == 6
    assert world(2).run(_steps, split=True)[0][1] == 5
    assert world(2).run(_steps, step_scheduler_with_optimizer=False)[0][1] == 3
    assert world(1).run(_steps)[0][1] == 5


def _overflow(ranks):
    accelerator = fresh(1, mixed_precision="fp16")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    accelerator.prepare(model, optimizer, scheduler)
    seen = []
    for factor in (1e6, 1e-3):
        accelerator.backward(model(torch.ones(2, 6)).float().mean() * factor)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.last_epoch))
    return seen


def test_a_skipped_step_does_not_step_the_scheduler(world):
    logging.disable(logging.WARNING)
    assert world(2).run(_overflow)[0] == [(True, 0), (False, 2)]
    logging.disable(logging.NOTSET)


def _two_models_and_a_late_optimizer(ranks):
    accelerator = fresh(3)
    teacher, student = Net(9).requires_grad_(False), Net()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    accelerator.prepare(student, teacher)
    optimizer = accelerator.prepare(torch.optim.SGD(student.parameters(), lr=0.1))
    x = torch.ones(2, 6) * (1 + accelerator.process_index)
    losses = []
    for _ in range(5):
        with torch.no_grad():
            target = teacher(x)
        loss = ((student(x) - target) ** 2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    assert losses[-1] < losses[0]
    after = accelerator.get_state_dict(teacher)
    assert bool(after) == accelerator.is_main_process
    assert all(torch.equal(after[k], before[k]) for k in after)
    assert accelerator.free_memory(student, optimizer) == [None, None]
    assert find_sharded(student) is None
    assert torch.isfinite(student(x)).all()
    accelerator.prepare(student)  # anew


def test_a_teacher_and_a_student_with_an_optimizer_prepared_later(world):
    world(2).run(_two_models_and_a_late_optimizer)


def _no_sync(ranks):
    accelerator = fresh(2)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator.prepare(model, optimizer)
    parts = [tuple(t[i : i + 1] for t in data(8)[:]) for i in range(ranks.rank, 8, ranks.world_size)]
    for number, part in enumerate(parts):
        if number < len(parts) - 1:
            with accelerator.no_sync(model):
                accelerator.backward(loss_of(model, part) / len(parts))
        else:
            accelerator.backward(loss_of(model, part) / len(parts))
    optimizer.step()
    return accelerator.get_state_dict(model)


def test_no_sync_accumulates(world):
    model = Net()
    loss_of(model, data(8)[:]).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    state = world(2).run(_no_sync)[0]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def _saved(ranks, folder):
    from safetensors.torch import load_file

    accelerator = fresh(3)
    model = Net()
    model.tied = model.head
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accelerator.prepare(model)
    accelerator.save_model(model, folder + "/whole")
    accelerator.save_model(model, folder + "/parts", max_shard_size=200)
    accelerator.save_model(model, folder + "/bin", safe_serialization=False)
    accelerator.wait_for_everyone()
    whole = load_file(folder + "/whole/model.safetensors")
    assert {k for k in before if not k.startswith("tied")} == set(whole)
    assert all(torch.equal(whole[k], before[k]) for k in whole)
    restored = torch.load(folder + "/bin/pytorch_model.bin")
    assert set(restored) == set(before)
    fails = None
    try:
        accelerator.save_model(model, folder + "/whole/model.safetensors")
    except Exception as error:
        fails = error
    assert isinstance(fails, ConfigError if accelerator.is_main_process else RankError)


def test_a_saved_model_is_whole_and_loads_anywhere(world, tmp_path):
    world(2).run(_saved, str(tmp_path))
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert not list(tmp_path.rglob("*.partial"))


def _caught(ranks, what):
    accelerator = fresh(2)
    model = Net()
    try:
        if what == "twice in one call":
            accelerator.prepare(model, model)
        elif what == "twice":
            accelerator.prepare(model)
            Accelerator(cpu=True).prepare(model)
        elif what == "one rank's twice":
            accelerator.prepare(model)
            accelerator.prepare(Net() if ranks.rank else model)
        elif what == "stranger":
            accelerator.prepare(model, torch.optim.SGD(Net().parameters(), lr=0.1))
        elif what == "no model":
            accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        elif what == "one rank's optimizer":
            other = Net() if ranks.rank == 1 else model
            accelerator.prepare(model, torch.optim.SGD(other.parameters(), lr=0.1))
        elif what == "different models":
            if ranks.rank == 1:
                model.more = nn.Linear(2, 2)
            accelerator.prepare(model)
        elif what == "different numbers":
            accelerator.prepare(*[model] * (1 + ranks.rank))
        elif what == "nan":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            accelerator.prepare(model, optimizer)
            accelerator.backward(model(torch.ones(1, 6)).mean() * (float("nan") if ranks.rank else 1.0))
            optimizer.step()
        elif what == "gather":
            accelerator.gather(torch.zeros(1 + ranks.rank))
        elif what == "lbfgs":
            accelerator.prepare(model, torch.optim.LBFGS(model.parameters()))
        elif what == "load_state":
            accelerator.load_state("nowhere")
    except Exception as error:
        return type(error), str(error)
    finally:
        accelerator.free_memory()
    return None, ""


@pytest.mark.parametrize(
    ("what", "kinds", "text"),
    [
        ("twice in one call", PrepareError, "twice"),
        ("twice", PrepareError, "prepared already"),
        ("one rank's twice", PrepareError, "the places of models that are prepared already"),
        ("stranger", OptimizerError, "belong to no prepared model"),
        ("no model", PrepareError, "before any model"),
        ("one rank's optimizer", (OptimizerError, RankError), "belong to no prepared model"),
        ("different models", PrepareError, "ranks 0 and 1"),
        ("different numbers", (PrepareError, RankError), "twice"),
        ("nan", NonFiniteError, "rank 1"),
        ("gather", DataError, "pad_across_processes"),
        ("lbfgs", OptimizerError, "LBFGS"),
        ("load_state", ShardwiseError, "no such directory"),
    ],
)
def test_a_mistake_is_the_same_error_on_every_rank(world, what, kinds, text):
    for kind, words in world(2).run(_caught, what):
        assert kind is not None
        assert issubclass(kind, kinds), (kind, words)
        assert text in words


def _facts(ranks):
    forget_run()
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == (DistributedType.NO if ranks.world_size == 1 else DistributedType.MULTI_CPU)
    assert accelerator.deepspeed_plugin is None
    assert accelerator.state.deepspeed_plugin is None
    accelerator = fresh(3)
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    assert accelerator.state.deepspeed_plugin.zero_stage == 3
    assert accelerator.deepspeed_plugin.gradient_clipping is None
    assert accelerator.is_last_process == (ranks.rank == ranks.world_size - 1)
    assert accelerator.check_trigger() is False
    if ranks.rank == ranks.world_size - 1:
        accelerator.set_trigger()
    assert accelerator.check_trigger() is True
    assert accelerator.check_trigger() is False
    with accelerator.autocast():
        assert not torch.is_autocast_enabled("cpu")
    calls = []

    @find_executable_batch_size(starting_batch_size=8, reduce_batch_size_fn=lambda size: size // 2)
    def attempt(batch_size):
        calls.append(batch_size)
        if batch_size > 2 and ranks.rank == 0:
            raise MemoryError("too large")
        return batch_size

    assert attempt() == 2
    assert calls == [8, 4, 2]

    @find_executable_batch_size(starting_batch_size=8)
    def failing(batch_size):
        if ranks.rank == 0:
            raise KeyError("mine")

    with pytest.raises(KeyError if ranks.rank == 0 else RankError, match="mine"):
        failing()


@pytest.mark.parametrize("n", [1, 2])
def test_the_run_is_told_as_it_is(world, n):
    world(n).run(_facts)
