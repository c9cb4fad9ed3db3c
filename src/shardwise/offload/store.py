"""Where shards rest: a Store hands out slabs; what rests in a slab is fetched to the device and put back.

The engine never asks which tier it talks to. `fetch` enqueues on the up lane and `put` on the down lane; each gives an
Arrival, and whoever needs the bytes waits for that. A slab remembers what was read and written where, so a fetch never
overtakes the put before it. Sizes are exact: nothing is rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import StoreError
from ..plan.plan import Tier
from ..ranks.lanes import Lanes


class Arrival(Protocol):
    """A copy that is on its way."""

    def enqueued(self) -> torch.Event | None:
        """The event that is done when the copy is; the host may have to wait until the device has been told of it.

        None where nothing runs beside the host: then the copy is done when this returns. Raises StoreError.
        """
        ...


class Done:
    """An Arrival that the device knows of already."""

    __slots__ = ("event",)

    def __init__(self, event: torch.Event | None) -> None:
        self.event = event

    def enqueued(self) -> torch.Event | None:
        return self.event


class Keeper(Protocol):
    """Somebody who is still reading a slab in place, on the host."""

    def give_way(self, begin: int, end: int) -> None:
        """Return when the elements [begin, end) may be overwritten. Raises what kept it from reading them."""
        ...


class Slab:
    """`numel` elements of `dtype` that rest on a tier.

    store:  that allocated it, or None for memory that belongs to somebody else and is only read in place.
    tensor: (numel,) where a program can read it in place: on the device and in host memory; none on a drive.
    """

    def __init__(
        self, store: Store | None, tier: Tier, numel: int, dtype: torch.dtype, tensor: Tensor | None = None
    ) -> None:
        self.store = store
        self.tier = tier
        self.numel = numel
        self.dtype = dtype
        self._tensor = tensor
        # Every rank's slab of this name, in rank order, where this rank can read them itself.
        self.peers: Sequence[Tensor] = ()
        # Events of copies into and out of it, by range: chunks of one slab go up and down at the same time.
        self.writes: dict[tuple[int, int], torch.Event | None] = {}
        self.reads: dict[tuple[int, int], torch.Event | None] = {}
        # Who must give way before it is written.
        self.keeper: Keeper | None = None

    def fetch(self, out: Tensor, begin: int = 0) -> Arrival:
        """See `Store.fetch`."""
        assert self.store is not None
        return self.store.fetch(self, out, begin)

    def put(self, source: Tensor, begin: int = 0) -> Arrival:
        """See `Store.put`."""
        assert self.store is not None
        return self.store.put(source, self, begin)

    # In the form in which it rests, see `coded.py`: here, its elements as they are.

    def room(self, numel: int, device: torch.device) -> list[Tensor]:
        """Memory on the device for what `numel` elements rest as."""
        return [torch.empty(numel, dtype=self.dtype, device=device)]

    def fetch_parts(self, parts: Sequence[Tensor], begin: int = 0) -> list[Arrival]:
        """`fetch` into such memory."""
        return [self.fetch(parts[0], begin)]

    def unpacked(self, parts: Sequence[Tensor], numel: int) -> Tensor:
        """The (numel,) elements that `parts` are, on the current lane; perhaps the same memory."""
        return parts[0]

    def packed(self, values: Tensor, begin: int = 0, step: Tensor | None = None) -> list[Tensor]:
        """What `values`, a device tensor, will rest as from element `begin` on, on the current lane; perhaps the same memory.

        step: () int32 on the device, the count of steps; what is not of a step has none.
        """
        return [values]

    def put_parts(self, parts: Sequence[Tensor], begin: int = 0, *, given: bool = False) -> torch.Event | None:
        """`put` of what `packed` gave; the event of the last copy. Raises StoreError.

        given: nobody writes the parts any more, so a store may keep them, in place of a copy, until they are at rest.
        """
        return self.put(parts[0], begin).enqueued()

    def read_part(self, begin: int, numel: int) -> Tensor:
        """(numel,) elements from `begin` on, to read at once: where they rest, or a copy on the device. Raises StoreError."""
        return self.tensor[begin : begin + numel].detach()

    @torch.no_grad()
    def write_part(self, begin: int, values: Tensor) -> None:
        """Overwrite elements from `begin` on; they rest there when this returns. Raises StoreError."""
        if self.keeper is not None:
            self.keeper.give_way(begin, begin + values.numel())
        self.read_part(begin, values.numel()).copy_(values)

    @property
    def tensor(self) -> Tensor:
        assert self._tensor is not None, f"a slab on {self.tier} cannot be read in place"
        return self._tensor

    @property
    def in_memory(self) -> bool:
        return self._tensor is not None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def overlapping(
    copies: dict[tuple[int, int], torch.Event | None], begin: int, end: int
) -> Iterator[torch.Event | None]:
    """The events of those copies whose range meets [begin, end)."""
    for (first, last), event in copies.items():
        if first < end and begin < last:
            yield event


class Store(Protocol):
    """Allocates resting places of one tier, and moves bytes between them and the device."""

    tier: Tier

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> Slab:
        """(numel,) zeros at rest; `name` is what errors and files call it. Raises StoreError, a drive's at `drain`."""
        ...

    def fetch(self, slab: Slab, out: Tensor, begin: int = 0) -> Arrival:
        """Copy slab[begin : begin + out.numel()] into `out`, a contiguous device tensor of its dtype.

        The up lane must already wait for whoever used the memory of `out` before.
        """
        ...

    def put(self, source: Tensor, slab: Slab, begin: int = 0) -> Arrival:
        """Copy `source`, a contiguous device tensor, into the slab from `begin`; casts where dtypes differ.

        The down lane must already wait for whoever writes `source`, which must live until the Arrival's event is done.
        """
        ...

    def drain(self) -> None:
        """Return once what was put or added rests there, as far as threads do it. Raises StoreError."""
        ...

    def take_fault(self) -> StoreError | None:
        """What failed first since the last call, also where nobody has waited for it yet; for whoever tells it."""
        ...

    @property
    def staging_nbytes(self) -> int:
        """Bytes of host memory that transfers go through; they hold nothing at rest."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class MemoryStore:
    """Slabs that a program can read in place: on the device. `HostStore` is the same beside it."""

    tier = Tier.GPU

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> Slab:
        return Slab(self, self.tier, numel, dtype, torch.zeros(numel, dtype=dtype, device=self.lanes.device))

    def fetch(self, slab: Slab, out: Tensor, begin: int = 0) -> Arrival:
        up, end = self.lanes.up, begin + out.numel()
        for event in overlapping(slab.writes, begin, end):
            up.wait(event)
        with up.on():
            out.copy_(slab.tensor[begin:end], non_blocking=True)
            event = slab.reads[begin, end] = up.mark()
        return Done(event)

    def put(self, source: Tensor, slab: Slab, begin: int = 0) -> Arrival:
        down, end = self.lanes.down, begin + source.numel()
        if slab.keeper is not None:
            slab.keeper.give_way(begin, end)
        for event in overlapping(slab.reads, begin, end):
            down.wait(event)
        with down.on():
            slab.tensor[begin:end].copy_(source, non_blocking=True)
            event = slab.writes[begin, end] = down.mark()
        return Done(event)

    def drain(self) -> None:
        pass

    def take_fault(self) -> StoreError | None:
        return None

    @property
    def staging_nbytes(self) -> int:
        return 0

    def close(self) -> None:
        pass
