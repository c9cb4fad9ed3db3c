"""The prepared DataLoader: the user's own loader, reading this rank's part.

A prepared loader is a shallow copy of the user's, of a subclass of its class, with another batch sampler (or iterable
data set) inside: collation, workers, pinning and the user's overrides are kept, and `isinstance(loader, DataLoader)`
holds. Three things are added to an iteration: batches arrive on the device, one batch is read ahead so that the last
one is known as such when it is given out, and the order of an epoch is a function of (seed, epoch):

    order = f(seed + epoch)     seed: drawn on rank 0 when the loader is prepared, the same on all ranks
                                epoch: counts by itself, also after a `break`; `set_epoch(e)` overrules it

so that skipping the first n batches on resume gives the rest of the very same epoch. A sampler with a generator of the
user's keeps it: the ranks take rank 0's state at the start of an epoch, and the loader's state_dict carries it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from .accumulation import GradientState
from .data_order import LaterBatches, RankBatches, RankSamples, Round, fresh_generator, samplers_inside
from .errors import DataError
from .nested import send_to_device
from .process import synchronize_rng_states
from .zero.collectives import Ranks

T = TypeVar("T")


@dataclass
class Course:
    """Where a loader is in its epochs; a loader and the ones made from it by `skip_first_batches` share one.

    seed:     the order's seed, or None where a generator of the user's makes the order.
    next:     the epoch that the next iteration will be.
    begun:    the epoch of an iteration that has begun and not ended, else None.
    given:    batches given out in the epoch `begun`, skipped ones included.
    resume:   batches to skip at the next iteration, from `load_state_dict`.
    generator_state: the user's generator as it was when the epoch `begun` started.
    """

    seed: int | None
    next: int = 0
    begun: int | None = None
    given: int = 0
    resume: int = 0
    generator_state: torch.Tensor | None = None
    restored_generator: torch.Tensor | None = field(default=None, repr=False)

    @property
    def epoch(self) -> int:
        """The epoch under way, or else the next one."""
        return self.next if self.begun is None else self.begun


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
    _last: Round | None
    _resumed = False  # this is the rest of an epoch that another process began
    _is_accelerate_prepared = True
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
        """The next iteration is epoch `epoch`: its order is what that epoch's order always is."""
        if epoch != self._course.next:
            self._course.resume = 0
        self._course.next, self._course.begun, self._course.given = epoch, None, 0

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch and the batches given out in it so far (not those read ahead)."""
        course = self._course
        state: dict[str, Any] = {"seed": course.seed, "epoch": course.epoch, "batches": 0}
        if course.begun is not None:
            state["batches"] = course.given
        if self._own_generator is not None:
            begun = course.begun is not None and course.generator_state is not None
            state["generator"] = course.generator_state if begun else self._own_generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any], *, position: bool = True) -> None:
        """Take the order of `state`, so that the next iteration is its epoch.

        position: also begin after the batches that were given out; False leaves that to `skip_first_batches`.
        Raises DataError if the loader that saved it made its order in another way.
        """
        if (state["seed"] is None) != (self._course.seed is None) or ("generator" in state) != (
            self._own_generator is not None
        ):
            raise DataError(
                "load_state_dict: this loader's sampler has a generator of its own and the saved one's has "
                "not, or the other way round. Build the loader as it was when its state was saved."
            )
        self._course.seed = state["seed"]
        self.set_epoch(state["epoch"])
        # After set_epoch, which forgets a position in another epoch.
        self._course.resume = state["batches"] if position else 0
        self._course.restored_generator = state.get("generator")

    def _start_epoch(self) -> int:
        """Put generators and epochs in step for one iteration, and say how many batches a resume leaves out."""
        course = self._course
        epoch = course.next
        if course.begun is not None and self._skip + self._skip_sampler:
            epoch = course.begun  # the rest of an epoch that was broken off
        resume, course.resume = course.resume, 0
        if self._skip + self._skip_sampler:
            resume = 0  # the script says itself what of the epoch is left
        own = self._own_generator
        if own is not None:
            if course.restored_generator is not None:
                own.set_state(course.restored_generator)
                course.restored_generator = None
            elif epoch == course.begun and course.generator_state is not None:
                own.set_state(course.generator_state)
        if self._ranks.world_size > 1:
            kinds = [kind for kind in self._rng_types if kind != "generator" or own is not None]
            synchronize_rng_states(kinds, own)
        course.generator_state = None if own is None else own.get_state()
        if course.seed is not None:
            for part in self._seeded:
                part.generator = fresh_generator(course.seed + epoch)
        dataset: Any = self.dataset
        for part in (*samplers_inside(self._index_sampler), dataset):
            if hasattr(part, "set_epoch") and not isinstance(part, (RankBatches, LaterBatches)):
                part.set_epoch(epoch)
        course.next, course.begun = epoch + 1, epoch
        course.given = self._skip + self._skip_sampler + resume
        return resume

    def __len__(self) -> int:
        return max(0, self._full_length() - self._skip)

    def _full_length(self) -> int:
        return super().__len__()

    def _entries(self, batches: int) -> int:
        """How many entries of the sampler inside make this many of the rank's batches."""
        return batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.end_of_dataloader, self._last = False, None
        resume = self._start_epoch()
        course, state = self._course, GradientState()
        epoch = course.begun
        source = self if resume == 0 else _without_first(self, resume)
        source._resumed = resume > 0
        state.begin(self)
        try:
            for index, (batch, last, shares) in enumerate(source._read()):
                if last:
                    self.end_of_dataloader, self._last = True, shares
                if index < source._skip:
                    continue
                course.given += 1
                yield batch
            if course.begun == epoch:
                course.begun, course.given = None, 0
        finally:
            state.end(self)

    def _inner_iterator(self) -> Iterator[Any]:
        """The user's own iteration, over this rank's samplers."""
        if not self._resumed:
            return super().__iter__()
        # torch draws a seed for workers when an iteration begins. In the run that began this epoch that has been drawn, and
        # the generator that was restored comes after it.
        state = torch.get_rng_state()
        try:
            return super().__iter__()
        finally:
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


def refuse_empty_stream(dataset: Any) -> None:
    inner = dataset.dataset if isinstance(dataset, RankSamples) else dataset
    if getattr(dataset, "drop_last", False):
        return
    raise DataError(
        f"the iterable data set {type(inner).__name__} gave no sample. It is empty, or it can be read only "
        "once: make its __iter__ start anew each time."
    )


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


def skip_first_batches(loader: T, num_batches: int = 0) -> T:
    """A loader of the rest of an epoch: without its first `num_batches`, in the very same order.

    That is the epoch that a `break` left, or else the one that would come next. It shares the epoch count with
    `loader`: looping over `loader` afterwards gives the next epoch. Of a map-style data set nothing skipped is read.
    """
    if not isinstance(loader, DataLoader):
        raise DataError(f"skip_first_batches takes a DataLoader, not a {type(loader).__name__}.")
    if num_batches < 0:
        raise DataError(f"skip_first_batches: num_batches is {num_batches}; it cannot be negative.")
    result: T = _without_first(loader, num_batches)
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
