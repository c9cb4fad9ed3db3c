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

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from .data_order import (
    FirstOfEach,
    LaterBatches,
    RankBatches,
    RankSamples,
    Round,
    SingleIndices,
    fresh_generator,
    samplers_inside,
)
from .errors import ConfigError, DataError
from .nested import send_to_device
from .process import GradientState, synchronize_rng_states
from .zero.collectives import Ranks

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class DataLoaderConfiguration:
    """How loaders are prepared; the meanings and defaults are accelerate's.

    split_batches:          the loader's batch size is the global one, cut over the ranks.
    dispatch_batches:       rank 0 reads and hands out; None: only for iterable data sets.
    even_batches:           complete the last round with samples from the start of the epoch.
    use_seedable_sampler:   take the seed from `data_seed`, or torch's initial seed, instead of drawing one.
    data_seed:              that seed.
    non_blocking:           do not wait for copies to the device.
    use_stateful_dataloader: `load_state` also continues at the batch where the state was saved. Every prepared loader
                            has `state_dict` and `load_state_dict`; no other package is needed.
    custom_classes:         refused.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False

    def __post_init__(self) -> None:
        if self.data_seed is not None and not self.use_seedable_sampler:
            raise ConfigError(
                "data_seed is set, but use_seedable_sampler is not: the seed would have no effect. Set "
                "use_seedable_sampler=True as well."
            )
        if self.split_batches and self.dispatch_batches is None and not self.even_batches:
            logger.debug("split_batches with even_batches=False: the last batch may leave ranks without samples.")


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
        self._course.resume = state["batches"] if position else 0
        self._course.restored_generator = state.get("generator")

    def _start_epoch(self) -> int:
        """Put generators and epochs in step for one iteration, and say how many batches a resume leaves out."""
        course = self._course
        epoch = course.next
        if course.begun is not None and self._skip + self._skip_sampler:
            epoch = course.begun  # the rest of an epoch that was broken off
        resume, course.resume = course.resume, 0
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
        return super().__iter__()

    def _read(self) -> Iterator[tuple[Any, bool, Round | None]]:
        """The rank's batches on its device, whether each is the last, and the last's round; one is read ahead."""
        batches = self._inner_iterator()
        try:
            current = next(batches)
        except StopIteration:
            if isinstance(self.dataset, IterableDataset):
                _refuse_empty_stream(self.dataset)
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


def _refuse_empty_stream(dataset: Any) -> None:
    inner = dataset.dataset if isinstance(dataset, RankSamples) else dataset
    if getattr(dataset, "drop_last", False):
        return
    raise DataError(
        f"the iterable data set {type(inner).__name__} gave no sample. It is empty, or it can be read only "
        "once: make its __iter__ start anew each time."
    )


_classes: dict[tuple[type, type], type] = {}


def _subclass(part: type, user: type) -> type:
    """`part` mixed in before the user's loader class, made once per pair."""
    if user is DataLoader:
        return part
    if (part, user) not in _classes:
        _classes[part, user] = type(f"{part.__name__}Of{user.__name__}", (part, user), {})
    return _classes[part, user]


def _copy_loader(loader: DataLoader[Any], cls: type[DataLoader[Any]]) -> Any:
    """A shallow copy as another class, without the workers."""
    result = cls.__new__(cls)
    result.__dict__.update(loader.__dict__)  # past DataLoader.__setattr__, which refuses to change a made loader
    result.__dict__["_iterator"] = None
    return result


def check_data_loader(loader: DataLoader[Any], world_size: int, settings: DataLoaderConfiguration) -> None:
    """Raise DataError, before any rank waits for another, if this loader cannot be prepared."""
    if "torchdata" in type(loader).__module__:
        raise DataError(
            "a torchdata StatefulDataLoader cannot be prepared: give a torch DataLoader. Every prepared "
            "loader has state_dict and load_state_dict of its own."
        )
    dataset: Any = loader.dataset
    if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"the data set of a DataLoader is empty ({type(dataset).__name__} of length 0).")
    index = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    for part in samplers_inside(index):
        if isinstance(part, DistributedSampler) and part.num_replicas > 1:
            raise DataError(
                "the DataLoader has a DistributedSampler, which already splits the data over the ranks; "
                "`prepare` would split it twice. Give the loader without it (shuffle=True instead)."
            )
    size = getattr(index, "batch_size", None) if not isinstance(dataset, IterableDataset) else loader.batch_size
    if settings.split_batches and (size is None or size % world_size != 0):
        raise DataError(
            f"split_batches: a batch size of {size} cannot be cut into {world_size} equal parts. Use a "
            f"batch_size that is a multiple of {world_size}, or split_batches=False."
        )


def prepare_data_loader(
    loader: DataLoader[Any],
    ranks: Ranks,
    settings: DataLoaderConfiguration | None = None,
    *,
    put_on_device: bool = True,
    rng_types: tuple[str, ...] = ("generator",),
    slice_fn: Callable[..., Any] | None = None,
) -> PreparedLoader:
    """The part of `loader` that this rank reads, as a new loader. Collective: rank 0's seed goes to all.

    slice_fn: cuts a dispatched batch: (batch, slice, process_index=, num_processes=) -> batch.
    Raises DataError if the loader cannot be sharded (see `check_data_loader`), on every rank.
    """
    settings = settings or DataLoaderConfiguration()
    if isinstance(loader, PreparedLoader):
        return loader
    check_data_loader(loader, ranks.world_size, settings)
    iterable = isinstance(loader.dataset, IterableDataset)
    dispatch = settings.dispatch_batches
    if dispatch is None:
        dispatch = iterable and put_on_device
    if dispatch and not put_on_device:
        raise DataError("dispatch_batches=True hands out batches on the device; it needs device_placement=True.")
    if slice_fn is not None and not dispatch:
        raise DataError("slice_fn_for_dispatch has no effect without dispatch_batches=True.")
    world = ranks.world_size
    seed, seeded, own = _order_of(loader, ranks, settings)
    if dispatch and world > 1:
        from .data_dispatch import DispatchedLoader

        result = _copy_loader(loader, _subclass(DispatchedLoader, type(loader)))
        result._split = settings.split_batches
        result._slice_fn = slice_fn
    else:
        result = _copy_loader(loader, _subclass(PreparedLoader, type(loader)))
        if iterable:
            if world > 1:
                _deal_samples(result, ranks, settings)
        else:
            _deal_batches(result, ranks, settings)
    result._ranks = ranks
    result._course = Course(seed)
    result._device = ranks.device if put_on_device else None
    result._non_blocking = settings.non_blocking
    result._rng_types = tuple(rng_types)
    result._own_generator = own
    result._seeded = seeded
    result._skip = result._skip_sampler = 0
    result._last = None
    result.end_of_dataloader = False
    return result  # type: ignore[no-any-return]


def _order_of(
    loader: DataLoader[Any], ranks: Ranks, settings: DataLoaderConfiguration
) -> tuple[int | None, tuple[Any, ...], torch.Generator | None]:
    """(seed or None, what follows (seed, epoch), the user's own generator or None)."""
    if isinstance(loader.dataset, IterableDataset):
        parts: list[Any] = [loader.dataset] if not hasattr(loader.dataset, "set_epoch") else []
    else:
        parts = list(samplers_inside(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler))
    parts = [part for part in parts if hasattr(part, "generator")]
    if settings.use_seedable_sampler and any(isinstance(part, RandomSampler) for part in parts):
        seed = torch.initial_seed() if settings.data_seed is None else settings.data_seed
        return ranks.broadcast_object(seed), tuple(parts), None
    own = next((part.generator for part in parts if isinstance(part.generator, torch.Generator)), None)
    if own is not None or not parts:
        return None, (), own
    draw = int(torch.empty((), dtype=torch.int64).random_().item())
    return ranks.broadcast_object(draw), tuple(parts), None


def _deal_batches(result: Any, ranks: Ranks, settings: DataLoaderConfiguration) -> None:
    key = "batch_sampler" if result.batch_sampler is not None else "sampler"
    index = result.__dict__[key]
    single = key == "sampler" and not isinstance(index, BatchSampler)
    dealt = RankBatches(
        SingleIndices(index) if single else index,
        ranks.world_size,
        ranks.rank,
        split=settings.split_batches,
        even=settings.even_batches,
    )
    if hasattr(index, "__len__"):
        counts = [dealt.length_on(rank) for rank in range(ranks.world_size)]
        if ranks.rank == 0 and min(counts) == 0:
            logger.warning(
                "A DataLoader gives no batch to some ranks (batches per rank: %s): it has %d batches for %d "
                "ranks, drop_last is %s.",
                counts,
                len(index),
                ranks.world_size,
                dealt.drop_last,
            )
        elif ranks.rank == 0 and min(counts) != max(counts):
            logger.warning(
                "even_batches=False: the ranks read different numbers of batches (%s). A sharded model's "
                "forward needs all ranks; use this for loops without one.",
                counts,
            )
    result.__dict__[key] = FirstOfEach(dealt) if single else dealt


def _deal_samples(result: Any, ranks: Ranks, settings: DataLoaderConfiguration) -> None:
    size = result.batch_size
    split = settings.split_batches
    result.__dict__["dataset"] = RankSamples(
        result.dataset, size or 1, ranks.world_size, ranks.rank, drop_last=bool(result.drop_last), split=split
    )
    if size is not None and split:
        part = size // ranks.world_size
        result.__dict__["batch_size"] = part
        result.__dict__["batch_sampler"] = BatchSampler(result.sampler, part, result.drop_last)


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
        result = _copy_loader(loader, type(loader) if known else _subclass(_SkippingLoader, type(loader)))
        result._skip = (result._skip if known else 0) + count
        return result
    result = _copy_loader(loader, type(loader))
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


def drop_repeats(parts: list[Any], shares: Round | None) -> list[Any]:
    """Each rank's rows of a result without those that belong to repeated samples.

    parts:  per rank, something that can be sliced and has a length: k entries for each sample of the rank's batch.
    shares: the round that the batch was; None leaves everything.
    A part whose length is no multiple of its samples (one number per rank, say) is kept if its rank read any sample
    that is not a repeat.
    """
    if shares is None:
        return parts
    kept = []
    for part, share in zip(parts, shares, strict=True):
        if share.rows and len(part) % share.rows == 0:
            kept.append(part[: len(part) // share.rows * share.real])
        else:
            kept.append(part if share.real else part[:0])
    return kept
