"""A start with other flags prepares other loaders: those that trained go on where they were, others are not in the way."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rig.heard import heard
from shardwise import Accelerator
from shardwise.data.positions import match, position
from shardwise.errors import CheckpointError, RankError
from shardwise.run.process import forget_run


class Messages(TensorDataset):
    def __init__(self, count, first=0):
        super().__init__(torch.arange(first, first + count))


class Others(Messages):
    pass


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(12)


def data(name, size):
    """A loader by a short name."""
    return {
        "train": lambda: DataLoader(Messages(24), batch_size=size, shuffle=True),
        "longer": lambda: DataLoader(Messages(36), batch_size=size, shuffle=True),
        "others": lambda: DataLoader(Others(24), batch_size=size, shuffle=True),
        "eval": lambda: DataLoader(Messages(8), batch_size=size),
        "test": lambda: DataLoader(Messages(10), batch_size=size),
        "shuffled test": lambda: DataLoader(Messages(10), batch_size=size, shuffle=True),
        "own": lambda: DataLoader(Messages(24), batch_size=size, shuffle=True, generator=torch.Generator()),
        "stream": lambda: DataLoader(Stream(), batch_size=size),
    }[name]()


def prepared(names, size=2):
    forget_run()
    accelerator = Accelerator(cpu=True)
    loaders = [accelerator.prepare(data(name, size)) for name in names]
    return accelerator, dict(zip(names, loaders, strict=True))


def words(action):
    """What was logged meanwhile."""
    with heard() as found:
        action()
    return found


def _other_flags(ranks, folder, first, later, trained):
    """Save in the middle of the second epoch, with a backward; load with other loaders. What is left, and what was said."""
    accelerator, loaders = prepared(first)
    model = torch.nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    order = []
    for epoch in range(2):
        for name, loader in loaders.items():
            if name == trained:
                continue
            for _ in loader:
                pass
        for number, (batch,) in enumerate(loaders[trained]):
            accelerator.backward(model(batch[:, None].float()).sum())
            optimizer.step()
            optimizer.zero_grad()
            if epoch == 1:
                order.append(batch.tolist())
                if number == 2:
                    accelerator.save_state(folder)
    accelerator, loaders = prepared(later)
    model = torch.nn.Linear(1, 1)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    error = None

    def load():
        nonlocal error
        try:
            accelerator.load_state(folder)
        except (CheckpointError, RankError) as caught:
            error = f"{type(caught).__name__}: {caught}"

    said = words(load)
    rest = [batch.tolist() for (batch,) in loaders[trained]] if trained in loaders and error is None else None
    return rest == order[3:], said, error


@pytest.mark.parametrize("n", [1, 2])
def test_a_loader_that_trained_nothing_may_be_missing_and_is_named(world, tmp_path, n):
    for first, later in (
        (["train", "eval", "test"], ["train", "eval"]),
        (["test", "train", "eval"], ["train", "eval"]),
        (["train", "shuffled test", "eval"], ["train", "eval"]),
    ):
        results = world(n).run(_other_flags, tmp_path / "-".join(first), first, later, "train")
        assert [(good, error) for good, _, error in results] == [(True, None)] * n, (first, later)
        gone = results[0][1]
        assert len(gone) == 1, gone
        assert "a position of the loader over a Messages of 10 samples" in gone[0]
        assert "which this run has not prepared" in gone[0]
        assert all(said == [] for _, said, _ in results[1:]), "once, on rank 0"


def test_a_loader_that_is_new_begins_and_is_named(world, tmp_path):
    first, later = ["train", "eval"], ["train", "eval", "test"]
    for good, said, error in world(1).run(_other_flags, tmp_path / "a", first, later, "train"):
        assert (good, error) == (True, None)
        assert said == [
            "The checkpoint has no position of the loader over a Messages of 10 samples: it begins with its first epoch."
        ]
    for good, said, error in world(1).run(_other_flags, tmp_path / "b", first, ["others", "train", "eval"], "train"):
        assert (good, error) == (True, None)
        assert "no position of the loader over a Others of 24 samples" in said[0]


@pytest.mark.parametrize("n", [1, 2])
def test_a_loader_that_trained_may_not_be_missing(world, tmp_path, n):
    results = world(n).run(_other_flags, tmp_path / "state", ["train", "eval", "test"], ["eval", "test"], "train")
    for _, _, error in results:
        assert (
            "was saved with 3 data loader(s), but this run has prepared 2, and none of them is the loader over a "
            in error
        )
        assert "Messages of 24 samples (shuffled, 3 batches into epoch 1), which it trained with" in error


def test_as_many_loaders_as_before_are_taken_in_their_order(world, tmp_path):
    """Also over data that has grown, or is of another class now."""
    for later in (["longer", "eval"], ["others", "test"]):
        for _, said, error in world(1).run(_other_flags, tmp_path / later[0], ["train", "eval"], later, "train"):
            assert (said, error) == ([], None)


def _matching(ranks):
    _, loaders = prepared(["train", "eval", "test", "stream", "own"])
    saved = {name: {**position(loader), "trained": name == "train"} for name, loader in loaders.items()}
    saved["train"]["epoch"] = 3

    def pairs(then, now, *, old=False, world=1):
        _, mine = prepared(now)
        entries = [saved[name] for name in then]
        if old:
            entries = [{k: v for k, v in entry.items() if k not in ("data", "trained")} for entry in entries]
        names = {id(loader): name for name, loader in mine.items()}
        matched = match(entries, world, list(mine.values()), ranks.world_size)
        assert len(matched.pairs) + len(matched.left) == len(then)
        assert len(matched.pairs) + len(matched.new) == len(now)
        return [(then[entries.index(entry)], names[id(loader)]) for loader, entry in matched.pairs]

    assert pairs(["train", "eval", "test"], ["train", "test"]) == [("train", "train"), ("test", "test")]
    assert pairs(["eval", "train"], ["train"]) == [("train", "train")]
    assert pairs(["train", "stream"], ["train", "eval"]) == [("train", "train"), ("stream", "eval")], (
        "as many as before"
    )
    assert pairs(["train", "stream", "eval"], ["train", "eval"]) == [("train", "train"), ("eval", "eval")]
    assert pairs(["train", "own"], ["own", "train"]) == [("train", "train"), ("own", "own")], "equal ones in any order"
    assert pairs(["train", "own"], ["longer", "eval"]) == [("train", "longer")], (
        "an order of another kind is no candidate"
    )
    # A checkpoint from before loaders were known by their data.
    assert pairs(["train", "eval", "test"], ["train", "eval"], old=True) == [("train", "train"), ("eval", "eval")]
    assert pairs(["train", "eval"], ["train", "eval"], old=True, world=4) == [("train", "train"), ("eval", "eval")]
    with pytest.raises(CheckpointError, match=r"none of them is a loader of \d samples a step, shuffled, in epoch 3"):
        pairs(["train", "eval"], ["eval"], old=True)
    _, none = prepared([])
    assert none == {}
    assert match([saved["train"]], 1, [], ranks.world_size).pairs == [], "an evaluation needs none of them"


def test_loaders_are_known_by_their_data_and_their_order(world):
    world(1).run(_matching)
