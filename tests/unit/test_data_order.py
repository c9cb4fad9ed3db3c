"""The order and padding of shards, side by side with accelerate's own classes over a grid of sizes."""

from __future__ import annotations

import itertools

import pytest
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

from shardwise.data.order import LaterBatches, RankBatches, RankSamples, Share
from shardwise.errors import DataError

accelerate_data = pytest.importorskip("accelerate.data_loader")


class _Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class _Sized(BatchSampler):
    """Batches of given sizes, without a batch_size of its own."""

    def __init__(self, sizes, **attributes):
        self.sizes = sizes
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


GRID = list(itertools.product(range(1, 20), (1, 2, 3, 4, 6), (1, 2, 3, 4), (False, True), (False, True)))


@pytest.mark.parametrize("split", [False, True])
def test_batches_are_accelerates_for_every_size(split):
    compared = 0
    for n, size, world, drop_last, even in GRID:
        if split and size % world:
            continue
        for rank in range(world):
            inner = BatchSampler(SequentialSampler(range(n)), size, drop_last)
            ours = RankBatches(inner, world, rank, split=split, even=even)
            theirs = accelerate_data.BatchSamplerShard(inner, world, rank, split_batches=split, even_batches=even)
            case = (n, size, world, drop_last, even, rank)
            assert list(ours) == list(theirs), case
            assert len(ours) == len(theirs), case
            compared += 1
    assert compared > 1500


@pytest.mark.parametrize("sizes", [[3, 1, 2, 5, 4], [2, 2, 1], [1], [4, 4, 4, 4]])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_of_any_size_are_kept_whole(sizes, world):
    for rank in range(world):
        ours = RankBatches(_Sized(sizes), world, rank)
        theirs = accelerate_data.BatchSamplerShard(_Sized(sizes), world, rank)
        assert list(ours) == list(theirs)


def test_no_batch_is_lost_when_sizes_vary_under_a_batch_size():
    """accelerate loses whole rounds here; with or without completion every sample must be read."""
    sizes = [2, 1, 2, 2, 1, 2, 2]
    for world, even in itertools.product((1, 2, 3), (False, True)):
        seen = set()
        for rank in range(world):
            for batch in RankBatches(_Sized(sizes, batch_size=2), world, rank, even=even):
                seen |= set(batch)
        assert seen == set(range(sum(sizes)))


def test_the_last_round_says_which_samples_are_repeats():
    for n, size, world, drop_last, even in GRID:
        for split in (False, True):
            if split and size % world:
                continue
            inner = BatchSampler(SequentialSampler(range(n)), size, drop_last)
            shards = [RankBatches(inner, world, rank, split=split, even=even) for rank in range(world)]
            read = [list(shard) for shard in shards]
            assert len({shard.last_round for shard in shards}) == 1
            shares = shards[0].last_round
            if shares is None:
                assert not any(read)
                continue
            if even or drop_last:
                # Every step before the last is all real; with the last one cut, each sample is there exactly once.
                steps = list(zip(*read, strict=True))
                kept = [i for step in steps[:-1] for batch in step for i in batch]
                kept += [i for batch, share in zip(steps[-1], shares, strict=True) for i in batch[: share.real]]
                whole = n - n % size if drop_last else n
                assert sorted(kept) == sorted(set(kept))
                assert set(kept) <= set(range(whole))
                if not drop_last:
                    assert sorted(kept) == list(range(n))
                assert [len(batch) for batch in steps[-1]] == [share.rows for share in shares]
            else:
                assert all(share.rows == share.real for share in shares)


def test_samples_of_a_stream_are_accelerates_for_every_size():
    for n, size, world, drop_last, _ in GRID:
        for split in (False, True):
            if split and size % world:
                continue
            for rank in range(world):
                ours = RankSamples(_Stream(n), size, world, rank, drop_last=drop_last, split=split)
                theirs = accelerate_data.IterableDatasetShard(_Stream(n), size, drop_last, world, rank, split)
                assert list(ours) == list(theirs), (n, size, world, drop_last, split, rank)


def test_a_stream_says_which_samples_are_repeats():
    shard = RankSamples(_Stream(9), 2, 3, 0)
    assert list(shard) == [0, 1, 6, 7]
    assert shard.last_round == (Share(2, 2), Share(2, 1), Share(2, 0))


def test_split_refuses_a_batch_size_that_does_not_divide():
    with pytest.raises(DataError, match=r"batch size of 4 cannot be cut into 3"):
        RankBatches(BatchSampler(range(8), 4, False), 3, 0, split=True)
    with pytest.raises(DataError, match="cannot be cut into 3"):
        RankSamples(_Stream(8), 4, 3, 0, split=True)


def test_skipping_reads_the_rest_in_the_same_order():
    inner = RankBatches(BatchSampler(range(11), 2, False), 2, 1)
    assert list(LaterBatches(inner, 2)) == list(inner)[2:]
    assert len(LaterBatches(inner, 2)) == len(inner) - 2
    assert list(LaterBatches(inner, 99)) == []
