"""The hooks on a model's modules and parameters, by which `Hooks` hears of it: the only ones that the engine registers.

What torch keeps of them in C++ holds the engine weakly, see `weakly.py`; those on modules keep it alive with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .guard import unasked
from .nested import mapped, tensors_in
from .unit import Unit
from .weakly import Entry, weakly


class Hears(Protocol):
    """What is told; `Hooks` says what each means."""

    def before_forward(
        self, kind: int, entry: Entry, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None: ...

    def after_forward(self, entry: Entry, module: nn.Module, args: Any, output: Any) -> None: ...

    def before_backward(self, entry: Entry, gradient: Tensor) -> None: ...

    def after_backward(self, entry: Entry, *gradients: Tensor) -> None: ...

    def gradient_arrived(self, unit: Unit, index: int) -> None: ...

    def notice(self, parameter: Tensor) -> None: ...

    def wanted(self, unit: Unit, name: str) -> bool: ...


class Listening:
    """The hooks on one model. root: its forward is the pass, also when no unit belongs to it. owner: is told."""

    def __init__(self, root: nn.Module, owner: Hears) -> None:
        self._owner_of = ref(owner)
        self._handles: list[RemovableHandle] = []
        self._late: dict[int, RemovableHandle] = {}  # by the id of a weight that is to be thawed
        self._entries: dict[nn.Module, Entry] = {}
        self._heard: set[Unit] = set()  # those whose gradients are counted
        self._listen(root)

    @property
    def _owner(self) -> Hears:
        owner = self._owner_of()
        assert owner is not None  # it calls
        return owner

    def renew(self, units: Sequence[Unit]) -> None:
        """These are the units from now on.

        A module that has hooks keeps them, so that they stay in their order among the script's own.
        """
        owner = self._owner
        for entry in self._entries.values():
            entry.clear()
        for unit in units:
            for module in unit.entries if unit.leaves else ():
                if module not in self._entries:
                    self._listen(module)
                entry = self._entries[module]
                entry.units.append(unit)
                entry.names.append(unit.name)
                # Of blocks in turn the first one's backward is the last that reads their unit.
                if not unit.in_turn or module is unit.entries[0]:
                    entry.ending.append(unit)
            if unit.trained is not None and unit not in self._heard:
                self._heard.add(unit)
                for index, member in enumerate(unit.trained.buffer.members):
                    hook = _counted(owner, unit, index)
                    parameter: Any = member.parameter  # torch does not annotate its hooks
                    trained = parameter.requires_grad
                    # torch takes hooks of no other, and keeps them when it is frozen again.
                    parameter.requires_grad_(True)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                    parameter.requires_grad_(trained)
            for buffer in unit.parts:
                buffer.guard.on_read = weakly(owner.wanted, unit, gone=lambda _: False)

    def _listen(self, module: nn.Module) -> None:
        kind, owner = len(self._entries), self._owner
        entry = self._entries[module] = Entry(owner.before_backward, owner.after_backward)
        before = ModuleHook(owner.before_forward, kind, entry)
        after = ModuleHook(owner.after_forward, entry)
        self._handles += [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]

    def listen_to(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hear of a backward that comes to these, whose gradients nobody counts, and perhaps to no others."""
        for parameter in parameters:
            if id(parameter) not in self._late:
                of: Any = parameter  # torch does not annotate its hooks
                with unasked():
                    self._late[id(parameter)] = of.register_post_accumulate_grad_hook(weakly(self._owner.notice))

    def stop_listening(self) -> None:
        while self._late:
            self._late.popitem()[1].remove()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stop_listening()


class ModuleHook(partial[Any]):
    """A hook on a module. In a copy of the module, or in a file of it, there is one that does nothing, of Python's own.

    So a copy is nobody's: it knows no engine, and who loads the file need not have this library.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments and gives None


def change_outputs(module: nn.Module, change: Callable[[Any], Any]) -> RemovableHandle:
    """From now on a call of `module` gives `change(output)`: every other hook on it, earlier or later, is given that too."""
    return module.register_forward_hook(ModuleHook(_changed, change), prepend=True)


def _changed(change: Callable[[Any], Any], module: nn.Module, args: Any, output: Any) -> Any:
    return change(output)


def call_before_forwards(module: nn.Module, call: Callable[[], None]) -> RemovableHandle:
    """From now on `call` comes before every other hook on `module`."""
    return module.register_forward_pre_hook(ModuleHook(_called, call), prepend=True)


def _called(call: Callable[[], None], module: nn.Module, args: Any) -> None:
    call()


def _counted(hooks: Hears, unit: Unit, index: int) -> Callable[[Tensor], None]:
    """`weakly(hooks.gradient_arrived, unit)` for a parameter, written out because a step calls it for each of them."""
    listener, source = ref(hooks), ref(unit)

    def arrived(_: Tensor) -> None:
        hooks, unit = listener(), source()
        if hooks is not None and unit is not None:
            hooks.gradient_arrived(unit, index)

    return arrived


class _Watch(torch.autograd.Function):
    """The identity. Its backward runs when every gradient of its inputs is ready, that is last in the module's backward."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return (None, *gradients)


def _has_views(tensor: Tensor) -> bool:
    return tensor.layout is torch.jagged or (tensor.layout is torch.strided and not tensor.is_nested)


def watch_inputs(inputs: tuple[Any, Any], call: Callable[..., None]) -> tuple[Any, Any] | None:
    """The inputs with those that need a gradient led through an identity that calls; None if none does.

    Of a single tensor it is a view with a hook on its node: that costs the host half of what a Function costs, and the module
    may write into it. Then the node is no part of the graph any more, and nobody calls. Nor does anyone where torch has no
    views of an input, as of a sparse one.
    """
    tensors = {id(tensor): tensor for tensor in tensors_in(inputs) if tensor.requires_grad}
    if not tensors or not all(map(_has_views, tensors.values())):
        return None
    if len(tensors) == 1:
        first = next(iter(tensors.values()))
        view = first.view_as(first)
        assert view.grad_fn is not None
        view.grad_fn.register_hook(call)
        watched = {id(first): view}
    else:
        outputs = _Watch.apply(call, *tensors.values())  # type: ignore[no-untyped-call]
        watched = dict(zip(tensors, outputs, strict=True))
    args, kwargs = mapped(inputs, lambda tensor: watched.get(id(tensor), tensor))
    return args, kwargs
