"""Calls that autograd and guards keep for the engine, and that keep no engine in memory.

torch holds hooks in C++, where the garbage collector cannot see that they close a circle: a module may keep a tensor of its own
graph, a parameter its hook, a script a graph. A strong reference in one of these would keep a prepared model for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn
from weakref import ref

from ..errors import ReleasedParameterError
from .unit import Unit


def weakly(method: Callable[..., Any], *held: Any, gone: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
    """`method(*held, *arguments)` of a bound method. Where its object or one of `held` is no more: `gone(*arguments)`."""
    bound: Any = method
    function, sources = bound.__func__, [ref(item) for item in (bound.__self__, *held)]

    def call(*arguments: Any) -> Any:
        found = [source() for source in sources]
        for item in found:  # no generator: each block calls this several times in a step
            if item is None:
                return gone(*arguments)
        return function(*found, *arguments)

    return call


class Entry:
    """A module whose forward the engine hears of.

    units:  that it needs, and their names. ending: those of them that nobody needs once its backward is over.
    begins: for the gradients of its outputs, calls before(entry, gradient). ends: for when those of its inputs are there, calls
            after(entry, *gradients). before, after: bound methods.
    """

    def __init__(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        self.units: list[Unit] = []
        self.ending: list[Unit] = []
        self.names: list[str] = []
        names = self.names

        def gone(*_: Any) -> None:
            if names:
                _refuse_outlived(names[0])

        self.begins = weakly(before, self, gone=gone)
        self.ends = weakly(after, self)

    def clear(self) -> None:
        """It needs no unit."""
        for found in (self.units, self.names, self.ending):
            found.clear()


def _refuse_outlived(unit: str) -> NoReturn:
    raise ReleasedParameterError(
        f"a backward came to unit {unit} of a model that is gone or no longer prepared, and its weights with it. Keep the "
        "model, and the optimizer or Accelerator that has it, until the backward is over."
    )
