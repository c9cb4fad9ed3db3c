"""The repeated blocks of a model, how one is recomputed, and what its `forward` must know of key-value caches to be replaced.

A module's call runs its hooks around its `forward`. What compiles or recomputes a block replaces `forward`, on the instance, so
that the engine's hooks, which gather and release, stay outside. Models of transformers make an empty key-value cache in
training too unless `use_cache` is off; it is kept from the block, as their own checkpointing does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..plan.units import FoundUnits

logger = logging.getLogger("shardwise")

_CACHES = ("past_key_values", "past_key_value", "layer_past")
_said: set[str] = set()


def repeated_blocks(model: nn.Module, units: Sequence[str] | FoundUnits | None = None) -> list[nn.Module]:
    """Modules of a class that repeats, each a unit of its own, in the model's order. The model is not sharded yet.

    units: as `find_units` takes them.
    """
    return (units if isinstance(units, FoundUnits) else FoundUnits.of(model, units)).repeated


def without_cache(kwargs: dict[str, Any], otherwise: str) -> bool:
    """Take an empty key-value cache out of a block's arguments. False if there is one with content, which must stay.

    otherwise: what is said then, once for each text.
    """
    for name in _CACHES:
        if kwargs.get(name) is None:
            continue
        if not _is_empty(kwargs[name]):
            if otherwise not in _said:
                _said.add(otherwise)
                logger.warning("%s", otherwise)
            return False
        kwargs[name] = None
    return True


class Replacement(functools.partial[Any]):
    """What a module has on the instance in place of a method. A copy of the module, or a file of it, has what was there before:

    a closure would run on the weights of the module that was copied, and a copy is nobody's.
    """

    @classmethod
    def of(cls, module: nn.Module, name: str, function: Callable[..., Any], before: Any) -> Replacement:
        """before: what the module itself had under that name; None where it was its class's."""
        found = cls(function)
        found._before = (module, name) if before is None else (SimpleNamespace(before=before), "before")
        return found

    _before: tuple[Any, str]

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._before


def recomputed(
    function: Callable[..., Any],
    module: nn.Module,
    around: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None = None,
) -> Callable[..., Any]:
    """`function`, a forward that takes the module first, of which autograd keeps the inputs alone; in torch's newer form.

    module: one with parameters, on the device on which the function runs. Before it recomputes, torch puts back the random
    generators of those devices that it finds among the positional arguments. Where a block is called by keyword it would find
    none, and dropout would draw other masks than in the forward; so it is given an empty tensor to find.
    around: gives what the forward and its recomputation run inside of.
    """
    contexts: dict[str, Any] = (
        {} if around is None else {"context_fn": around}
    )  # compilers take the argument for theirs
    here = torch.empty(0, device=next(module.parameters()).device)

    @functools.wraps(function)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Tensor) and value.device == here.device for value in args):
            inner = functools.partial(function, module, **kwargs)
            return checkpoint(inner, *args, use_reentrant=False, **contexts)

        def run(_: Tensor, *args: Any) -> Any:
            return function(module, *args, **kwargs)

        return checkpoint(run, here, *args, use_reentrant=False, **contexts)

    return forward


class ReplacedForwards:
    """The `forward` of modules, replaced on the instances until `undo`. The one thing that is hung on a user's module."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """forward: takes the module first."""
        own = vars(module).get("forward")
        self._before.append((module, own))
        module.forward = Replacement.of(module, "forward", functools.partial(forward, module), own)

    def undo(self) -> None:
        """Give every module the `forward` back that it had."""
        for module, own in reversed(self._before):
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own
        self._before.clear()


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's `forward` as a function that takes the module first."""
    own = vars(module).get("forward")
    if own is None:
        function: Callable[..., Any] = type(module).forward
        return function
    if isinstance(own, MethodType):
        return own.__func__
    if isinstance(own, Replacement) and own.args[:1] == (module,):
        return own.func

    @functools.wraps(own)  # a script has put another function in its place
    def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return callable(length) and int(length()) == 0
