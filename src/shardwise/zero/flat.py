"""One flat buffer of one unit: this rank's shard at rest, and the whole that its parameters are views of.

Every Parameter becomes, once, a permanent view into `whole`. What comes and goes is the storage behind it: gathering
resizes it to full size and fills it with one collective, releasing resizes it to 0. So a gather copies nothing in or out, and
tensors that autograd saved stay valid across a release, because they too are views of the same storage.

    rank 0 shard [ q k v . ]      whole  [ q k v . | o up . ]  <- parameters q, k, v, o, up are views
    rank 1 shard [ o up .  ]              gathered: 2 shards; released: storage of size 0

The buffer does not know streams, processes or autograd; the unit orders it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import WriteError
from ..offload.peers import PeerMemory
from ..offload.store import MemoryStore, Slab, Store
from ..plan.blueprint import Member
from ..plan.compressed import Packing
from ..plan.layout import Layout
from ..plan.plan import Placement, Tier
from .guard import Guard, unasked

# torch's own attribute, whatever a Parameter's class makes of it.
_DATA: Any = Tensor.data


class FlatBuffer:
    """The frozen or the trainable weights of a unit, in flat form.

    members:   the parameters, in buffer order.
    layout:    in bytes when `dtype` is uint8 (frozen weights of any mix of dtypes), else in numbers.
    whole:     (layout.numel,) on the device; its storage is empty while released.
    peers:     where shards on the device rest if all ranks shall read them. changes: steps write into them.
    packing:   how shards travel in passes if not exactly, see `compressed.py`.
    slab:      (layout.shard_numel,) at rest on placement.tier, the caller's or the store's; None when the whole never leaves.
    replaced:  how many storages of `whole` have been replaced, of all buffers: who knows storages by address looks again.
    """

    replaced = 0

    def __init__(
        self,
        members: Sequence[Member],
        layout: Layout,
        *,
        dtype: torch.dtype,
        placement: Placement,
        store: Store,
        rank: int,
        device: torch.device,
        peers: PeerMemory | None = None,
        changes: bool = False,
        packing: Packing | None = None,
        slab: Slab | None = None,
    ) -> None:
        self.members = tuple(members)
        self.dtype = dtype
        self.placement = placement
        self.rank = rank if layout.world_size > 1 else 0
        self.layout = layout
        shards = layout.world_size
        # member, gap, member, gap, ...: so that one split yields every member.
        ends = [slot.offset for slot in self.layout.slots[1:]] + [self.layout.numel]
        self._split_sizes = [
            n
            for slot, end in zip(self.layout.slots, ends, strict=True)
            for n in (slot.numel, end - slot.offset - slot.numel)
        ]
        self.whole = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        self._guard: Guard | None = None
        self._offsets: list[tuple[int, int]] = []  # in bytes, of the members that may be given other memory
        self._watched: list[Tensor] = []  # those
        self._base, self._addresses = 0, list[int]()  # where `whole` was last, and where they belong then
        self._nbytes = self.whole.untyped_storage().nbytes()
        self.leaves = placement.leaves(shards)
        self.packing = packing if self.leaves else None
        self._fixed = False
        self.slab = slab if self.leaves else None
        self._copies: list[tuple[Tensor, Tensor]] = []
        if self.leaves:
            n = self.layout.shard_numel
            if self.slab is None and peers is not None and isinstance(store, MemoryStore) and store.tier is Tier.GPU:
                self.slab = peers.allocate(store, n, dtype, changes=changes)
            if self.slab is None:
                self.slab = store.allocate(n, dtype, members[0].name)
            # This rank's own first, then the others in turn, so that not all ranks read from one.
            turn = [(rank + step) % shards for step in range(shards)] if self.slab.peers else []
            self._copies = [(self.whole[r * n : (r + 1) * n], self.slab.peers[r]) for r in turn]

    @property
    def shard(self) -> Tensor:
        """This rank's shard where it rests in memory; its slice of `whole` when that never leaves."""
        return self.own_slice if self.slab is None else self.slab.tensor

    @property
    def whole_nbytes(self) -> int:
        return self._nbytes

    @property
    def tier(self) -> Tier:
        """Where it rests between uses."""
        return Tier.GPU if self.slab is None else self.slab.tier

    def stay_whole(self) -> None:
        """Never leave again; `whole` must be gathered."""
        self.slab = None
        self._copies = []
        self.leaves = False
        self.packing = None

    @property
    def travels(self) -> bool:
        """Whether the shard rests on another tier than the device."""
        return self.slab is not None and self.slab.tier is not Tier.GPU

    @property
    def own_slice(self) -> Tensor:
        """This rank's interval of `whole`; readable while gathered."""
        n = self.layout.shard_numel
        return self.whole[self.rank * n : (self.rank + 1) * n]

    def numbers(self, flat: Tensor) -> Tensor:
        """A flat tensor of this buffer's elements, as weights: of a buffer that has a `packing`."""
        return flat.view(self.members[0].dtype)

    def fill(self) -> None:
        """Copy the parameters' present values into `whole`. Init only, while whole has its storage."""
        for index, member in enumerate(self.members):
            self.view(index).copy_(member.parameter.detach())

    def adopt(self) -> None:
        """Make every parameter a view of `whole`, for good."""
        for index, member in enumerate(self.members):
            give_memory(member.parameter, self.view(index))
            if member.parameter.is_floating_point() and member.parameter.numel():
                self._offsets.append((index, self.layout.slots[index].offset * self.dtype.itemsize))
                self._watched.append(member.parameter)
        self._guard = Guard([m.parameter for m in self.members], [m.name for m in self.members])
        self._guard.handed.keeps = self.leaves

    @property
    def has_moved(self) -> bool:
        """Whether any of the gathered members has memory of its own."""
        base = self.whole.data_ptr()
        if base != self._base:
            self._base, self._addresses = base, [base + offset for _, offset in self._offsets]
        return list(map(Tensor.data_ptr, self._watched)) != self._addresses

    def bring_back(self) -> list[int]:
        """Make views again of members that something has given memory of their own, as `set_` does, with what they hold there.

        Gives their indices. Raises WriteError for one that has another shape, dtype or device there.
        """
        if not self.whole.data_ptr() or not self.has_moved:  # of released ones: nobody reaches them
            return []
        there_now = zip(self._offsets, self._watched, self._addresses, strict=True)
        moved = [index for (index, _), parameter, address in there_now if parameter.data_ptr() != address]
        for index in moved:
            member, own = self.members[index], self.view(index)
            there: Tensor = _DATA.__get__(member.parameter)
            if (there.shape, there.dtype, there.device) != (own.shape, own.dtype, own.device):
                raise WriteError(
                    f"{member.name}, of shape {tuple(own.shape)} and {own.dtype} on {own.device}, got other memory (set_), "
                    f"of shape {tuple(there.shape)} and {there.dtype} on {there.device}. A prepared model keeps its shapes, "
                    "dtypes and device. Copy values into it instead, under torch.no_grad()."
                )
            own.copy_(there)
            _DATA.__set__(member.parameter, own)
        return moved

    def view(self, index: int, flat: Tensor | None = None) -> Tensor:
        """Member `index` as a tensor of its own shape and dtype, inside `whole` or another flat tensor of its layout."""
        slot, member = self.layout.slots[index], self.members[index]
        part = (self.whole if flat is None else flat)[slot.offset : slot.offset + slot.numel]
        if self.dtype == torch.uint8:
            part = part.view(member.dtype)
        return part.view(slot.shape)

    def slices(self, flat: Tensor) -> Sequence[Tensor]:
        """Every member's part of a flat tensor of this layout, each 1-d, in one call to torch."""
        return self.slices_and_gaps(flat)[0]

    def slices_and_gaps(self, flat: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """`slices`, and what lies between them and behind them: together all of `flat`."""
        parts: tuple[Tensor, ...] = torch.split(flat, self._split_sizes)
        return parts[::2], [gap for gap in parts[1::2] if gap.numel()]

    def expand(self) -> None:
        """Give `whole` its storage, of unspecified content, on the current lane."""
        if not (self._fixed and self.whole.untyped_storage().nbytes()):
            self._storage().resize_(self._nbytes)

    def collapse(self) -> None:
        """Take the storage of `whole` away. The current lane must have waited for whoever reads it."""
        if not self._fixed:
            self._storage().resize_(0)

    def _storage(self) -> torch.UntypedStorage:
        """The storage of `whole`; a new one if somebody outside of torch has seen the present one.

        On a CPU torch refuses for good to resize a storage after `.numpy()`, and crashes after `share_memory_()`. It goes to
        whoever still has a view of it, with what is in it: arrays of numpy, other processes, and what autograd saved of
        views of the parameters.
        """
        storage = self.whole.untyped_storage()
        if storage.resizable() and (not self.whole.is_cpu or not storage.is_shared()):
            return storage
        FlatBuffer.replaced += 1
        with torch.inference_mode(False), unasked():  # it outlives the script's
            self.whole.data = torch.empty_like(self.whole)
            for index, member in enumerate(self.members):
                _DATA.__set__(member.parameter, self.view(index))
        return self.whole.untyped_storage()

    def fix(self) -> None:
        """From now on `whole` keeps its storage and its address, also while what is in it is out of date."""
        self._fixed = True

    @property
    def has_peers(self) -> bool:
        """Whether `copy_from_peers` gathers it, without a collective."""
        return bool(self._copies)

    def copy_from_peers(self) -> None:
        """Fill `whole` from every rank's shard, on the current lane."""
        for target, source in self._copies:
            target.copy_(source, non_blocking=True)

    @property
    def guard(self) -> Guard:
        """Of the parameters, once they are views."""
        assert self._guard is not None
        return self._guard

    @property
    def bytes_at_rest(self) -> int:
        """What this buffer occupies between uses: the shard if the whole leaves, else the whole."""
        return self.slab.nbytes if self.slab is not None else self._nbytes


def give_memory(parameter: Parameter, view: Tensor) -> None:
    """Make `parameter` a view of real memory. torch refuses `.data =` from meta, so what is behind the object is exchanged."""
    if not parameter.is_meta:
        # As torch has it: for a weight that is prepared, `parameter.data =` means to copy.
        Tensor.data.__set__(parameter, view)  # type: ignore[attr-defined]
        return
    # Not torch.utils.swap_tensors, which refuses a parameter that somebody knows weakly, as nn.LSTM knows its own.
    torch._C._swap_tensor_impl(parameter, Parameter(view.data, requires_grad=parameter.requires_grad))
