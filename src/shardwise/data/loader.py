"""The prepared DataLoader: the user's own loader, reading this rank's part.

A prepared loader is a shallow copy of the user's, of a subclass of its class, with another batch sampler (or iterable
data set) inside: collation, workers, pinning and the user's overrides are kept, and `isinstance(loader, DataLoader)`
holds. Three things are added to an iteration: batches arrive on the device, one batch is read ahead so that the last
one is known as such when it is given out, and the order of an epoch is a function of (seed, epoch):

    seed: drawn on rank 0 when the loader is prepared, the same on all ranks
    epoch: counts by itself, also after a `break`; `set_epoch(e)` overrules it
    order: the one that a generator at `seed` makes after those of the epochs before (`Course.begin_order`)

so that skipping the first n batches on resume gives the rest of the very same epoch. A sampler with a generator of the
user's keeps it: the ranks take rank 0's state at the start of an epoch, and the loader's state_dict carries it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe

from ..errors import DataError
from ..ranks.batches import send_to_device
from ..ranks.ranks import Ranks
from ..run.accumulation import GradientState
from ..run.process import synchronize_rng_states
from .course import Course, can_run_on
from .giving import Giving, asked
from .order import LaterBatches, RankBatches, RankSamples, Round, refuse_empty_stream, samplers_inside, tell_epoch
from .workers import Note, WorkerStart, own_dataset, share_sockets, with_note

T = TypeVar("T")

logger = logging.getLogger("shardwise")


class PreparedLoader(DataLoader[Any]):
    """What `prepare` makes of a DataLoader; mixed in before the user's own class, by `prepare_data_loader` only."""

    _ranks: Ranks
    _course: Course
    _device: torch.device | None
    _non_blocking: bool
    _rng_types: tuple[str, ...]
    _own_generator: torch.Generator | None  # the user's, kept in step over the ranks
    _seeded: tuple[Any, ...]  # samplers and data sets whose `generator` follows (seed, epoch)
    _skip: int  # batches of an epoch that are read and dropped (iterable data sets)
    _skip_sampler: int  # batches of an epoch that the sampler leaves out
    skip_batches = 0  # batches that every epoch leaves out, wherever it is taken up
    _last: Round | None
    _resumed = False  # this is the rest of an epoch that another process began
    _is_accelerate_prepared = True
    use_stateful_dataloader = False
    dispatches = False  # whether rank 0 is to read for all; of one process it says what the script asked for
    end_of_dataloader: bool

    @property
    def total_batch_size(self) -> int | None:
        """Samples that all ranks together read at a step; None where batches have no fixed size."""
        part = self._dealer
        size = part.batch_size if part is not None else self.batch_size
        if size is None:
            return None
        split = part.split_batches if part is not None else False
        return size if split else size * (part.num_processes if part is not None else 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples of the data set over all ranks."""
        dataset: Any = self.dataset.dataset if isinstance(self.dataset, RankSamples) else self.dataset
        return len(dataset)

    @property
    def base_dataloader(self) -> PreparedLoader:
        """Itself: what accelerate wraps is here a loader of the user's own class."""
        return self

    @property
    def gradient_state(self) -> GradientState:
        return GradientState()

    @property
    def iteration(self) -> int:
        """The epoch under way, or else the next one."""
        return self._course.epoch

    @property
    def remainder(self) -> int:
        """At the last batch: its samples over all ranks that are not repeats, 0 if none is a repeat; else -1."""
        shares = self.last_round
        if shares is None:
            return -1
        real = sum(share.real for share in shares)
        return 0 if real == sum(share.rows for share in shares) else real

    @property
    def last_round(self) -> Round | None:
        """At the last batch, every rank's share of it; None before, and where it cannot be known."""
        return self._last if self.end_of_dataloader else None

    @property
    def _dealer(self) -> RankBatches | RankSamples | None:
        if isinstance(self.dataset, RankSamples):
            return self.dataset
        for part in samplers_inside(self._index_sampler):
            if isinstance(part, RankBatches):
                return part
        return None

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`: its order is what that epoch's order always is.

        Samplers and a data set with a `set_epoch` are told now, for a script that reads them, and again when it begins.
        """
        self._course.go_to(epoch)
        tell_epoch(self._index_sampler, self.dataset, epoch)

    def trains(self) -> None:
        """The batch that was given out last goes into a gradient."""
        self._course.trained = True

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch and the batches given out in it so far (not those read ahead)."""
        course = self._course
        state: dict[str, Any] = {"seed": course.seed, "epoch": course.epoch, "batches": 0, "trained": course.trained}
        if course.begun is not None:
            state["batches"] = course.given
        if course.runs_on:
            state["runs_on"] = True
        if self._own_generator is not None:
            begun = course.begun is not None and course.generator_state is not None
            state["generator"] = course.generator_state if begun else self._own_generator.get_state()
        if self._keeps_workers:
            state["staffed"] = course.staffed if course.begun is not None else course.made
            state["workers"] = self._states_of_workers(ended=course.begun is None)
        return state

    def load_state_dict(self, state: dict[str, Any], *, position: bool = True) -> None:
        """Take the order of `state`, so that the next iteration is its epoch.

        position: also begin after the batches that were given out; False leaves that to `skip_first_batches`.
        Raises DataError if the loader that saved it made its order in another way, or is no prepared one.
        """
        if "seed" not in state:
            raise DataError(f"load_state_dict: this state is not a prepared loader's; it has {sorted(state)[:3]}.")
        if (state["seed"] is None) != (self._course.seed is None) or ("generator" in state) != (
            self._own_generator is not None
        ):
            raise DataError(
                "load_state_dict: this loader's sampler has a generator of its own and the saved one's has "
                "not, or the other way round. Build the loader as it was when its state was saved."
            )
        self._course.seed = state["seed"]
        # Without the word it was saved when each epoch had a seed of its own, and goes on so.
        self._course.runs_on = state.get("runs_on", False) and can_run_on(self._seeded)
        self._course.go_to(state["epoch"])
        # After that, which forgets a position in another epoch.
        self._course.resume = state["batches"] if position else 0
        self._course.restored_generator = state.get("generator")
        self._course.trained = state.get("trained", False)
        # Living workers are at another place of their own history: the next iteration makes new ones, as a new process would.
        self.__dict__["_iterator"] = self._course.note = None
        self._course.made = self._keeps_workers and state.get("staffed", state["epoch"] > 0)
        if self._runs_on_in_workers and (state["epoch"] or state["batches"]):
            self._restore_workers(state.get("workers"))

    def _start_epoch(self) -> int:
        """Put generators and epochs in step for one iteration, and say how many batches a resume leaves out."""
        course = self._course
        epoch = course.next
        if course.begun is not None and self._skip + self._skip_sampler:
            epoch = course.begun  # the rest of an epoch that was broken off
        again = epoch == course.begun
        resume, course.resume = course.resume, 0
        if self._skip + self._skip_sampler:
            resume = 0  # the script says itself what of the epoch is left
        resume = max(resume, self.skip_batches)
        own = self._own_generator
        if own is not None:
            if course.restored_generator is not None:
                own.set_state(course.restored_generator)
                course.restored_generator = None
            elif again and course.generator_state is not None:
                own.set_state(course.generator_state)
        if self._ranks.world_size > 1:
            kinds = [kind for kind in self._rng_types if kind != "generator" or own is not None]
            synchronize_rng_states(kinds, own)
        course.generator_state = None if own is None else own.get_state()
        if course.seed is not None and not self._seeds_workers:
            course.begin_order(self._seeded, epoch)
        tell_epoch(self._index_sampler, self.dataset, epoch)
        if not again:
            course.staffed = course.made
        if self._keeps_workers or self._seeds_workers:
            self._tell_workers(epoch, again)
        course.next, course.begun = epoch + 1, epoch
        course.given = self._skip + self._skip_sampler + resume
        return resume

    def __len__(self) -> int:
        return max(0, self._full_length() - self._skip - self.skip_batches)

    def _full_length(self) -> int:
        return super().__len__()

    def _entries(self, batches: int) -> int:
        """How many entries of the sampler inside make this many of the rank's batches."""
        return batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.end_of_dataloader, self._last = False, None
        resume = self._start_epoch()
        course, state = self._course, GradientState()
        giving = Giving(course, self._ranks.rank)
        source = self if resume == 0 else _without_first(self, resume)
        source._resumed = resume > 0
        state.begin(self)
        try:
            for index, (batch, last, shares) in enumerate(asked(source._read())):
                if last:
                    self.end_of_dataloader, self._last = True, shares
                if index < source._skip:
                    continue
                giving.gives()
                yield batch
            giving.ends()
        finally:
            state.end(self)

    def _inner_iterator(self) -> Iterator[Any]:
        """The user's own iteration, over this rank's samplers."""
        return super().__iter__()

    # Workers; see `data_workers`.

    @property
    def _keeps_workers(self) -> bool:
        return self.num_workers > 0 and self.persistent_workers

    @property
    def _streams(self) -> bool:
        """Whether a data set in workers makes the order by itself. A data pipe is told by torch."""
        return isinstance(self.dataset, IterableDataset) and not isinstance(self.dataset, IterDataPipe)

    @property
    def _seeds_workers(self) -> bool:
        """Whether it takes its order from a generator of ours, which workers make: torch cannot pickle one."""
        return self.num_workers > 0 and self._streams and bool(self._seeded)

    @property
    def _runs_on_in_workers(self) -> bool:
        """Whether each worker has a generator of the data set's own, which only it knows the state of."""
        return self._keeps_workers and self._streams and self._own_generator is not None

    def _states_of_workers(self, *, ended: bool) -> torch.Tensor | None:
        note = self._course.note
        return note.states(ended=ended) if note is not None and self._runs_on_in_workers else None

    def _restore_workers(self, states: torch.Tensor | None) -> None:
        known = states is not None and len(states) == self.num_workers
        self._course.restored_workers = states if known else None
        if not known and self._ranks.rank == 0:
            logger.warning(
                "The data set %s has a generator of its own in each of %d workers, which live longer than an epoch. It was "
                "saved %s: it goes on in another order. Load with as many workers, or give the data set a set_epoch.",
                type(own_dataset(self.dataset)).__name__,
                self.num_workers,
                "without their states" if states is None else f"with {len(states)}",
            )

    def _tell_workers(self, epoch: int, again: bool) -> None:
        """Have living workers, and those to come, begin epoch `epoch` as new ones would. again: it has begun before."""
        course, dataset, seeded = self._course, self.dataset, self._seeds_workers
        pipe = isinstance(dataset, (IterDataPipe, MapDataPipe))
        if pipe or not (seeded or self._runs_on_in_workers or hasattr(own_dataset(dataset), "set_epoch")):
            return
        states, course.restored_workers = course.restored_workers, None
        if course.note is None:
            course.note = Note(self.num_workers, self._own_generator if self._runs_on_in_workers else None)
        elif states is None and self._runs_on_in_workers and (again or self._iterator is None):
            states = course.note.states(ended=not again)
        seed = course.seed + epoch if seeded and course.seed is not None else None
        course.note.begin(epoch, seed, states)

    def _get_iterator(self) -> Any:
        """torch's own, over what workers are to have: see `data_workers`.

        torch draws a seed for workers. Where the run that goes on here had drawn it before what was restored, or had living
        workers and drew none, nothing is drawn here either.
        """
        course, shown = self._course, {key: self.__dict__[key] for key in ("dataset", "worker_init_fn", "generator")}
        living = self._keeps_workers and course.staffed
        state = torch.get_rng_state() if self._resumed or living else None
        if living and self.generator is not None:
            self.__dict__["generator"] = torch.Generator()
            self.generator.set_state(shown["generator"].get_state())
        if self.num_workers:
            share_sockets()
            self.__dict__["worker_init_fn"] = WorkerStart(self.worker_init_fn)
        if course.note is not None:
            self.__dict__["dataset"] = with_note(self.dataset, course.note)
        try:
            return super()._get_iterator()
        finally:
            course.made = course.made or self._keeps_workers
            self.__dict__.update(shown)
            if state is not None:
                torch.set_rng_state(state)

    def _read(self) -> Iterator[tuple[Any, bool, Round | None]]:
        """The rank's batches on its device, whether each is the last, and the last's round; one is read ahead."""
        batches = self._inner_iterator()
        try:
            current = next(batches)
        except StopIteration:
            if isinstance(self.dataset, IterableDataset):
                refuse_empty_stream(self.dataset)
            return
        while True:
            if self._device is not None:
                current = send_to_device(current, self._device, self._non_blocking)
            try:
                following = next(batches)
            except StopIteration:
                yield current, True, self._find_last_round()
                return
            yield current, False, None
            current = following

    def _find_last_round(self) -> Round | None:
        dealer = self._dealer
        if isinstance(dealer, RankSamples) and self.num_workers:
            return None  # each worker completed a last round of its own
        return None if dealer is None else dealer.last_round


_classes: dict[tuple[type, type], type] = {}


def subclass(part: type, user: type) -> type:
    """`part` mixed in before the user's loader class, made once per pair."""
    if user is DataLoader:
        return part
    if (part, user) not in _classes:
        _classes[part, user] = type(f"{part.__name__}Of{user.__name__}", (part, user), {})
    return _classes[part, user]


def copy_loader(loader: DataLoader[Any], cls: type[DataLoader[Any]]) -> Any:
    """A shallow copy as another class, without the workers."""
    result = cls.__new__(cls)
    result.__dict__.update(loader.__dict__)  # past DataLoader.__setattr__, which refuses to change a made loader
    result.__dict__["_iterator"] = None
    return result


def skip_first_batches(dataloader: T, num_batches: int = 0) -> T:
    """A loader of the rest of an epoch: without its first `num_batches`, in the very same order.

    That is the epoch that a `break` left, or else the one that would come next. It shares the epoch count with
    `dataloader`: looping over `dataloader` afterwards gives the next epoch. Of a map-style data set nothing skipped is read.
    """
    if not isinstance(dataloader, DataLoader):
        raise DataError(f"skip_first_batches takes a DataLoader, not a {type(dataloader).__name__}.")
    if num_batches < 0:
        raise DataError(f"skip_first_batches: num_batches is {num_batches}; it cannot be negative.")
    result: T = _without_first(dataloader, num_batches)
    return result


def _without_first(loader: DataLoader[Any], count: int) -> Any:
    prepared = isinstance(loader, PreparedLoader)
    if isinstance(loader.dataset, IterableDataset):
        known = prepared or isinstance(loader, _SkippingLoader)
        result = copy_loader(loader, type(loader) if known else subclass(_SkippingLoader, type(loader)))
        result._skip = (result._skip if known else 0) + count
        return result
    result = copy_loader(loader, type(loader))
    key = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    result.__dict__[key] = LaterBatches(
        result.__dict__[key], loader._entries(count) if isinstance(loader, PreparedLoader) else count
    )
    if prepared:
        result._skip_sampler += count
    return result


class _SkippingLoader(DataLoader[Any]):
    """An unprepared loader of an iterable data set whose first batches are read and dropped."""

    _skip: int

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for index, batch in enumerate(super().__iter__()):
            if index >= self._skip:
                yield batch
