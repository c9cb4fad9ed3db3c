"""What an optimizer keeps of a parameter, told apart: elementwise states, and numbers. It knows no ranks and no shards."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import OptimizerError
from .comparing import plain
from .intervals import Interval
from .kept import is_wrapper

# Which of the optimizer's models, and a parameter's name in it.
Key = tuple[int, str]
K = TypeVar("K")

# The numbers of torch's optimizers, which a parameter without dimensions has beside elementwise states of the same shape.
NUMBERS = ("step", "mu_product", "eta", "mu")
# Those of them that live beside their parameter only where a kernel on the device counts with them.
COUNTS = ("step", "mu_product")
# How an optimizer computes belongs to the machine that it runs on, not to what is saved.
MACHINE = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class StateOf:
    """The states of one parameter's interval: elementwise ones, and numbers that go with all of it."""

    key: Key
    elementwise: dict[str, Interval]
    numbers: dict[str, Any]


@dataclass(frozen=True)
class WholeState:
    """A whole parameter's states, told apart. elementwise: flat tensors of all its elements, on any device."""

    elementwise: dict[str, Tensor]
    numbers: dict[str, Any]


def has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether these are states that steps have made: a constructor counts none, and makes all elements alike."""
    if float(state.get("step", 0)) > 0:
        return True
    return any(_has_elements(value) and not _is_even(value) for value in state.values())


def in_little_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same states, of which those with equal elements take the memory of one."""
    return {
        name: value.reshape(-1)[:1].clone().view((1,) * value.ndim).expand(value.shape)
        if _has_elements(value) and _is_even(value)
        else value
        for name, value in state.items()
    }


def _has_elements(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not is_wrapper(value) and value.numel() > 1


def _is_even(value: Tensor) -> bool:
    return bool((value == value.reshape(-1)[0]).all())


def kinds(
    whole: Mapping[Key, WholeState],
) -> tuple[Callable[[Key], Mapping[str, torch.dtype]], Callable[[Key], Mapping[str, Any]]]:
    """The dtypes of elementwise states, and the numbers, by key."""
    none = WholeState({}, {})
    return (
        lambda key: {name: value.dtype for name, value in whole.get(key, none).elementwise.items()},
        lambda key: whole.get(key, none).numbers,
    )


def split_states(
    states: Mapping[K, Mapping[str, Any]],
    shapes: Mapping[K, tuple[int, ...]],
    name_of: Callable[[K], str],
    is_whole: Callable[[K], bool],
) -> dict[K, WholeState]:
    """Whole states by parameter, each with its elementwise ones and its numbers.

    Elementwise states of a parameter without dimensions have the shape of numbers. They are those that are elementwise for a
    parameter with dimensions, and those that no optimizer of torch has as a number.
    is_whole: whether a parameter is never cut: then tensors of other shapes count as numbers.
    Raises OptimizerError for a tensor that has dimensions, but not its parameter's.
    """
    numbers = set(NUMBERS)
    elementwise = set()
    for key, state in states.items():
        for name, value in state.items() if shapes[key] else ():
            if is_like(value, shapes[key]):
                elementwise.add(name)
            elif isinstance(value, Tensor) and not value.ndim:
                numbers.add(name)
    found: dict[K, WholeState] = {}
    for key, state in states.items():
        parts = found[key] = WholeState({}, {})
        for name, value in state.items():
            like = is_like(value, shapes[key])
            odd = isinstance(value, Tensor) and (value.ndim or not shapes[key]) and not like
            if odd and not is_whole(key):
                raise OptimizerError(
                    f"the state {name} of {name_of(key)} has shape {tuple(value.shape)}, but the parameter's is {shapes[key]}."
                )
            if like and (shapes[key] or name in elementwise or name not in numbers):
                parts.elementwise[name] = value.detach().reshape(-1)
            else:
                parts.numbers[name] = value
    return found


def digest(states: Mapping[Key, WholeState], *more: Any) -> int:
    """A sum over step counts, kinds of states and `more`: ranks that were given the same have the same; 0 of nothing."""
    kinds = [
        (key, sorted((name, plain(value)) for name, value in parts.numbers.items()), sorted(parts.elementwise))
        for key, parts in states.items()
    ]
    return zlib.crc32(repr((kinds, more)).encode()) if states or more else 0


def is_like(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is a tensor of this shape, with a number for each element."""
    return isinstance(value, Tensor) and tuple(value.shape) == shape and not is_wrapper(value)
