"""What the worker processes of a prepared loader are told: which epoch it is, and whose data set theirs is.

A worker has a copy of the data set. One that lives longer than an epoch (persistent_workers) never sees what the main process
does to its own copy when an epoch begins. So it gets the copy in a wrapper, which reads a note in memory that both share:

    main process   epoch, seed ----------------> Note ---> worker: set_epoch(epoch), generator = f(seed + epoch)
                   where to take up an epoch -->      ---> worker: state of the data set's own generator
                   for a checkpoint <-----------      <--- worker: that state, as its iteration began and as it ended

`get_worker_info().dataset` is the user's own data set in every worker, whatever it is wrapped in: scripts cut it there.
"""

from __future__ import annotations

import multiprocessing.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..config.machine import environment_value
from .order import RankSamples, fresh_generator

_WORD = 1 << 32
_WORKERS_WITHIN_S = 10.0
_LONGEST_SOCKET = 100  # bytes; the kernel takes 108


class Note:
    """Memory that a loader shares with its workers.

    workers: how many. own: the data set's own generator, of which each worker has a copy that runs on by itself, or None.
    read:    whether any worker was given it; where another rank reads for this one, none is.
    """

    def __init__(self, workers: int, own: torch.Generator | None) -> None:
        self.read = False
        # The iteration's number and epoch; whether there is a seed, and its two words; whether generators are moved.
        self._numbers = _shared(6, dtype=torch.int64)
        # Of each worker: the iteration that it has begun, and the state of its generator at the beginning and at the end.
        self._begun = _shared(workers, dtype=torch.int64)
        # (Memory without bytes cannot be shared.)
        size = 0 if own is None else own.get_state().numel()
        self._states = _shared(workers, 2, size, dtype=torch.uint8) if size else torch.empty(workers, 2, 0)

    # In the main process.

    def begin(self, epoch: int, seed: int | None, states: Tensor | None) -> None:
        """The coming iteration is epoch `epoch`, ordered by `seed`. states: (workers, size) where the generators begin."""
        high, low = divmod(seed or 0, _WORD)
        if states is not None:
            self._states[:, 0] = states
        number = int(self._numbers[0]) + 1
        self._numbers.copy_(torch.tensor([number, epoch, seed is not None, high, low, states is not None]))

    def states(self, *, ended: bool) -> Tensor | None:
        """(workers, size): the own generators where the last iteration began, or ended. None where that is not known.

        A worker begins with its first batch; it is waited for.
        """
        deadline = time.monotonic() + (_WORKERS_WITHIN_S if self.read else 0.0)
        while not ended and not bool((self._begun == self._numbers[0]).all()):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)
        found = self._states[:, int(ended)].clone()
        return found if bool(found.any()) else None

    # In a worker.

    @property
    def epoch(self) -> int:
        return int(self._numbers[1])

    def take_up(self, dataset: Any, worker: int) -> torch.Generator | None:
        """Put the worker's copy at the beginning of the epoch; gives its own generator, whose state counts."""
        number, epoch, seeded, high, low, moved = self._numbers.tolist()
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        part = own_dataset(dataset)
        if seeded:
            part.generator = fresh_generator(high * _WORD + low)
        generator: torch.Generator | None = part.generator if self._states.numel() else None
        if generator is not None:
            if moved:
                generator.set_state(self._states[worker, 0].clone())
            self._states[worker, 0] = generator.get_state()
        self._begun[worker] = number
        return generator

    def ended(self, worker: int, generator: torch.Generator | None) -> None:
        if generator is not None:
            self._states[worker, 1] = generator.get_state()


def _shared(*shape: int, dtype: torch.dtype) -> Tensor:
    made: Any = torch.zeros(shape, dtype=dtype)
    return made.share_memory_()  # type: ignore[no-any-return]


class _Stream(IterableDataset[Any]):
    """A worker's copy of an iterable data set, which begins each iteration as the note says."""

    def __init__(self, dataset: Any, note: Note) -> None:
        self.dataset = dataset
        self._note = note

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        generator = self._note.take_up(self.dataset, worker)
        try:
            yield from self.dataset
        finally:
            self._note.ended(worker, generator)


class _Samples(Dataset[Any]):
    """A worker's copy of a map-style data set that wants to know the epoch."""

    def __init__(self, dataset: Any, note: Note) -> None:
        self.dataset = dataset
        self._note = note
        self._epoch: int | None = None

    def _keep_up(self) -> None:
        epoch = self._note.epoch
        if epoch != self._epoch:
            self.dataset.set_epoch(epoch)
            self._epoch = epoch

    def __getitem__(self, index: Any) -> Any:
        self._keep_up()
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        self._keep_up()
        several = getattr(self.dataset, "__getitems__", None)
        return several(indices) if several else [self.dataset[index] for index in indices]


def own_dataset(dataset: Any) -> Any:
    """The user's data set, inside of whatever this package has put around it."""
    while isinstance(dataset, (RankSamples, _Stream, _Samples)):
        dataset = dataset.dataset
    return dataset


def with_note(dataset: Any, note: Note) -> Any:
    """What a worker gets in place of `dataset`."""
    note.read = True
    return _Stream(dataset, note) if isinstance(dataset, IterableDataset) else _Samples(dataset, note)


class WorkerStart:
    """The `worker_init_fn` of a prepared loader: shows the user's own data set, and calls the user's function."""

    def __init__(self, function: Callable[[int], Any] | None) -> None:
        self._function = function

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None:
            object.__setattr__(info, "dataset", own_dataset(info.dataset))  # torch's object takes no other assignment
        if self._function is not None:
            self._function(worker)


def share_sockets() -> None:
    """Have the sockets by which workers hand tensors over lie in one directory, which this process removes at its end.

    Each worker would make one of its own (`pymp-...`), and one that is killed leaves it. Where a launcher has a directory for
    the run, this one lies in there, and goes with the run also where this process is killed.
    """
    run = environment_value("SHARDWISE_REPORTS") or ""
    before = tempfile.tempdir
    if os.path.isdir(run) and len(f"{run}/pymp-12345678/listener-12345678".encode()) < _LONGEST_SOCKET:
        tempfile.tempdir = run
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
