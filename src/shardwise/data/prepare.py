"""Preparing a DataLoader: which part this rank reads, and in which order; what a metric must drop at the end.

`data/order.py` has the arithmetic, `data/loader.py` and `data/dispatch.py` the loaders that come out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from ..errors import ConfigError, DataError
from ..ranks.ranks import Ranks
from .course import Course, can_run_on
from .loader import PreparedLoader, copy_loader, skip_first_batches, subclass
from .order import FirstOfEach, RankBatches, RankSamples, Round, SingleIndices, samplers_inside
from .stateful import as_stateful

__all__ = [
    "DataLoaderConfiguration",
    "PreparedLoader",
    "check_data_loader",
    "drop_repeats",
    "prepare_data_loader",
    "skip_first_batches",
]

logger = logging.getLogger(__name__)


@dataclass
class DataLoaderConfiguration:
    """How loaders are prepared; the meanings and defaults are accelerate's.

    split_batches:          the loader's batch size is the global one, cut over the ranks.
    dispatch_batches:       rank 0 reads and hands out; None: only for iterable data sets.
    even_batches:           complete the last round with samples from the start of the epoch.
    use_seedable_sampler:   take the seed from `data_seed`, or torch's initial seed, instead of drawing one.
    data_seed:              that seed.
    non_blocking:           do not wait for copies to the device.
    use_stateful_dataloader: prepared loaders are of torchdata's StatefulDataLoader class too, where it is installed, for
                            `isinstance`. Every prepared loader has `state_dict` and `load_state_dict` without it.
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
    The caller has checked it with `check_data_loader`. Raises DataError, on every rank, for settings that do not go together.
    """
    settings = settings or DataLoaderConfiguration()
    if isinstance(loader, PreparedLoader):
        return loader
    iterable = isinstance(loader.dataset, IterableDataset)
    dispatch = settings.dispatch_batches
    if dispatch is None:
        dispatch = iterable and put_on_device
    if dispatch and not put_on_device:
        raise DataError("dispatch_batches=True hands out batches on the device; it needs device_placement=True.")
    if slice_fn is not None and not dispatch:
        raise DataError("slice_fn_for_dispatch has no effect without dispatch_batches=True.")
    world = ranks.world_size
    seed, seeded, own = order_of(loader, ranks, settings)
    if dispatch and world > 1:
        from .dispatch import DispatchedLoader

        result = copy_loader(loader, subclass(DispatchedLoader, type(loader)))
        result._split = settings.split_batches
        result._slice_fn = slice_fn
    else:
        result = copy_loader(loader, subclass(PreparedLoader, type(loader)))
        if iterable:
            if world > 1:
                _deal_samples(result, ranks, settings)
        else:
            _deal_batches(result, ranks, settings)
    result.dispatches = bool(dispatch)
    result._ranks = ranks
    result._course = Course(seed, runs_on=not settings.use_seedable_sampler and can_run_on(seeded))
    result._device = ranks.device if put_on_device else None
    result._non_blocking = settings.non_blocking
    result._rng_types = tuple(rng_types)
    result._own_generator = own
    result._seeded = seeded
    result._skip = result._skip_sampler = 0
    result._last = None
    result.end_of_dataloader = False
    if settings.use_stateful_dataloader:
        as_stateful(result)
    return result  # type: ignore[no-any-return]


def order_of(
    loader: DataLoader[Any], ranks: Ranks, settings: DataLoaderConfiguration
) -> tuple[int | None, tuple[Any, ...], torch.Generator | None]:
    """(seed or None, what follows (seed, epoch), the user's own generator or None)."""
    if isinstance(loader.dataset, IterableDataset):
        parts: list[Any] = [loader.dataset] if not hasattr(loader.dataset, "set_epoch") else []
    else:
        parts = list(samplers_inside(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler))
    # Whatever else is called so (numpy's, a method) is the user's own affair.
    parts = [part for part in parts if isinstance(getattr(part, "generator", ""), torch.Generator | None)]
    if settings.use_seedable_sampler and any(isinstance(part, RandomSampler) for part in parts):
        seed = torch.initial_seed() if settings.data_seed is None else settings.data_seed
        return ranks.broadcast_object(seed), tuple(parts), None
    own = next((part.generator for part in parts if isinstance(part.generator, torch.Generator)), None)
    if own is not None or not parts:
        return None, (), own
    parts = [part for part in parts if part.generator is None]
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
        even=settings.even_batches and ranks.world_size > 1,  # one rank keeps its short batch, as under accelerate
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
