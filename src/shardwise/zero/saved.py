"""Weights that autograd keeps, followed to their unit, so that a backward gathers what it reads, wherever it comes from.

A backward mostly comes through the outputs of modules, where `hooks.py` waits for it. It need not: a loss may be made of what
a module handed over in an object of the user's, of what a user's hook caught inside of a block, or of weights read in
`gathered`. So while the ranks still learn the order of the passes, and wherever weights are read inside of `gathered`, each
weight that is kept is packed together with its unit, and unpacked by asking for that unit:

    forward     kept: x, W1 of unit 1          packed: x, (unit 1, W1)
    backward    unpack (unit 1, W1)            need(unit 1), then W1

That costs the host 1 us for each tensor that is kept, 2 to 5% of a step that the host bounds. Where the hooks on outputs have
asked for every unit first, nothing is packed any more; where they have not, packing goes on, and is told of once. A backward
that later comes another way than in those first steps ends in the error of `guard.py`.

torch.func's `grad`, `vjp` and what is made of them refuse to run where anything is packed. They say so by a context manager of
torch's; while weights are followed there is one in its place which puts the engine's hooks aside first. What a transform keeps
is not followed then: its own gradients are over before the module is, and for those of the loss there are the hooks on outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor
from torch.autograd import graph

from ..errors import ReleasedParameterError
from .flat import FlatBuffer
from .unit import Unit, Weights

log = logging.getLogger("shardwise")

# Backwards in which a unit that is asked for too late shows itself. In the first, nothing is gathered ahead.
_LEARNED_IN = 2


class _Kept:
    """A tensor that lives in a unit's weights. in_forward: of a module; else it was read in `gathered`.

    A graph keeps it in C++, where the garbage collector does not see a circle: a module may keep a tensor of that graph.
    """

    __slots__ = ("in_forward", "tensor", "unit")

    def __init__(self, unit: Unit, tensor: Tensor, in_forward: bool) -> None:
        self.unit = ref(unit)
        self.tensor = tensor
        self.in_forward = in_forward


class _Theirs:
    """What the hooks of the script, which these lie over, made of a tensor."""

    __slots__ = ("packed", "unpack")

    def __init__(self, packed: Any, unpack: Callable[[Any], Tensor]) -> None:
        self.packed = packed
        self.unpack = unpack


class _Packer:
    """What autograd asks on this thread until it is taken off.

    An interrupt can leave it there after its model has been dropped: so it must not keep the model in memory.
    theirs: the hooks that lay on top before.
    """

    __slots__ = ("in_forward", "saved", "theirs")

    def __init__(
        self, saved: SavedWeights, theirs: tuple[Callable[..., Any], Callable[..., Any]] | None, in_forward: bool
    ) -> None:
        self.saved = ref(saved)
        self.theirs = theirs
        self.in_forward = in_forward

    def pack(self, tensor: Tensor) -> Any:
        saved = self.saved()
        if tensor.grad_fn is not None:
            # A node that keeps its own output would keep itself; autograd puts the node back by itself.
            tensor = tensor.detach()
        unit = saved.owner(tensor) if saved is not None else None
        if unit is not None:
            return _Kept(unit, tensor, self.in_forward)
        return tensor if self.theirs is None else _Theirs(self.theirs[0](tensor), self.theirs[1])

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Kept):
            saved = self.saved()
            return packed.tensor if saved is None else saved.read(packed)
        return packed.unpack(packed.packed) if isinstance(packed, _Theirs) else packed

    def take_off(self) -> None:
        """It is asked no more, wherever it lies among the hooks of this thread.

        Where a block of the script's own around the forward has been left since, it has taken off what lay on top: this. Then
        the script's are still there, and go in its place.
        """
        autograd: Any = torch._C._autograd
        above = []
        while (top := autograd._top_saved_tensors_default_hooks(False)) is not None and _packer_of(top) is not self:
            above.append(top)
            autograd._pop_saved_tensors_default_hooks()
        if top is not None:
            autograd._pop_saved_tensors_default_hooks()
        for pack, unpack in reversed(above if top is not None else above[1:]):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
        _restore_if_over()


def _take_off(pushed: list[tuple[_Packer, int]]) -> None:
    """The model is gone: an interrupt that ended its last forward has left nobody else to take these off this thread."""
    while pushed:
        packer, thread = pushed.pop()
        if thread == get_ident():
            packer.take_off()


class SavedWeights:
    """Packs the weights of `units` that autograd keeps.

    recall: called in a backward that is about to read a unit's weights; when it returns they may be read. It gives whether they
            could be read without it.
    main:   whether this rank tells the user.
    """

    def __init__(self, units: Sequence[Unit], recall: Callable[[Unit], bool], *, main: bool) -> None:
        self._recall = recall
        self._main = main
        self._surprised = False
        self._owners: dict[int, Unit] = {}  # by the address of a storage
        self._replaced = 0  # how many storages had been replaced when those were asked for
        self._pushed: list[tuple[_Packer, int]] = []  # those that are asked now, each with its thread
        finalize(self, _take_off, self._pushed).atexit = False
        self.renew(units)

    def renew(self, units: Sequence[Unit]) -> None:
        """These are the model's units from now on; what earlier forwards have packed keeps its own."""
        self._units = units
        self._any = any(unit.leaves for unit in units)
        self._backwards = 0

    @property
    def follows(self) -> bool:
        """Whether forwards that record a graph are to run inside `following`."""
        return self._any and (self._surprised or self._backwards < _LEARNED_IN)

    def surprise(self) -> None:
        """From the next forward on, weights are followed for good: hooks on outputs do not see all that is read."""
        self._surprised = True

    def backward_ended(self) -> None:
        """A whole backward has passed: if it asked for every unit by the hooks on outputs, later ones will."""
        self._backwards += 1

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, outside of forwards, what is kept of weights knows its unit."""
        began = self.begin(in_forward=False)
        try:
            yield
        finally:
            if began:
                self.end()

    def begin(self, *, in_forward: bool = True) -> bool:
        """Pack from now on, on this thread. False where torch allows no hooks, as inside of torch.func's transforms."""
        autograd: Any = torch._C._autograd
        if not self._any or not autograd._saved_tensors_hooks_is_enabled():
            return False
        self._look()
        packer = _Packer(self, autograd._top_saved_tensors_default_hooks(False), in_forward)
        autograd._push_saved_tensors_default_hooks(packer.pack, packer.unpack)
        graph.disable_saved_tensors_hooks = _disable_others
        self._pushed.append((packer, get_ident()))
        return True

    def _look(self) -> None:
        """Ask for the storages of all units. What a script has seen outside of torch gets another one when it is released."""
        self._replaced = FlatBuffer.replaced
        self._owners = {part.whole.untyped_storage()._cdata: unit for unit in self._units for part in unit.parts}

    def end(self) -> None:
        self._pushed.pop()
        torch._C._autograd._pop_saved_tensors_default_hooks()
        _restore_if_over()

    def unwind(self) -> None:
        """As `end`, where a forward was over without a word: hooks of the script may lie over these by now."""
        packer, _ = self._pushed.pop()
        packer.take_off()

    def owner(self, tensor: Tensor) -> Unit | None:
        """The unit in whose weights `tensor` lives."""
        if self._replaced != FlatBuffer.replaced:  # an address that is free again may be anybody's now
            self._look()
        return self._owners.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None

    def read(self, kept: _Kept) -> Tensor:
        """What was packed, in memory that may be read."""
        unit = kept.unit()
        if unit is not None and unit.leaves:
            self._read(unit, kept.in_forward)
        return kept.tensor

    def _read(self, unit: Unit, in_forward: bool) -> None:
        if torch._C._current_graph_task_id() == -1:
            if unit.state is not Weights.GATHERED:
                raise ReleasedParameterError(
                    f"a weight of unit {unit.name} that a graph has kept was read outside of a backward, while it is released. "
                    "Read it inside `with shardwise.gathered(model):`, on every rank."
                )
            return
        if self._recall(unit) or not in_forward:
            return
        if not self._surprised and self._main:
            log.warning(
                "A backward came to unit %s past the outputs of its modules: through an object of the script's own that a "
                "module returned, or a tensor that was caught inside of one. From now on weights that autograd keeps are "
                "followed one by one, which costs the host about a microsecond for each tensor.",
                unit.name,
            )
        self._surprised = True


_disable = graph.disable_saved_tensors_hooks


def _packer_of(hooks: tuple[Any, Any]) -> _Packer | None:
    """Who stands behind hooks on this thread's stack, if it is the engine."""
    packer = getattr(hooks[1], "__self__", None)
    return packer if isinstance(packer, _Packer) else None


def _top_of_ours() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The hooks that are asked now on this thread, if they are the engine's."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return top if top is not None and _packer_of(top) is not None else None


@contextmanager
def _disable_others(error_message: str) -> Iterator[None]:
    """torch's `disable_saved_tensors_hooks`, which raises where there are any, but the engine's are put aside meanwhile."""
    autograd: Any = torch._C._autograd
    aside = []
    while (top := _top_of_ours()) is not None:
        aside.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        with _disable(error_message):
            yield
    finally:
        for pack, unpack in reversed(aside):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def _restore_if_over() -> None:
    """Put torch's back where nothing is followed: torch.compile looks through it, and not through this file's."""
    if _top_of_ours() is None:
        graph.disable_saved_tensors_hooks = _disable
