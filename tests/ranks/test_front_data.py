"""Prepared loaders on real ranks: order, the end of an epoch, exact metrics, resuming, and errors on all ranks."""

from __future__ import annotations

import multiprocessing
from collections import namedtuple

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from shardwise import Accelerator, DataLoaderConfiguration, PartialState, skip_first_batches
from shardwise.errors import DataError, RankError
from shardwise.run.process import forget_run

Pair = namedtuple("Pair", "x name")


class Stream(IterableDataset):
    def __init__(self, count, fail_at=None):
        self.count, self.fail_at = count, fail_at

    def __iter__(self):
        for index in range(self.count):
            if index == self.fail_at:
                raise OSError("disk gone")
            yield index


class Named(Dataset):
    def __init__(self, count):
        self.count = count
        self.read = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": torch.tensor([index, index]), "name": f"n{index}"}


def fresh(**settings):
    forget_run()
    config = DataLoaderConfiguration(**settings)
    return Accelerator(cpu=True, dataloader_config=config)


def values(loader):
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch[0].tolist() for batch in loader]


def _metrics(ranks, count, size, kind, drop_last, workers):
    # A rank of the rig is a daemon, which may not have children; a loader's workers end with their loader.
    multiprocessing.current_process()._config["daemon"] = False
    split = kind == "split"
    settings = {
        "plain": {},
        "split": {"split_batches": True},
        "shard": {"dispatch_batches": False},
        "dispatch": {"dispatch_batches": True},
        "dispatch_split": {"dispatch_batches": True, "split_batches": True},
        "stream": {},
        "uneven": {"even_batches": False},
    }[kind]
    if split or kind == "dispatch_split":
        size *= ranks.world_size
    accelerator = fresh(**settings)
    data = Stream(count) if kind in ("shard", "stream") else torch.arange(count)
    loader = accelerator.prepare(DataLoader(data, batch_size=size, drop_last=drop_last, num_workers=workers))
    assert isinstance(loader, DataLoader)
    seen, objects, rows, ends = [], [], [], []
    for batch in loader:
        ends.append(accelerator.gradient_state.end_of_dataloader)
        seen.append(accelerator.gather_for_metrics(batch))
        rows.append(accelerator.gather_for_metrics({"twice": (batch.repeat_interleave(2),)})["twice"][0])
        objects += accelerator.gather_for_metrics([f"s{i}" for i in batch.tolist()])
    assert ends == [False] * (len(ends) - 1) + [True] * bool(ends)
    assert not accelerator.gradient_state.in_dataloader
    seen = torch.cat(seen).tolist() if seen else []
    assert torch.cat(rows).tolist() == [i for i in seen for _ in range(2)] if rows else not seen
    assert objects == [f"s{i}" for i in seen]
    if hasattr(data, "__len__"):
        assert len(ends) == len(loader)
    return seen


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "split", "shard", "dispatch", "dispatch_split", "stream"])
def test_metrics_see_every_sample_exactly_once(world, n, kind):
    for count, size in ((1, 2), (2, 1), (7, 2), (12, 2), (13, 2), (11, 4)):
        for seen in world(n).run(_metrics, count, size, kind, False, 0):
            assert seen == list(range(count)), (count, size)


def test_metrics_are_exact_with_workers_and_with_drop_last(world):
    for kind in ("plain", "dispatch"):
        for seen in world(2).run(_metrics, 7, 2, kind, False, 1):
            assert seen == list(range(7))
    for kind in ("plain", "split", "shard", "dispatch"):
        for seen in world(2).run(_metrics, 7, 2, kind, True, 0):
            assert seen == list(range(4)), kind


def _same_as_accelerate(ranks, count, size, drop_last, dispatch, split):
    from accelerate.data_loader import prepare_data_loader as theirs
    from accelerate.state import PartialState as TheirState

    TheirState(cpu=True)
    for data in (torch.arange(count), Stream(count)):
        ours = fresh(dispatch_batches=dispatch, split_batches=split)
        mine = values(ours.prepare(DataLoader(data, batch_size=size, drop_last=drop_last)))
        loader = theirs(
            DataLoader(data, batch_size=size, drop_last=drop_last),
            ranks.device,
            put_on_device=True,
            dispatch_batches=dispatch,
            split_batches=split,
        )
        assert mine == values(loader), (count, size, drop_last, dispatch, split, type(data))


@pytest.mark.filterwarnings("ignore")
def test_loaders_give_the_batches_that_accelerates_give(world):
    pytest.importorskip("accelerate")
    for dispatch in (False, True):
        for split in (False, True):
            for count, size, drop_last in ((13, 2, False), (13, 2, True), (9, 4, False), (8, 4, False)):
                world(2).run(_same_as_accelerate, count, size, drop_last, dispatch, split)


def _epochs(ranks, seedable=False):
    torch.manual_seed(100 + ranks.rank)  # the ranks must agree in spite of this
    accelerator = fresh(use_seedable_sampler=seedable, data_seed=5 if seedable else None)
    loader = accelerator.prepare(DataLoader(torch.arange(24), batch_size=2, shuffle=True))
    epochs = []
    for _ in range(3):
        epochs.append([accelerator.gather(batch).tolist() for batch in loader])
    loader.set_epoch(1)
    again = [accelerator.gather(batch).tolist() for batch in loader]
    for batch in loader:  # epoch 2, broken off: the next is epoch 3
        broken = accelerator.gather(batch).tolist()
        break
    after = [accelerator.gather(batch).tolist() for batch in loader]
    return epochs, again, broken, after


@pytest.mark.parametrize("seedable", [False, True])
def test_shuffling_differs_by_epoch_and_agrees_over_ranks(world, seedable):
    results = world(2).run(_epochs, seedable)
    assert results[0] == results[1]
    epochs, again, broken, after = results[0]
    for epoch in (*epochs, after):
        assert sorted(i for step in epoch for i in step) == list(range(24))
    assert epochs[0] != epochs[1] != epochs[2]
    assert again == epochs[1]
    assert broken == epochs[2][0]
    assert after not in epochs


def _resume(ranks, how):
    def build():
        accelerator = fresh()
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(3) if how == "generator" else None
        loader = DataLoader(torch.arange(24), batch_size=2, shuffle=True, generator=generator)
        return accelerator.prepare(loader)

    loader = build()
    values(loader)
    full, state = [], None
    for number, batch in enumerate(loader):
        full.append(batch.tolist())
        if number == 3:
            state = loader.state_dict()
    third = values(loader)
    fresh_loader = build()
    if how == "skip":
        fresh_loader.load_state_dict(state, position=False)
        rest = values(skip_first_batches(fresh_loader, 4))
    elif how == "set_epoch":
        fresh_loader.set_epoch(1)
        rest = values(skip_first_batches(fresh_loader, 4))
    elif how == "break":
        values(fresh_loader)
        for number, _ in enumerate(fresh_loader):
            if number == 3:
                break
        rest = values(skip_first_batches(fresh_loader, 4))
    else:
        fresh_loader.load_state_dict(state)
        rest = values(fresh_loader)
    assert rest == full[4:]
    assert values(fresh_loader) == third
    assert len(skip_first_batches(fresh_loader, 2)) == len(fresh_loader) - 2


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("how", ["skip", "set_epoch", "break", "state", "generator"])
def test_a_resumed_epoch_goes_on_in_the_same_order(world, n, how):
    world(n).run(_resume, how)


def _skipping(ranks):
    accelerator = fresh()
    data = Named(12)
    loader = accelerator.prepare(DataLoader(data, batch_size=1))
    rest = [batch["x"][0, 0].item() for batch in skip_first_batches(loader, 2)]
    assert rest == list(range(ranks.rank, 12, 2))[2:]
    assert data.read == rest  # nothing was read for what was skipped
    for settings in ({}, {"dispatch_batches": False}):
        stream = fresh(**settings).prepare(DataLoader(Stream(8), batch_size=2))
        everything = values(stream)
        assert values(skip_first_batches(stream, 1)) == everything[1:]
    dispatched = fresh(dispatch_batches=True).prepare(DataLoader(torch.arange(12), batch_size=2))
    assert values(skip_first_batches(dispatched, 1)) == values(dispatched)[1:]


def test_skipping_reads_nothing_of_a_map_style_data_set(world):
    world(2).run(_skipping)


def _nested(ranks):
    accelerator = fresh()
    state = accelerator.gradient_state
    train, evaluate = accelerator.prepare(
        DataLoader(torch.arange(8), batch_size=2), DataLoader(torch.arange(5), batch_size=2)
    )
    for _ in train:
        assert state.active_dataloader is train
        seen = []
        for batch in evaluate:
            assert state.active_dataloader is evaluate
            seen += accelerator.gather_for_metrics(batch).tolist()
        assert seen == list(range(5))
        for _ in evaluate:
            break
        assert state.active_dataloader is train
    assert state.active_dataloader is None
    assert state.remainder == -1


def test_evaluation_inside_training_keeps_the_training_loader(world):
    world(2).run(_nested)


def _contents(ranks):
    accelerator = fresh(dispatch_batches=True)
    loader = accelerator.prepare(DataLoader(Named(7), batch_size=2))
    seen = []
    for batch in loader:
        assert isinstance(batch["name"], list)
        rows = accelerator.gather_for_metrics(batch["x"])[:, 0].tolist()
        names = accelerator.gather_for_metrics(batch["name"])
        assert names == [f"n{i}" for i in rows]
        seen += rows
    assert seen == list(range(7))

    def collate(items):
        return Pair(torch.tensor(items), tuple(str(i) for i in items))

    accelerator = fresh(dispatch_batches=True)
    for batch in accelerator.prepare(DataLoader(Stream(4), batch_size=1, collate_fn=collate)):
        assert isinstance(batch, Pair)
        assert batch.name == (str(batch.x.item()),)


def test_dispatched_batches_carry_texts_and_named_tuples(world):
    world(2).run(_contents)


class Sizes(BatchSampler):
    """Batches of these sizes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


def _own_samplers(ranks):
    accelerator = fresh()
    loader = accelerator.prepare(DataLoader(torch.arange(9), batch_sampler=Sizes([3, 1, 2, 2, 1])))
    seen = [i for batch in loader for i in accelerator.gather_for_metrics(batch).tolist()]
    assert seen == list(range(9))
    subset = torch.utils.data.SubsetRandomSampler([1, 3, 5, 7, 9])
    loader = accelerator.prepare(DataLoader(torch.arange(10), batch_size=2, sampler=subset))
    seen = [i for batch in loader for i in accelerator.gather_for_metrics(batch).tolist()]
    assert sorted(seen) == [1, 3, 5, 7, 9]
    assert loader.total_batch_size == 2 * ranks.world_size
    assert loader.total_dataset_length == 10
    whole = BatchSampler(RandomSampler(range(10)), 3, False)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(10)), sampler=whole, batch_size=None))
    seen = [i for (batch,) in loader for i in accelerator.gather_for_metrics(batch).tolist()]
    assert sorted(seen) == list(range(10))
    loader = accelerator.prepare(DataLoader(torch.arange(10).view(5, 2), batch_size=None))
    seen = [i for batch in loader for i in accelerator.gather_for_metrics(batch).tolist()]
    assert seen == list(range(10))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_samplers_of_the_users_own_are_dealt_and_counted(world, n):
    world(n).run(_own_samplers)


def _refused(ranks, what):
    accelerator = fresh(split_batches=what == "split")
    if what == "empty":
        accelerator.prepare(DataLoader([], batch_size=2))
    elif what == "empty on one":
        accelerator.prepare(DataLoader(torch.arange(5 * ranks.rank), batch_size=2))
    elif what == "lengths":
        accelerator.prepare(DataLoader(torch.arange(6 + ranks.rank), batch_size=2))
    elif what == "empty stream":
        list(accelerator.prepare(DataLoader(Stream(0), batch_size=2)))
    elif what == "split":
        accelerator.prepare(DataLoader(torch.arange(6), batch_size=3))
    elif what == "stream breaks":
        list(accelerator.prepare(DataLoader(Stream(9, fail_at=5), batch_size=1)))
    elif what == "ragged dispatch":

        def collate(items):
            return torch.zeros(1, items[0])

        list(accelerator.prepare(DataLoader(Stream(4), batch_size=1, collate_fn=collate)))


def _caught(ranks, what):
    try:
        _refused(ranks, what)
    except Exception as error:
        return type(error), str(error)
    return None, ""


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("empty", "is empty"),
        ("empty on one", "is empty"),
        ("lengths", "data set of 6 on rank 0 and 4 batches of a data set of 7 on rank 1"),
        ("empty stream", "gave no sample"),
        ("split", "cannot be cut into 2"),
        ("stream breaks", "disk gone"),
        ("ragged dispatch", "do not fit together"),
    ],
)
def test_bad_data_is_an_error_on_every_rank(world, what, text):
    for kind, words in world(2).run(_caught, what):
        assert kind is not None
        assert text in words
        assert issubclass(kind, (DataError, RankError, OSError, ValueError))


def _state_outlives(ranks):
    state = PartialState()
    return state.process_index, state.num_processes


def test_a_state_is_the_runs(world):
    assert world(2).run(_state_outlives) == [(0, 2), (1, 2)]


def _one_rank(ranks):
    return [
        values(fresh(split_batches=split).prepare(DataLoader(list(range(5)), batch_size=2))) for split in (False, True)
    ]


def test_one_rank_keeps_its_short_batch(world):
    assert world(1).run(_one_rank) == [[[[0, 1], [2, 3], [4]]] * 2]
