"""A gradient as a script sees it between a backward and the step: `parameter.grad`, whatever part of it this rank holds.

The engine takes gradients away in the backward and keeps them in flat form, averaged, sharded, in fp32, perhaps in host memory.
In their place each parameter gets a `ShownGradient`, which is made once; showing it costs a step 0.3 us. It looks like the
whole gradient, and is put together only when it is read:

    p.grad.norm(), torch.nn.utils.clip_grad_norm_       each rank its part, one all-reduce for all gradients together
    p.grad.mul_(0.5), clamp_, zero_                     each rank its part
    anything else (p.grad[0] = 0, p.grad.sum())         the whole, gathered once for its unit; what is written there counts

So reading it where gradients are sharded is collective, as on any sharded tensor: every rank does it, or none.
`p.grad = None` and `model.zero_grad()` drop it, and a tensor assigned to `p.grad` takes its place; both are seen by the next
verb that looks at gradients (clipping, a step, a forward, a backward).

This file knows what a script may do with a gradient; `gradients.py` knows where it rests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import Any, NoReturn, Protocol
from weakref import ref

import torch
from torch import Tensor

from ..errors import ReleasedParameterError
from ..plan.blueprint import Member
from .flat import FlatBuffer
from .guard import METADATA, unasked
from .norms import Norms
from .sums import Sums

# By these a script may write without a trace that autograd's count of writes would show.
_UNTRACED = {
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.untyped_storage,
    Tensor.data_ptr,
}
_ELEMENTWISE = {
    Tensor.mul_,
    Tensor.__imul__,
    Tensor.div_,
    Tensor.__itruediv__,
    Tensor.clamp_,
    Tensor.clamp_min_,
    Tensor.clamp_max_,
    Tensor.zero_,
    Tensor.neg_,
}
# What each takes for the order where none is given; `torch.linalg.norm` means another norm where one is.
_NORMS: dict[Any, Any] = {torch.norm: "fro", Tensor.norm: "fro", torch.linalg.norm: None, torch.linalg.vector_norm: 2}


class ShownGradient(Tensor):
    """The gradient of one parameter, for scripts. It has the parameter's shape, dtype and device, and no memory."""

    _shown: Shown
    _index: int
    _arrived: Tensor | None

    @staticmethod
    def __new__(cls, shown: Shown, index: int, parameter: Tensor) -> ShownGradient:
        made: ShownGradient = Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device, storage_size=0
        )
        made._shown = shown
        made._index = index
        # What autograd added to it, in a backward that no module's output announced.
        made._arrived = None
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def whole(self) -> Tensor:
        """All of it as a plain tensor, see `Shown.whole`; written into, it counts."""
        with unasked():
            return self._shown.whole(self._index, untraced=True)

    def part(self) -> Tensor:
        """What this rank keeps of it, flat; written into, it counts."""
        with unasked():
            return self._shown.part(self._index)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA or func is Tensor.detach_:
            with unasked():
                return func(*args, **kwargs)
        return _answer(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and isinstance(args[0], cls):
            first, more = args[:2]
            first._arrived = more if first._arrived is None else first._arrived + more
            return first
        raise ReleasedParameterError(
            f"the gradient of {_name(next(a for a in args if isinstance(a, cls)))} was read ({func}) past Python, where it "
            "cannot be put together. Read shardwise.gradient(parameter), which is a plain tensor."
        )


def _name(gradient: ShownGradient) -> str:
    with unasked():
        return gradient._shown.name_of(gradient._index)


def _answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on gradients that are shown: on each rank's part where that is enough, else on the whole."""
    with unasked():
        first = args[0] if args else None
        if isinstance(first, ShownGradient) and first._shown.in_parts:
            order = _order_of_norm(func, args, kwargs) if func in _NORMS else None
            if order is not None:
                return first._shown.norm(first._index, order)
            if func in _ELEMENTWISE and not _any_tensor_with_dimensions((args[1:], kwargs)):
                first._shown.change(first._index, func, args[1:], kwargs)
                return first
        elif func is torch._foreach_norm and all(map(_in_parts, args[0])):
            order = _order_of_norm(func, args, kwargs)
            if order is not None:
                return tuple(g._shown.norm(g._index, order) for g in args[0])
        wholes: dict[int, ShownGradient] = {}
        args, kwargs = _with_wholes((args, kwargs), wholes, untraced=func in _UNTRACED)
        result = func(*args, **kwargs)
        # An in-place operation gives the gradient itself: `p.grad += x` assigns it again.
        return wholes.get(id(result), result)


def _in_parts(value: Any) -> bool:
    return isinstance(value, ShownGradient) and value._shown.in_parts


def _order_of_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """p, if `func` is the p-norm over all elements; None for any other norm."""
    given = dict(zip(("ord",), args[1:2], strict=False)) | {("ord" if k == "p" else k): v for k, v in kwargs.items()}
    default = _NORMS.get(func, 2)
    order = given.pop("ord", default)
    if len(args) > 2 or any(given.values()) or (func is torch.linalg.norm and order is not None):
        return None
    if order in (None, "fro"):
        return 2.0
    return float(order) if isinstance(order, (int, float)) and order > 0 else None


def _any_tensor_with_dimensions(values: Any) -> bool:
    if isinstance(values, Tensor):
        return values.ndim > 0
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    return any(map(_any_tensor_with_dimensions, items))


def _with_wholes(value: Any, wholes: dict[int, ShownGradient], *, untraced: bool) -> Any:
    """`value` with each gradient that is shown as a plain tensor. wholes: gets id(plain tensor) -> the gradient."""
    if isinstance(value, ShownGradient):
        whole = value._shown.whole(value._index, untraced=untraced)
        wholes[id(whole)] = value
        return whole
    if isinstance(value, (tuple, list)):
        return type(value)(_with_wholes(item, wholes, untraced=untraced) for item in value)
    if isinstance(value, dict):
        return {key: _with_wholes(item, wholes, untraced=untraced) for key, item in value.items()}
    return value


class UnitGradients(Protocol):
    """What is asked of a unit's gradients by what shows them to scripts; `Gradients` says what each member is."""

    used: list[bool]
    buffer: FlatBuffer
    sums: Sums

    def parts(self, index: int) -> list[Tensor]: ...

    def put(self, index: int, gradient: Tensor) -> None: ...

    def forget(self, indices: Collection[int]) -> None: ...


_grad_of = attrgetter("parameter.grad")  # for `map`: a step looks at every parameter several times


class Shown:
    """The gradients of one buffer as scripts see them.

    gradients: where they are; it owns this object. norms: those of all the model's.
    """

    def __init__(self, gradients: UnitGradients, norms: Norms) -> None:
        # What a Parameter holds as its `grad` is in C++, where the garbage collector does not see a circle: so nothing here
        # leads to a parameter.
        self._gradients = ref(gradients)
        self._norms_of_all = ref(norms)
        self._made: list[ShownGradient] = []
        # What the parameters have as `grad` if the script has done nothing to it.
        self._showing: list[ShownGradient | None] = [None] * len(gradients.buffer.members)
        # All of the buffer's gradients, flat, since somebody asked for a whole one: what counts until it is taken back.
        self._flat: Tensor | None = None
        self._version = 0
        self._untraced = False

    def name_of(self, index: int) -> str:
        return self._members[index].name

    @property
    def _source(self) -> UnitGradients:
        found = self._gradients()
        return found if found is not None else self._refuse_gone()

    @staticmethod
    def _refuse_gone() -> NoReturn:
        raise ReleasedParameterError("a gradient of a model that is no longer prepared was read: it is gone.")

    @property
    def _members(self) -> Sequence[Member]:
        return self._source.buffer.members

    @property
    def _norms(self) -> Norms:
        found = self._norms_of_all()
        return found if found is not None else self._refuse_gone()

    @property
    def in_parts(self) -> bool:
        """Whether ranks hold parts, of all that there is, and nobody has put them together."""
        self._norms.finish_pass()  # one that was interrupted may have left sums of a rank's own
        return self._flat is None and self._source.sums.own is None and self._source.sums.parted

    # For the engine.

    def show(self) -> None:
        """Let scripts see what there is, as `grad` of the parameters that have a gradient."""
        used = self._source.used
        with unasked():
            if not self._made:
                self._made = [ShownGradient(self, i, m.parameter) for i, m in enumerate(self._members)]
            self._showing = [made if was_used else None for made, was_used in zip(self._made, used, strict=True)]
            for member, made in zip(self._members, self._showing, strict=True):
                if made is not None:
                    member.parameter.grad = made

    def put_back(self) -> None:
        """Show what there is although a backward has not ended; what autograd has brought of it waits behind what is shown."""
        with unasked():
            arrived = list(map(_grad_of, self._members))
        self.show()
        for made, grad in zip(self._showing, arrived, strict=True):
            if made is not None and grad is not made:
                made._arrived = grad

    def hide(self) -> None:
        """The gradients are gone: parameters have none."""
        self._flat = None
        with unasked():
            for member in self._members:
                member.parameter.grad = None
        self._showing = [None] * len(self._members)

    def hide_only(self, indices: Collection[int]) -> None:
        """Take these off their parameters."""
        with unasked():
            for index in indices:
                if self._showing[index] is not None:
                    self._members[index].parameter.grad = None
                    self._showing[index] = None

    def look(self, *, before_backward: bool = False) -> None:
        """Take over what a script has done to gradients since they were shown.

        before_backward: leave room for those that autograd is about to bring.
        """
        self._settle()
        with unasked():
            grads = list(map(_grad_of, self._members))
        if not all(map(is_, grads, self._showing)):  # asked several times in a step, mostly while the device waits
            self._take_over(grads)
            if not before_backward:
                self.show()
        if before_backward:
            with unasked():
                for index, made in enumerate(self._showing):
                    if made is not None:
                        self._members[index].parameter.grad, made._arrived = made._arrived, None
                        self._showing[index] = None

    def _take_over(self, grads: Sequence[Tensor | None]) -> None:
        """Give the engine what a script has put in the place of gradients, and forget those that it has dropped."""
        source = self._source
        changed = [i for i, (grad, made) in enumerate(zip(grads, self._showing, strict=True)) if grad is not made]
        dropped = [index for index in changed if grads[index] is None]
        for index in changed:
            if (made := self._showing[index]) is not None:
                made._arrived = None
        for index in dropped:
            self._showing[index] = None
        if dropped:
            source.forget(dropped)
        for index in changed:
            grad = grads[index]
            if grad is not None:
                source.put(index, grad.to_dense() if grad.is_sparse else grad)
                with unasked():
                    self._members[index].parameter.grad = None
                self._showing[index] = None

    @contextmanager
    def without(self, index: int) -> Iterator[None]:
        """Inside, the gradient that autograd has just given a parameter is not there."""
        with unasked():
            parameter = self._members[index].parameter
            arrived = parameter.grad
            if isinstance(arrived, ShownGradient):  # autograd added to what was shown, which keeps it
                arrived = None
            else:
                parameter.grad = None
            yield
            if arrived is not None:
                parameter.grad = arrived

    def _settle(self) -> None:
        """What was written into whole gradients counts from here on."""
        flat, self._flat = self._flat, None
        if flat is not None and (self._untraced or flat._version != self._version):
            self._source.sums.take_back(flat)

    # For scripts.

    def _refuse_dropped(self, index: int) -> None:
        if self._showing[index] is None:
            raise ReleasedParameterError(
                f"the gradient of {self.name_of(index)} was read after it had been dropped, by zero_grad or the next backward. "
                "Keep a copy: p.grad.clone()."
            )

    def whole(self, index: int, *, untraced: bool = False) -> Tensor:
        """The gradient as a plain tensor, in the dtype that it is kept in; what is written there counts.

        untraced: the caller may write where `_version` does not show it. Collective where gradients are sharded.
        """
        self._norms.finish_pass()
        self._refuse_dropped(index)
        source = self._source
        if self._flat is None:
            if source.sums.parted and not source.sums.is_own:
                self._norms.meet("a whole gradient", self.name_of(index))
            self._flat = source.sums.whole()
            self._version, self._untraced = self._flat._version, False
        self._untraced |= untraced
        return source.buffer.view(index, self._flat)

    def part(self, index: int) -> Tensor:
        """What this rank keeps of a gradient, flat; it may be written until the next verb."""
        self._norms.finish_pass()
        self._refuse_dropped(index)
        source = self._source
        if source.sums.own is not None:
            return self.whole(index, untraced=True).view(-1)
        self._settle()
        source.sums.changed()
        parts = source.parts(index)
        return parts[0] if parts else torch.empty(0, dtype=source.sums.dtype, device=source.buffer.whole.device)

    def norm(self, index: int, order: float) -> Tensor:
        """The p-norm of one gradient over all ranks, a scalar on the device. Collective."""
        return self._norms.of(self._source, index, order)

    def change(self, index: int, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Apply an element-wise operation in place, each rank to its part."""
        self._norms.finish_pass()
        for part in self._source.parts(index):
            func(part, *args, **kwargs)
        self._source.sums.changed()
