"""What a module hands over, and how its caller opens it."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor


@dataclass
class Data:
    out: Tensor
    more: Any = None


class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: a dictionary with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Named = namedtuple("Named", "out more")

PACKED: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, None),
    "list": lambda x: [x],
    "nested": lambda x: {"a": [(x,)]},
    "dict": lambda x: {"out": x, "more": None},
    "namedtuple": lambda x: Named(x, 3),
    "dataclass": Data,
    "namespace": lambda x: SimpleNamespace(out=x),
    "output": lambda x: Output(out=x),
    "userdict": lambda x: UserDict(out=x),
    "set": lambda x: {x},
    "closure": lambda x: lambda: x,
    "generator": lambda x: (item for item in (x,)),
    "two": lambda x: (x * 0.5, x * 0.5),
}


def opened(how: str, value: Any) -> Tensor:
    if how == "two":
        return value[0] + value[1]
    if how == "nested":
        return value["a"][0][0]
    if how in ("closure",):
        return value()
    if hasattr(value, "out"):
        return value.out
    return value["out"] if how in ("dict", "userdict") else next(iter(value))
