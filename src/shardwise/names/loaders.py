"""accelerate's names for loaders and samplers, over those of `data/`; their arguments are accelerate's.

`isinstance` is true of the classes below for what `prepare` makes, too: `isinstance(prepared, DataLoaderShard)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ..data.course import Course, can_run_on
from ..data.dispatch import DispatchedLoader
from ..data.loader import PreparedLoader
from ..data.order import LaterBatches, RankBatches, RankSamples, samplers_inside
from ..data.prepare import DataLoaderConfiguration, check_data_loader, order_of
from ..data.prepare import prepare_data_loader as loader_of_rank
from ..data.stateful import as_stateful
from ..errors import ConfigError
from ..run.joined import join_run

T = TypeVar("T")


class _Includes(type):
    """`isinstance` is also true of what `includes` says."""

    def __instancecheck__(cls, item: Any) -> bool:
        return super().__instancecheck__(item) or cls.includes(item)  # type: ignore[attr-defined]


class SeedableRandomSampler(RandomSampler):
    """A RandomSampler whose order in an epoch follows from seed + epoch; the epoch counts by itself.

    data_seed: the seed; default: torch's initial one.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed(self.initial_seed + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The next order is that of epoch `epoch`."""
        self.epoch = epoch


class BatchSamplerShard(RankBatches, BatchSampler, metaclass=_Includes):  # type: ignore[misc, override]
    """One process's batches of a batch sampler; see RankBatches."""

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        RankBatches.__init__(self, batch_sampler, num_processes, process_index, split=split_batches, even=even_batches)

    @staticmethod
    def includes(item: Any) -> bool:
        return isinstance(item, RankBatches)


class IterableDatasetShard(RankSamples):
    """One process's samples of an iterable data set; see RankSamples."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        super().__init__(dataset, batch_size, num_processes, process_index, drop_last=drop_last, split=split_batches)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next order is that of epoch `epoch`: a generator of the data set is seeded by it."""
        self.epoch = epoch
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not hasattr(self.dataset, "set_epoch"):
            generator.manual_seed(self.epoch)
        return super().__iter__()


class SkipBatchSampler(LaterBatches, BatchSampler):  # type: ignore[misc, override]
    """A batch sampler without its first `skip_batches` batches."""

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        LaterBatches.__init__(self, batch_sampler, skip_batches)

    @property
    def batch_sampler(self) -> Any:
        return self.inner

    @property
    def skip_batches(self) -> int:
        return self.skip

    @property
    def total_length(self) -> int:
        """Batches with those that are skipped."""
        return len(self.inner)


class _MadeShard(type(PreparedLoader)):  # type: ignore[misc]
    def __instancecheck__(cls, item: Any) -> bool:
        return super().__instancecheck__(item) or cls.includes(item)  # type: ignore[no-any-return]


class SkipDataLoader(PreparedLoader):
    """A loader without the first `skip_batches` batches of each epoch; its batches stay where they are made.

    use_stateful_dataloader: as for DataLoaderShard.
    """

    def __init__(
        self, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> None:
        DataLoader.__init__(self, dataset, **kwargs)
        alone = _Seat(1, 0, torch.device("cpu"))
        _become_prepared(self, ranks=alone, device=None, skip=skip_batches, stateful=use_stateful_dataloader)


class DataLoaderShard(PreparedLoader, metaclass=_MadeShard):
    """A loader whose batches arrive on `device`, and which knows its last batch; it reads what its samplers say, all of it.

    rng_types, synchronized_generator: as `prepare` has them for a sampler's own generator.
    iteration: the epoch that it begins with. What `prepare` gives reads this rank's part.
    use_stateful_dataloader: also of torchdata's class, see `data/stateful.py`; the order is a part of its state.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str | None = None,
        rng_types: list[str] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        DataLoader.__init__(self, dataset, **kwargs)
        _refuse_mesh(torch_device_mesh)
        _become_prepared(
            self,
            ranks=join_run(),
            device=None if device is None else torch.device(device),
            rng_types=tuple(rng_types or ()),
            generator=synchronized_generator,
            skip=skip_batches,
            non_blocking=_non_blocking,
            iteration=iteration,
            stateful=use_stateful_dataloader,
        )

    @staticmethod
    def includes(item: Any) -> bool:
        return isinstance(item, PreparedLoader) and not item.dispatches and not isinstance(item, SkipDataLoader)


class DataLoaderDispatcher(DispatchedLoader, metaclass=_MadeShard):
    """A loader that rank 0 reads and hands out: a batch to each rank, or with `split_batches` one cut into parts.

    slice_fn: cuts a batch, see `prepare_data_loader`. iteration: the epoch that it begins with.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        DataLoader.__init__(self, dataset, **kwargs)
        _refuse_mesh(torch_device_mesh)
        self._split = split_batches
        self._slice_fn = slice_fn
        _become_prepared(
            self,
            ranks=join_run(),
            device=join_run().device,
            skip=skip_batches,
            non_blocking=_non_blocking,
            iteration=iteration,
            stateful=use_stateful_dataloader,
        )

    @staticmethod
    def includes(item: Any) -> bool:
        return isinstance(item, PreparedLoader) and item.dispatches


def _refuse_mesh(mesh: Any) -> None:
    if mesh is not None:
        raise ConfigError("torch_device_mesh is for parallelism that shardwise does not have. Leave it out.")


def _become_prepared(
    loader: PreparedLoader,
    *,
    ranks: Any,
    device: torch.device | None,
    rng_types: tuple[str, ...] = (),
    generator: torch.Generator | None = None,
    skip: int = 0,
    non_blocking: bool = False,
    iteration: int = 0,
    stateful: bool = False,
) -> None:
    """Give a loader that was constructed what `prepare` gives one.

    stateful: what is drawn for its order is drawn once and kept in its state, each rank's own; else torch draws each epoch.
    """
    seed, seeded = None, ()
    if stateful:
        alone: Any = _Seat(1, 0, torch.device("cpu"))
        order = order_of(loader, alone, DataLoaderConfiguration())
        seed, seeded, generator = *order[:2], generator if generator is not None else order[2]
    loader._ranks = ranks
    loader._course = Course(seed, next=iteration, runs_on=can_run_on(seeded))
    loader._device = device
    loader._non_blocking = non_blocking
    loader._rng_types = rng_types
    loader._own_generator = generator
    loader._seeded = seeded
    loader._skip = loader._skip_sampler = 0
    loader.skip_batches = skip
    loader._last = None
    loader.end_of_dataloader = False
    if stateful:
        as_stateful(loader)


def get_sampler(dataloader: DataLoader[Any]) -> Any:
    """The innermost sampler of a loader, prepared or not."""
    index = dataloader.batch_sampler if dataloader.batch_sampler is not None else dataloader.sampler
    return list(samplers_inside(index))[-1]


@dataclass(frozen=True)
class _Seat:
    """A place among ranks that need not be there: enough to read the part of a loader that such a rank would read."""

    world_size: int
    rank: int
    device: torch.device

    def broadcast_object(self, value: T) -> T:
        return value


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | str | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: list[str] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> PreparedLoader:
    """This process's part of `dataloader`, as a new loader; see `data/prepare.py`. Collective in a run of several ranks.

    num_processes, process_index: other than the run's, for reading the part of any rank; then no rank is asked, and each
    must have drawn the same seed (use_seedable_sampler). Raises DataError and ConfigError.
    """
    _refuse_mesh(torch_device_mesh)
    own = join_run()
    world_size = own.world_size if num_processes is None else num_processes
    rank = own.rank if process_index is None else process_index
    ranks: Any = own
    if (world_size, rank) != (own.world_size, own.rank):
        if dispatch_batches:
            raise ConfigError(
                "prepare_data_loader: dispatch_batches needs the run's own num_processes and process_index."
            )
        ranks = _Seat(world_size, rank, own.device)
        dispatch_batches = False
    settings = DataLoaderConfiguration(
        split_batches=split_batches,
        dispatch_batches=dispatch_batches,
        even_batches=even_batches,
        use_seedable_sampler=use_seedable_sampler,
        data_seed=data_seed if use_seedable_sampler else None,
        non_blocking=non_blocking,
        use_stateful_dataloader=use_stateful_dataloader,
    )
    check_data_loader(dataloader, ranks.world_size, settings)
    result = loader_of_rank(
        dataloader,
        ranks,
        settings,
        put_on_device=put_on_device,
        rng_types=tuple(rng_types or ()),
        slice_fn=slice_fn_for_dispatch,
    )
    if put_on_device and device is not None:
        result._device = torch.device(device)
    return result
