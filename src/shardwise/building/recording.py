"""What would have been done to a tensor that has no memory, and doing it later: for all of it, or for a stretch.

A Record stands for the content of one storage: where it starts from (nothing, or a stretch of a file), and the operations
that were applied since. A Ref is a view of a record at one moment. Replaying a record gives it memory and runs its
operations again, each with the state that the random generator had then, so the numbers are those of an ordinary build.

    w = torch.empty(4096, 4096)       Record(64 MiB)
    w.normal_(0, 0.02)                  entry: normal_, generator state
    w[0].zero_()                        entry: zero_ on Ref(size (4096,), offset 0)

Where the last word on a record is a copy, a cast, or tensors put together, a stretch of it is read from stretches of what
it was made from; so weights that are only renamed, cast or stacked cost their own bytes in the file and no more.

This file knows torch's operations, and neither modules, processes nor file formats.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

from ..files.scratch import scratch

aten = torch.ops.aten
CPU = torch.device("cpu")


class Stretch(Protocol):
    """Bytes that lie somewhere else, such as a tensor in a file."""

    def read(self, begin: int, end: int) -> Tensor:
        """(end - begin,) of uint8: the bytes from `begin` on."""
        ...


@dataclass(eq=False)
class Record:
    """The content of a storage of `nbytes`: `origin`, or undefined bytes, and what was done since.

    device: where it would have been, and is replayed: a device draws numbers of its own.
    quoted: another record was made from this one as it was then, so its entries must be kept.
    """

    nbytes: int
    origin: Stretch | None = None
    device: torch.device = CPU
    entries: list[Entry] = field(default_factory=list)
    quoted: bool = False


@dataclass(frozen=True, eq=False)
class Ref:
    """A view of a record after its first `upto` entries: dtype, size and, in elements, stride and offset."""

    record: Record
    upto: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def covers(self) -> bool:
        """Whether it is all of its record, in order."""
        return self.contiguous and self.offset == 0 and self.numel * self.dtype.itemsize == self.record.nbytes


class Constant:
    """A tensor with values that an operation was given. It is copied: the original may change."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach().clone()


@dataclass(eq=False)
class Entry:
    """One operation on a record, of torch or a function in Python.

    args, kwargs: with Ref and Constant for tensors. result: for an operation that made the record, which of its results,
    and as which view of the record; None where it changed the record in place.
    generator_state: before the operation, if it draws random numbers. seeded: it came with a generator of its own.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: tuple[int, Ref] | None = None
    generator_state: Constant | None = None
    seeded: bool = False

    def inputs(self) -> Iterator[Any]:
        """Every Ref and Constant, the generator's state last."""
        for item in tree_iter((self.args, self.kwargs)):
            if isinstance(item, (Ref, Constant)):
                yield item
        if self.generator_state is not None:
            yield self.generator_state

    def run(self, record: Record, at: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Do it to `storage`, the memory of `record` after `at` entries; the memory after this one, perhaps another."""

        def real(item: Any) -> Any:
            if isinstance(item, Constant):
                return item.value.clone()
            if isinstance(item, Ref):
                mine = item.record is record and item.upto >= at
                return view_of(storage if mine else replay(item.record, item.upto), item)
            return item

        args, kwargs = tree_map(real, (self.args, self.kwargs))
        results = self._call(args, kwargs, storage.device)
        if self.result is not None:
            index, target = self.result
            made = tensors_in(results)[index]
            if target.covers and made.is_contiguous() and made.untyped_storage().nbytes() == record.nbytes:
                return made.untyped_storage()
            view_of(storage, target).copy_(made)
        return storage

    def _call(self, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        if self.generator_state is None:
            return self.op(*args, **kwargs)
        if self.seeded:
            generator = torch.Generator(device)
            generator.set_state(self.generator_state.value)
            return self.op(*args, **{**kwargs, "generator": generator})
        now = generator_state(device)
        set_generator_state(device, self.generator_state.value)
        try:
            return self.op(*args, **kwargs)
        finally:
            set_generator_state(device, now)


def generator_state(device: torch.device) -> Tensor:
    """Of the generator that operations on `device` draw from by default; on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def tensors_in(value: Any) -> list[Tensor]:
    return [item for item in tree_flatten(value)[0] if isinstance(item, Tensor)]


def view_of(storage: torch.UntypedStorage, ref: Ref) -> Tensor:
    """The tensor that `ref` stands for, in memory that its record was replayed into."""
    return torch.empty(0, dtype=ref.dtype, device=storage.device).set_(storage, ref.offset, ref.size, ref.stride)


@torch.no_grad()
def replay(record: Record, upto: int | None = None) -> torch.UntypedStorage:
    """The content of a record after its first `upto` entries (None: all), in new memory."""
    count = len(record.entries) if upto is None else upto
    if record.origin is not None:
        storage = record.origin.read(0, record.nbytes).untyped_storage()
    else:
        storage = scratch(record.nbytes, record.device).untyped_storage()
    for at, entry in enumerate(record.entries[:count]):
        storage = entry.run(record, at, storage)
    return storage


def whole(ref: Ref) -> Tensor:
    """The tensor that `ref` stands for, in memory of its own."""
    return view_of(replay(ref.record, ref.upto), ref)


# Stretches.


@torch.no_grad()
def read(ref: Ref, begin: int, end: int) -> Tensor:
    """(end - begin,) elements of `ref` from `begin` on, in row-major order; of what it was made from only what they need."""
    if ref.contiguous:
        found = _read_flat(ref, ref.offset + begin, ref.offset + end)
        if found is not None:
            return found
    flat = whole(ref).reshape(-1)
    return flat if flat.numel() == end - begin else flat[begin:end].clone()


def _read_flat(ref: Ref, begin: int, end: int) -> Tensor | None:
    """Elements of the record as a flat tensor of ref's dtype, or None if that needs more than stretches of its inputs."""
    record, entries = ref.record, ref.record.entries[: ref.upto]
    size = ref.dtype.itemsize
    if record.origin is not None and not entries:
        return record.origin.read(begin * size, end * size).view(ref.dtype)
    entry = _last_word(ref)
    return _STRETCHES[entry.op](entry, begin, end).to(ref.dtype) if entry is not None else None


def _last_word(ref: Ref) -> Entry | None:
    """The one operation that made all of the record, if a stretch of its result needs only stretches of its inputs."""
    entries = ref.record.entries[: ref.upto]
    if len(entries) != 1 or entries[0].op not in _STRETCHES:
        return None
    entry = entries[0]
    target = entry.result[1] if entry.result is not None else entry.args[0]
    if not isinstance(target, Ref) or not target.covers or target.dtype != ref.dtype:
        return None
    if entry.op is aten.copy_.default and _size(entry.args[0]) != _size(entry.args[1]):
        return None  # broadcast
    return entry


def read_in_stretches(ref: Ref) -> bool:
    """Whether `read` takes from files and constants only what the stretch is made of, whatever the stretch."""
    if not ref.record.entries[: ref.upto]:
        return ref.contiguous
    entry = _last_word(ref) if ref.contiguous else None
    if entry is None:
        return False
    inputs = [item for item in entry.inputs() if isinstance(item, Ref) and item.record is not ref.record]
    return all(read_in_stretches(item) for item in inputs)


def origin_of(ref: Ref) -> tuple[Stretch, int] | None:
    """Where the elements of `ref` lie as they are, one after another, and from which byte on. None: nowhere."""
    if not ref.contiguous:
        return None
    at = ref.offset * ref.dtype.itemsize
    if not ref.record.entries[: ref.upto]:
        return None if ref.record.origin is None else (ref.record.origin, at)
    entry = _last_word(ref)
    taken = None if entry is None or entry.op not in _COPIED else entry.args[_COPIED[entry.op]]
    if not isinstance(taken, Ref) or taken.dtype != ref.dtype:
        return None
    found = origin_of(taken)
    return None if found is None else (found[0], found[1] + at)


def _of(item: Any, begin: int, end: int) -> Tensor:
    return read(item, begin, end) if isinstance(item, Ref) else item.value.reshape(-1)[begin:end].clone()


def _size(item: Any) -> tuple[int, ...]:
    return item.size if isinstance(item, Ref) else tuple(item.value.shape)


def _of_copied(entry: Entry, begin: int, end: int) -> Tensor:
    return _of(entry.args[0], begin, end)


def _of_source(entry: Entry, begin: int, end: int) -> Tensor:
    return _of(entry.args[1], begin, end)


def _of_parts(entry: Entry, begin: int, end: int) -> Tensor:
    """Of tensors put together along a dimension: in row-major order they take turns, a run of each."""
    parts = entry.args[0]
    dim = entry.args[1] if len(entry.args) > 1 else entry.kwargs.get("dim", 0)
    stacked = entry.op is aten.stack.default
    rank = len(_size(parts[0])) + stacked
    dim %= rank
    # Elements of each part in one turn.
    runs = [math.prod(_size(part)[dim:]) for part in parts]
    turn = sum(runs)
    pieces = []
    for number in range(begin // turn, -(-end // turn)):
        start = number * turn
        for part, run in zip(parts, runs, strict=True):
            first, last = max(begin, start), min(end, start + run)
            if first < last:
                shift = number * run - start
                pieces.append(_of(part, first + shift, last + shift))
            start += run
    return torch.cat(pieces)


def _constant_of(value_at: Callable[[Entry], float]) -> Callable[[Entry, int, int], Tensor]:
    def stretch(entry: Entry, begin: int, end: int) -> Tensor:
        target: Ref = entry.args[0]
        return torch.full((end - begin,), value_at(entry), dtype=target.dtype, device=target.record.device)

    return stretch


_STRETCHES: dict[Callable[..., Any], Callable[[Entry, int, int], Tensor]] = {
    aten._to_copy.default: _of_copied,
    aten.clone.default: _of_copied,
    aten.copy_.default: _of_source,
    aten.cat.default: _of_parts,
    aten.stack.default: _of_parts,
    aten.zero_.default: _constant_of(lambda entry: 0.0),
    aten.fill_.Scalar: _constant_of(lambda entry: entry.args[1]),
}

# Of those that only copy, which argument they copy.
_COPIED = {aten._to_copy.default: 0, aten.clone.default: 0, aten.copy_.default: 1}


# What a record depends on besides files.


def records_of(record: Record) -> list[Record]:
    """`record` and every record that it was made from, each once, in an order that only their structure decides."""
    found: dict[int, Record] = {}

    def visit(record: Record) -> None:
        if id(record) not in found:
            found[id(record)] = record
            for entry in record.entries:
                for item in entry.inputs():
                    if isinstance(item, Ref):
                        visit(item.record)

    visit(record)
    return list(found.values())


def constants_of(record: Record) -> list[Constant]:
    """Every constant and generator state that replaying the record uses, each once, in the order of `records_of`."""
    entries = (entry for made_of in records_of(record) for entry in made_of.entries)
    found = {id(item): item for entry in entries for item in entry.inputs() if isinstance(item, Constant)}
    return list(found.values())


# Which storage has which record.


class Records:
    """Storages without memory -> their records. A record goes with its storage."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[torch.UntypedStorage], Record]] = {}
        # transformers asks for tensors of files on several threads; and a storage may go while one is added.
        self._lock = threading.RLock()

    def add(self, tensor: Tensor, origin: Stretch | None = None, device: torch.device = CPU) -> Record:
        """A new record for the storage of `tensor`, which is on the meta device."""
        storage = tensor.untyped_storage()
        key, record = storage._cdata, Record(storage.nbytes(), origin, device)
        with self._lock:
            self._found[key] = weakref.ref(storage, functools.partial(self._forget, key)), record
        return record

    def _forget(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        with self._lock:
            held = self._found.get(key)
            if held is not None and held[0] is gone:
                del self._found[key]

    def find(self, tensor: Tensor) -> Record | None:
        if not tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        held = self._found.get(storage._cdata)
        return held[1] if held is not None and held[0]() is storage else None

    def ref(self, tensor: Tensor) -> Ref:
        """`tensor`, which has a record, as it is now."""
        record = self.find(tensor)
        assert record is not None
        return Ref(
            record,
            len(record.entries),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
        )


def any_in(tensors: Iterable[Tensor], records: Records) -> bool:
    return any(records.find(tensor) is not None for tensor in tensors)
