"""What an optimizer says of its own driver, for scripts that ask the optimizer: they have no name for what drives it."""

from __future__ import annotations

from typing import Any


class FlagOnOptimizer:
    """A flag of an object with an `optimizer`, which that optimizer shows too, unless its class has one of that name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> bool:
        return bool(vars(instance)[self._name])

    def __set__(self, instance: Any, value: bool) -> None:
        vars(instance)[self._name] = value
        if not hasattr(type(instance.optimizer), self._name):
            vars(instance.optimizer)[self._name] = value
