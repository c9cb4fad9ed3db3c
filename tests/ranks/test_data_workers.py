"""Loaders with workers, also those that outlive an epoch: the order of every epoch, and its rest after a resume, are exact."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from rig.heard import heard
from shardwise import Accelerator, DataLoaderConfiguration, skip_first_batches
from shardwise.run.process import forget_run

COUNT = 48


def mine(order):
    """A worker's share of a stream, as scripts cut it."""
    info = get_worker_info()
    return order if info is None else order[info.id :: info.num_workers]


class Drawn(IterableDataset):
    """Takes its order from a generator: its own, or one that `prepare` gives it."""

    def __init__(self, generator=None):
        self.generator = generator

    def __iter__(self):
        yield from mine(torch.randperm(COUNT, generator=self.generator).tolist())


class Told(IterableDataset):
    """Takes its order from the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(100 + self.epoch)
        yield from mine(torch.randperm(COUNT, generator=generator).tolist())


class Augmented(Dataset):
    """Gives other samples in each epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return 1000 * self.epoch + index


class Several(Augmented):
    def __getitems__(self, indices):
        return [5000 + self[index] for index in indices]


def loader_of(kind, workers, keep, context="fork"):
    settings = {"batch_size": 3, "num_workers": workers, "persistent_workers": keep and workers > 0}
    if workers:
        settings["multiprocessing_context"] = context
    if kind == "own generator":
        return DataLoader(Drawn(torch.Generator().manual_seed(8)), **settings)
    if kind == "seeded":
        return DataLoader(Drawn(), **settings)
    if kind == "set_epoch":
        return DataLoader(Told(), **settings)
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        stream = datasets.Dataset.from_dict({"x": list(range(COUNT))}).to_iterable_dataset(num_shards=4)
        return DataLoader(stream.shuffle(seed=3, buffer_size=10), **settings)
    if kind == "map, own generator":
        return DataLoader(torch.arange(COUNT), shuffle=True, generator=torch.Generator().manual_seed(8), **settings)
    if kind == "map, set_epoch":
        return DataLoader(Augmented(), shuffle=True, **settings)
    assert kind == "map, several"
    return DataLoader(Several(), shuffle=True, **settings)


STREAMS = ("seeded", "set_epoch", "own generator", "hub")
KINDS = (*STREAMS, "map, own generator", "map, set_epoch", "map, several")


def with_workers():
    # A rank of the rig is a daemon, which may not have children; a loader's workers end with their loader.
    multiprocessing.current_process()._config["daemon"] = False


def prepared(kind, workers, keep, dispatch=None, context="fork"):
    forget_run()
    torch.manual_seed(5)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    return accelerator.prepare(loader_of(kind, workers, keep, context))


def values(batch):
    return (batch["x"] if isinstance(batch, dict) else batch).tolist()


def epoch_of(loader):
    """Its batches, and what the process draws afterwards."""
    return [values(batch) for batch in loader], torch.rand(()).item()


def _resume(ranks, kind, workers, keep, dispatch, epoch, given, context="fork"):
    """Four epochs, and the rest of them by a new process that takes up after `given` batches of `epoch`."""
    with_workers()
    loader = prepared(kind, workers, keep, dispatch, context)
    epochs, saved, generator = [], None, None
    for number in range(4):
        seen = []
        if (number, 0) == (epoch, given):
            saved, generator = loader.state_dict(), torch.get_rng_state()
        for batch in loader:
            seen.append(values(batch))
            if (number, len(seen)) == (epoch, given):
                saved, generator = loader.state_dict(), torch.get_rng_state()
        epochs.append((seen, torch.rand(()).item()))
    del loader
    loader = prepared(kind, workers, keep, dispatch, context)
    loader.load_state_dict(saved)
    torch.set_rng_state(generator)
    rest = [epoch_of(loader) for _ in range(epoch, 4)]
    wanted = [(epochs[epoch][0][given:], epochs[epoch][1]), *epochs[epoch + 1 :]]
    assert rest == wanted, (kind, workers, keep, dispatch)
    if kind != "map, own generator":
        assert len({str(seen) for seen, _ in epochs}) == 4, "each epoch has an order of its own"
    return [seen for seen, _ in epochs]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_goes_on_where_it_was_saved_with_workers_that_live_on(world, kind):
    world(1).run(_resume, kind, 2, True, None, 1, 3)


@pytest.mark.parametrize("kind", ["set_epoch", "own generator", "map, own generator"])
def test_a_run_goes_on_between_two_epochs_with_workers_that_live_on(world, kind):
    world(1).run(_resume, kind, 2, True, None, 2, 0)


def test_workers_that_are_started_afresh_are_told_too(world):
    """They get everything by pickle."""
    world(1).run(_resume, "seeded", 1, True, None, 1, 3, "forkserver")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("kind", ["seeded", "own generator"])
def test_ranks_with_workers_that_live_on_go_on_together(world, kind, dispatch):
    results = world(2).run(_resume, kind, 2, True, dispatch, 1, 2)
    for epochs in zip(*results, strict=True):
        assert sorted(i for epoch in epochs for batch in epoch for i in batch) == list(range(COUNT))


@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_goes_on_where_it_was_saved(world, n, kind, workers, keep):
    for dispatch in (None, False, True) if kind in STREAMS else (None, True):
        for epoch, given in ((0, 2), (1, 0), (1, 3), (3, 1)):
            if kind == "own generator" and workers and not keep:
                continue  # its copy in a new worker always begins where this process has it
            world(n).run(_resume, kind, workers, keep, dispatch, epoch, given)


def _plain(ranks, kind, keep):
    """Three epochs of torch's own loader, told of epochs as a script does, and of the prepared one."""
    with_workers()
    torch.manual_seed(5)
    plain = loader_of(kind, 2, keep)
    expected = []
    for epoch in range(3):
        if hasattr(plain.dataset, "set_epoch"):
            plain.dataset.set_epoch(epoch)
        expected.append([values(batch) for batch in plain])
    loader = prepared(kind, 2, True)
    assert [epoch_of(loader)[0] for _ in range(3)] == expected


@pytest.mark.parametrize(
    ("kind", "keep"), [("set_epoch", False), ("hub", False), ("own generator", True), ("map, own generator", True)]
)
def test_epochs_with_workers_that_live_on_are_those_of_plain_torch(world, kind, keep):
    """keep: of torch's; there, what an epoch changes in the data set does not reach workers that live on."""
    world(1).run(_plain, kind, keep)


def _skipping(ranks, kind):
    with_workers()
    loader = prepared(kind, 2, True)
    epochs = [epoch_of(loader)[0] for _ in range(3)]
    loader = prepared(kind, 2, True)
    assert epoch_of(loader)[0] == epochs[0]
    for number, batch in enumerate(loader):
        assert values(batch) == epochs[1][number]
        if number == 3:
            break
    rest = skip_first_batches(loader, 4)
    assert [values(batch) for batch in rest] == epochs[1][4:]
    if kind != "own generator":  # the first loader's workers have drawn further by themselves
        assert epoch_of(loader)[0] == epochs[2]


@pytest.mark.parametrize("kind", ["seeded", "set_epoch", "own generator", "map, own generator", "map, set_epoch"])
def test_skipping_gives_the_rest_of_an_epoch_with_workers_that_live_on(world, kind):
    world(1).run(_skipping, kind)


class Cut(IterableDataset):
    """The data set of torch's own example, which `worker_init_fn` cuts."""

    start, end = 0, COUNT

    def __iter__(self):
        yield from range(self.start, self.end)


def cut(worker):
    info = get_worker_info()
    assert type(info.dataset) is Cut
    info.dataset.start, info.dataset.end = COUNT // 2 * worker, COUNT // 2 * (worker + 1)


def _cut(ranks, dispatch):
    with_workers()
    forget_run()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    loader = accelerator.prepare(
        DataLoader(
            Cut(),
            batch_size=3,
            num_workers=2,
            worker_init_fn=cut,
            persistent_workers=True,
            multiprocessing_context="fork",
        )
    )
    return [[i for batch in loader for i in batch.tolist()] for _ in range(2)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dispatch", [False, True])
def test_a_worker_init_fn_cuts_the_users_own_data_set(world, n, dispatch):
    for epochs in zip(*world(n).run(_cut, dispatch), strict=True):
        assert sorted(i for seen in epochs for i in seen) == list(range(COUNT))


def _other_workers(ranks):
    with_workers()
    loader = prepared("own generator", 2, True)
    for number, _ in enumerate(loader):
        if number == 2:
            state = loader.state_dict()
            break

    with heard() as logged:
        prepared("own generator", 2, True).load_state_dict(state)
        assert logged == []
        prepared("own generator", 1, True).load_state_dict(state)
        prepared("own generator", 2, True).load_state_dict({**state, "workers": None})
    return logged


def test_what_cannot_be_exact_is_said(world):
    fewer, unknown = world(1).run(_other_workers)[0]
    assert "Drawn has a generator of its own in each of 1 workers" in fewer
    assert "saved with 2: it goes on in another order" in fewer
    assert "saved without their states" in unknown


class Method(Dataset):
    """`generator` is many a thing."""

    def __len__(self):
        return 8

    def generator(self, index):
        return 10 * index

    def __getitem__(self, index):
        return self.generator(index)


class Numpys(IterableDataset):
    def __init__(self):
        import numpy

        self.generator = numpy.random.default_rng(3)

    def __iter__(self):
        yield from self.generator.permutation(8).tolist()


class Generates(IterableDataset):
    def generator(self):
        return iter(range(8))

    def __iter__(self):
        return self.generator()


def _other_generators(ranks):
    forget_run()
    accelerator = Accelerator(cpu=True)
    found = [
        sorted(i for batch in accelerator.prepare(DataLoader(data, batch_size=2)) for i in batch.tolist())
        for data in (Method(), Numpys(), Generates())
    ]
    assert found == [list(range(0, 80, 10)), list(range(8)), list(range(8))]


def test_what_is_called_generator_and_is_none_of_torchs_is_left_alone(world):
    world(1).run(_other_generators)


# What workers leave.

KILLED = """
    import os, signal, sys, time
    import torch
    from torch.utils.data import DataLoader
    from shardwise import Accelerator

    class Data(torch.utils.data.Dataset):
        def __len__(self): return 64
        def __getitem__(self, index):
            if index == 40 and sys.argv[1] == "worker":
                time.sleep(0.5)  # what came before has been sent
                os.kill(os.getpid(), signal.SIGKILL)
            return torch.zeros(1000)

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Data(), batch_size=4, num_workers=2))
    for number, batch in enumerate(loader):
        if number == 8 and sys.argv[1] == "rank":
            os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by(tmp_path: Path, launcher: list[str], who: str) -> tuple[int, str, list[str]]:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    folder = tempfile.mkdtemp(prefix="sw-")  # the path of a socket has 107 bytes, and pytest's are long
    environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), who],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    left = os.listdir(folder)
    shutil.rmtree(folder)
    return done.returncode, done.stderr, left


def test_a_killed_worker_leaves_no_directory(tmp_path):
    code, err, left = left_by(tmp_path, [], "worker")
    assert code == 1
    assert "is killed by signal" in err
    assert left == []


@pytest.mark.full
def test_a_killed_rank_leaves_no_directory_of_its_workers_under_the_launcher(tmp_path):
    start = ["-c", "from shardwise.cli.main import main; main()", "launch", "--use_cpu", "--num_processes", "1"]
    code, err, left = left_by(tmp_path, start, "rank")
    assert code == 128 + signal.SIGKILL, err
    assert left == []


def _dropped(ranks):
    """Whether the workers of a loader had ended when the last references to it and its run were gone."""
    with_workers()
    forget_run()
    gc.collect()
    gc.disable()
    try:
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = accelerator.prepare(loader_of("map, set_epoch", 2, True))
        accelerator.prepare(model, optimizer)
        for batch in loader:
            accelerator.backward(model(batch.float()[:, None]).sum())
            optimizer.step()
            optimizer.zero_grad()
        workers = [psutil.Process(worker.pid) for worker in loader._iterator._workers]
        assert len(workers) == 2
        del accelerator, loader, model, optimizer, batch
        forget_run()
        return [worker.is_running() for worker in workers]
    finally:
        gc.enable()


def test_workers_end_with_the_last_reference_to_their_run(world):
    """The collector of cycles closes their queues before it ends them, and waits 5 s for each, somewhere in the training."""
    assert world(1).run(_dropped) == [[False, False]]
