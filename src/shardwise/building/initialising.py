"""Building a model without memory: large tensors are made on the meta device, and what is done to them is recorded.

Inside `deferring()` every large floating tensor that would be made on the CPU, and in `accelerator.init()` on a GPU too, is
made on the meta device instead, with a Record beside it (`building/recording.py`). Small ones (norms, biases, rotary
frequencies) stay real: together they are nothing, and code that looks at their values works. Random operations on recorded
tensors still move the random generator of their device, because they are run once on scratch memory of one tensor, which is
dropped at once: so everything drawn later is what it would have been.

    factory (empty, zeros, randn, ...)      meta tensor + record
    in place on a recorded tensor           one more entry
    a new tensor made from recorded ones    meta tensor + record that refers to theirs
    a view                                  nothing: a record belongs to the storage
    a question about values (item, equal)   replayed, answered

What happens to such tensors after the block, and at prepare, is in `building/deferred_tensors.py`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_iter, tree_map

from ..errors import PrepareError
from ..files.scratch import scratch
from ..ranks.lanes import whole_device
from .assigning import Assigning
from .recorded_source import RecordedSource
from .recording import (
    CPU,
    Constant,
    Entry,
    Record,
    Records,
    Ref,
    Stretch,
    any_in,
    generator_state,
    replay,
    tensors_in,
    view_of,
)

aten = torch.ops.aten

# Elements. What is smaller is made as always: 16 KiB of fp32, of which a model has a few for each of its blocks.
SMALL_NUMEL = 4096

records = Records()
_shapes_only: list[bool] = []  # one entry for each open block

# A factory as what it does to empty memory: its name -> an operation in place and where its numbers are among the
# positional arguments, or None where it leaves the memory undefined.
FACTORIES: dict[str, tuple[OpOverload, Callable[[Sequence[Any]], tuple[Any, ...]]] | None] = {
    "empty": None,
    "empty_strided": None,
    "empty_like": None,
    "new_empty": None,
    "new_empty_strided": None,
    "zeros": (aten.zero_.default, lambda args: ()),
    "zeros_like": (aten.zero_.default, lambda args: ()),
    "new_zeros": (aten.zero_.default, lambda args: ()),
    "ones": (aten.fill_.Scalar, lambda args: (1,)),
    "ones_like": (aten.fill_.Scalar, lambda args: (1,)),
    "new_ones": (aten.fill_.Scalar, lambda args: (1,)),
    "full": (aten.fill_.Scalar, lambda args: (args[1],)),
    "full_like": (aten.fill_.Scalar, lambda args: (args[1],)),
    "new_full": (aten.fill_.Scalar, lambda args: (args[2],)),
    "scalar_tensor": (aten.fill_.Scalar, lambda args: (args[0],)),
    "rand": (aten.uniform_.default, lambda args: (0.0, 1.0)),
    "rand_like": (aten.uniform_.default, lambda args: (0.0, 1.0)),
    "randn": (aten.normal_.default, lambda args: (0.0, 1.0)),
    "randn_like": (aten.normal_.default, lambda args: (0.0, 1.0)),
}
# Operations whose result, or its shape, is a matter of values.
_ASKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Operations in place after which nothing of what was there before is left.
_OVERWRITING = {
    aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.copy_.default, aten.normal_.default,
    aten.uniform_.default, aten.exponential_.default, aten.bernoulli_.float, aten.log_normal_.default,
    aten.cauchy_.default, aten.geometric_.default, aten.random_.default,
}  # fmt: skip


def deferred_from(origin: Stretch, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor on the meta device whose values are the bytes of `origin`."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
    records.add(tensor, origin)
    return tensor


def deferred_storage(storage: torch.UntypedStorage, origin: Stretch) -> None:
    """Let `storage`, on the meta device, stand for the bytes of `origin`, and with it every tensor that lies in it."""
    records.add(torch.empty(0, dtype=torch.uint8, device="meta").set_(storage), origin)


def deferred_cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, which is deferred, in another dtype, deferred. For threads where nothing is recorded."""
    if tensor.dtype == dtype:
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype, device="meta")
    ref = records.ref(tensor)
    record = records.add(result, device=ref.record.device)
    entry = Entry(aten._to_copy.default, (_quote(tensor),), {"dtype": dtype}, result=(0, records.ref(result)))
    record.entries.append(entry)
    return result


def is_deferred(tensor: Tensor) -> bool:
    return records.find(tensor) is not None


def source_of(tensor: Tensor) -> RecordedSource:
    """The source of a deferred tensor, as it is now."""
    return RecordedSource(records.ref(tensor))


def last_write(tensor: Tensor) -> object:
    """Something that is another object once a deferred tensor's storage has been written again; None for one never written."""
    record = records.find(tensor)
    return record.entries[-1] if record is not None and record.entries else None


def value_of(tensor: Tensor) -> Tensor:
    """The values of a deferred tensor, in memory of their own."""
    ref = records.ref(tensor)
    return view_of(replay(ref.record, ref.upto), ref)


@contextmanager
def deferring(*, gpu: bool = False) -> Iterator[None]:
    """Inside, large tensors are made without memory, and what is done to such tensors is recorded.

    gpu: those that would be made on a GPU too; without it they are made there as always.
    Inside another such block it does nothing.
    """
    if is_deferring():
        yield
        return
    with warnings.catch_warnings(), _initialisers_recorded(), Assigning(), _Deferring(gpu):
        # Of load_state_dict with tensors that have memory: here it is recorded.
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        yield


# torch's initialisers that do nothing for a tensor on the meta device are recorded as they are called, whole. They look at
# values (until enough samples are in range), so what they do is not a fixed row of operations.
_INITIALISERS = ("_no_grad_trunc_normal_", "dirac_", "orthogonal_", "sparse_")


@contextmanager
def _initialisers_recorded() -> Iterator[None]:
    homes: list[tuple[Any, str]] = [(vars(nn.init), name) for name in _INITIALISERS]
    transformers = sys.modules.get("transformers.initialization")
    # transformers calls the functions that it found when it was imported.
    known = getattr(transformers, "TORCH_INIT_FUNCTIONS", {})
    homes += [(known, name) for name in _INITIALISERS if name in known]
    originals = [(home, name, home[name]) for home, name in homes if name in home]
    for home, name, original in originals:
        home[name] = _recorded(original)
    try:
        yield
    finally:
        for home, name, original in originals:
            home[name] = original


def _recorded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def initialise(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not is_deferred(tensor):
            return original(tensor, *args, **kwargs)
        generator = kwargs.pop("generator", None)
        record = records.find(tensor)
        assert record is not None
        entry = Entry(original, (records.ref(tensor), *args), kwargs)
        with _disable_current_modes():
            _draw(entry, generator, {id(record): record})
        record.entries.append(entry)
        return tensor

    return initialise


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, nothing is recorded: transformers makes a model for its shapes, and draws no random numbers for it."""
    _shapes_only.append(True)
    try:
        yield
    finally:
        _shapes_only.pop()


def is_deferring() -> bool:
    """Whether what is done now is recorded."""
    return any(isinstance(mode, _Deferring) for mode in _get_current_dispatch_mode_stack())


def _quote(tensor: Tensor) -> Ref:
    ref = records.ref(tensor)
    ref.record.quoted = True
    return ref


class _Deferring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, gpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._devices = ("cpu", "cuda") if gpu else ("cpu",)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _shapes_only:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = tensors_in((args, kwargs))
        touches = any_in(inputs, records)
        if name in FACTORIES:
            return self._make(func, name, args, kwargs, touches)
        changed = written_by(func, args, kwargs)
        if not touches and not self._begins(func, changed, kwargs, inputs):
            return func(*args, **kwargs)
        if _ASKING & set(func.tags) or any(not tensor.is_meta for tensor in changed):
            # Values are asked for, or go into a tensor that has memory.
            real_args, real_kwargs = tree_map(with_values, (args, kwargs))
            result = func(*real_args, **real_kwargs)
            return changed[0] if changed and isinstance(result, Tensor) else result
        return note(func, args, kwargs, changed)

    def _make(self, func: OpOverload, name: str, args: Any, kwargs: dict[str, Any], touches: bool) -> Any:
        like = args[0] if args and isinstance(args[0], Tensor) else None
        record = records.find(like) if like is not None else None
        device = kwargs.get("device")
        if device is None and like is not None:
            device = record.device if record is not None else CPU if touches else like.device
        wanted = whole_device(torch.device(device or "cpu"))
        # Someone who works on recorded tensors makes new ones where they are: C++ does for `w[0] = 1.0`, PEFT for adapters.
        explicit = wanted.type == "meta"
        if explicit:
            wanted = record.device if record is not None else CPU
        elif wanted.type not in self._devices:
            return func(*args, **kwargs)
        shape = torch.empty_like(like, device="meta") if like is not None and not like.is_meta else like
        made = func(*((shape, *args[1:]) if like is not None else args), **{**kwargs, "device": "meta"})
        large = made.is_floating_point() and made.numel() >= SMALL_NUMEL
        if not (explicit or large):
            return func(*args, **{**kwargs, "device": wanted})
        records.add(made, device=wanted)
        recipe = FACTORIES[name]
        if recipe is not None:
            op, numbers = recipe
            generator = {"generator": kwargs["generator"]} if kwargs.get("generator") is not None else {}
            note(op, (made, *numbers(args)), generator, [made])
        return made

    def _begins(
        self, func: OpOverload, changed: Sequence[Tensor], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> bool:
        """Whether an operation gives values to tensors on the meta device that no record knows yet."""
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return not inputs[0].is_meta
        unknown = [tensor for tensor in changed if tensor.is_meta]
        for tensor in unknown:
            records.add(tensor)
        return bool(unknown)


def written_by(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the operation writes into."""
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def with_values(item: Any) -> Any:
    return value_of(item) if isinstance(item, Tensor) and is_deferred(item) else item


def note(func: OpOverload, args: Any, kwargs: dict[str, Any], changed: Sequence[Tensor]) -> Any:
    """Run an operation for its shapes, and note it with the records of what it changes or makes."""
    changed_ids = {id(tensor) for tensor in changed}
    for tensor in changed:
        if not is_deferred(tensor):
            records.add(tensor)
    targets = {id(record): record for record in map(records.find, changed) if record is not None}

    def noted(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        record = records.find(item)
        if record is None:
            if item.is_meta:
                raise PrepareError(
                    f"{func} reads a tensor of shape {tuple(item.shape)} on the meta device that has no values. Make it "
                    "inside `with accelerator.init():`, or on the CPU."
                )
            return Constant(item)
        return records.ref(item) if id(record) in targets else _quote(item)

    def shape_of(item: Any) -> Any:
        if isinstance(item, Tensor) and not item.is_meta:
            return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        return item

    plain = {key: value for key, value in kwargs.items() if key not in ("device", "generator", "pin_memory")}
    kept_args, kept_kwargs = tree_map(noted, (args, plain))
    shape_args, shape_kwargs = tree_map(shape_of, (args, plain))
    if "device" in kwargs:
        shape_kwargs["device"] = torch.device("meta")
    results = func(*shape_args, **shape_kwargs)

    entry = Entry(func, kept_args, kept_kwargs)
    known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs)) if tensor.is_meta}
    made = [
        (number, tensor)
        for number, tensor in enumerate(tensors_in(results))
        if id(tensor) not in changed_ids and tensor.untyped_storage()._cdata not in known
    ]
    if not changed and not made:  # a view
        return results
    if torch.Tag.nondeterministic_seeded in func.tags:
        _draw(entry, kwargs.get("generator"), targets)
    for tensor in {id(target): tensor for tensor in changed if (target := records.find(tensor))}.values():
        record = records.find(tensor)
        assert record is not None
        ref = records.ref(tensor)
        if func in _OVERWRITING and ref.covers and not record.quoted and len(targets) == 1:
            record.entries.clear()
            record.origin = None
        record.entries.append(entry)
    device = next((r.device for r in map(records.find, tensors_in((args, kwargs))) if r is not None), CPU)
    for number, tensor in made:
        record = records.add(tensor, device=device)
        record.entries.append(
            Entry(func, kept_args, kept_kwargs, (number, records.ref(tensor)), entry.generator_state, entry.seeded)
        )
    return results


def _draw(entry: Entry, generator: torch.Generator | None, targets: Mapping[int, Record]) -> None:
    """Note the state of the generator, and move it as the operation will have moved it."""
    refs = [item for item in tree_iter((entry.args, entry.kwargs)) if isinstance(item, Ref)]
    device = next((record.device for record in targets.values()), refs[0].record.device if refs else CPU)
    entry.seeded = generator is not None
    entry.generator_state = Constant(generator.get_state() if generator is not None else generator_state(device))

    def stand_in(item: Any) -> Any:
        if isinstance(item, Constant):
            return item.value.clone()
        if isinstance(item, Ref) and id(item.record) in targets:
            # What it is filled with does not matter, how it lies in memory does: kernels draw in its order.
            extent = 1 + sum((size - 1) * stride for size, stride in zip(item.size, item.stride, strict=True))
            return (
                scratch(extent * item.dtype.itemsize, item.record.device)
                .view(item.dtype)
                .as_strided(item.size, item.stride)
            )
        return view_of(replay(item.record, item.upto), item) if isinstance(item, Ref) else item

    args, kwargs = tree_map(stand_in, (entry.args, entry.kwargs))
    with torch.no_grad():
        entry.op(*args, **kwargs, **({"generator": generator} if generator is not None else {}))
