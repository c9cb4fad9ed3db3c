"""accelerate's names for loaders, samplers, optimizers and schedules: what they mean, and `isinstance` of what is prepared."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

import shardwise
from shardwise import data_loader
from shardwise.errors import ConfigError
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.run.process import forget_run
from shardwise.scheduler import AcceleratedScheduler

accelerate = pytest.importorskip("accelerate")


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


TABLE = list(itertools.product((1, 3, 8, 11, 24), (2, 4), (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(("count", "size", "drop", "split", "even"), TABLE)
def test_a_shard_of_batches_is_that_of_accelerate(count, size, drop, split, even):
    from accelerate.data_loader import BatchSamplerShard as Theirs

    for world, rank in ((1, 0), (2, 0), (2, 1)):
        made = [
            kind(BatchSampler(range(count), size, drop), world, rank, split_batches=split, even_batches=even)
            for kind in (data_loader.BatchSamplerShard, Theirs)
        ]
        assert list(made[0]) == list(made[1])
        assert len(made[0]) == len(made[1])
        assert isinstance(made[0], BatchSampler)


@pytest.mark.parametrize(("count", "size", "drop", "split", "even"), TABLE[::2])
def test_a_shard_of_a_stream_is_that_of_accelerate(count, size, drop, split, even):
    del even
    from accelerate.data_loader import IterableDatasetShard as Theirs

    for world, rank in ((1, 0), (2, 0), (2, 1)):
        made = [
            kind(Stream(count), size, drop, world, rank, split) for kind in (data_loader.IterableDatasetShard, Theirs)
        ]
        assert list(made[0]) == list(made[1])


def test_a_seedable_sampler_has_the_order_of_accelerates():
    from accelerate.data_loader import SeedableRandomSampler as Theirs

    made = [kind(range(20), data_seed=7) for kind in (data_loader.SeedableRandomSampler, Theirs)]
    for _ in range(2):
        assert list(made[0]) == list(made[1])
    made[0].set_epoch(0)
    made[1].set_epoch(0)
    assert list(made[0]) == list(made[1])


def test_what_is_skipped_is_skipped_whole():
    sampler = data_loader.SkipBatchSampler(BatchSampler(range(16), 4, False), 2)
    assert list(sampler) == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert (len(sampler), sampler.total_length) == (2, 4)
    loader = data_loader.SkipDataLoader(list(range(16)), batch_size=4, skip_batches=2)
    assert [batch.tolist() for batch in loader] == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert len(loader) == 2


def _made_by_hand(ranks):
    forget_run()
    found = {}
    for kind in (data_loader.DataLoaderShard, data_loader.DataLoaderDispatcher):
        loader = kind(list(range(16)), batch_size=4, iteration=2)
        before = loader.iteration
        ends = [(batch.tolist(), loader.end_of_dataloader) for batch in loader]
        rest = [batch.tolist() for batch in data_loader.skip_first_batches(dataloader=loader, num_batches=1)]
        found[kind.__name__] = (before, ends, rest, isinstance(loader, DataLoader), loader.iteration)
    del ranks
    return found


def test_loaders_made_by_hand_know_their_last_batch_and_their_epoch(world):
    (found,) = world(1).run(_made_by_hand)
    batches = [list(range(begin, begin + 4)) for begin in range(0, 16, 4)]
    for before, ends, rest, is_loader, after in found.values():
        assert (before, after) == (2, 4)
        assert ends == [(batch, batch is batches[-1]) for batch in batches]
        assert rest == batches[1:]
        assert is_loader


def _parts(ranks):
    forget_run()
    parts = [
        [
            batch.tolist()
            for batch in data_loader.prepare_data_loader(
                DataLoader(list(range(8)), batch_size=2), num_processes=2, process_index=index
            )
        ]
        for index in range(2)
    ]
    own = [batch.tolist() for batch in data_loader.prepare_data_loader(DataLoader(list(range(8)), batch_size=2))]
    return parts, own


@pytest.mark.parametrize("n", [1, 2])
def test_the_part_of_any_rank_can_be_read(world, n):
    for rank, (parts, own) in enumerate(world(n).run(_parts)):
        assert parts == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
        assert own == ([[0, 1], [2, 3], [4, 5], [6, 7]] if n == 1 else parts[rank])


def _prepared(ranks):
    forget_run()
    accelerator = shardwise.Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    plain = DataLoader(torch.arange(8.0).reshape(4, 2), batch_size=2, shuffle=True)
    before = isinstance(optimizer, AcceleratedOptimizer), isinstance(scheduler, AcceleratedScheduler)
    refused = None
    try:
        AcceleratedOptimizer(optimizer)
    except ConfigError as error:
        refused = str(error)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, plain, scheduler)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    scheduler.step()
    facts = {
        "before": before,
        "refused": refused,
        "optimizer": isinstance(optimizer, AcceleratedOptimizer) and optimizer.optimizer is optimizer,
        "again": AcceleratedOptimizer(optimizer) is optimizer,
        "skipped": optimizer.step_was_skipped,
        "in its state": "optimizer" in optimizer.state_dict() or "step_was_skipped" in optimizer.state_dict(),
        "scheduler": isinstance(scheduler, AcceleratedScheduler) and scheduler.scheduler is scheduler,
        "in schedule": "scheduler" in scheduler.state_dict(),
        "loader": isinstance(loader, data_loader.DataLoaderShard) and loader.base_dataloader is loader,
        "dispatcher": isinstance(loader, data_loader.DataLoaderDispatcher),
        "shard": isinstance(loader.batch_sampler, data_loader.BatchSamplerShard),
        "plain": isinstance(plain, data_loader.DataLoaderShard),
        "state": loader.gradient_state.in_dataloader,
        "sampler": isinstance(data_loader.get_sampler(loader), RandomSampler),
        "of a plain one": isinstance(data_loader.get_sampler(DataLoader([1, 2])), SequentialSampler),
    }
    del ranks
    return facts


def test_what_prepare_gives_is_of_accelerates_classes(world):
    (facts,) = world(1).run(_prepared)
    assert facts.pop("before") == (False, False)
    assert "accelerator.prepare" in facts.pop("refused")
    no = {"skipped", "in its state", "in schedule", "dispatcher", "plain", "state"}
    assert {name for name, value in facts.items() if not value} == no


def _wrapped_by_hand(ranks):
    forget_run()
    accelerator = shardwise.Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    accelerator.prepare(model, optimizer)
    same = AcceleratedScheduler(scheduler, optimizer) is scheduler
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    scheduler.step()
    return same, isinstance(scheduler, AcceleratedScheduler), scheduler.get_last_lr()


def test_a_schedule_wrapped_by_hand_steps_once_for_each_rank(world):
    for same, prepared, rate in world(2).run(_wrapped_by_hand):
        assert same
        assert prepared
        assert rate == [0.25]
