"""Whether an optimizer that was played in another way has the same numbers: weights, states, settings and attributes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .kept import is_wrapper, pieces
from .rehearsal import Outcome, StandIn, is_attribute, is_like

_TOLERANCE = 1e-5  # of the way that a weight has gone, and of a number


def difference(stand_ins: Sequence[StandIn], reference: Outcome, found: Outcome) -> str | None:
    """The first that `found` has other than `reference`, in words that go on with "where ..."; None if all is the same."""
    for number, stand_in in enumerate(stand_ins):
        start = stand_in.start.reshape(-1)
        for right, own in zip(reference.weights, found.weights, strict=True):
            if not _is_near(own[number] - start, right[number] - start, own[number]):
                return f"{stand_in} got other numbers"
        whole = reference.states[number][0][2]
        for begin, end, state in found.states[number]:
            for name in sorted(whole.keys() | state.keys(), key=str):
                if not _is_part(state.get(name), whole.get(name), stand_in.start, begin, end):
                    return f"the state {name!r} of {stand_in} had other numbers"
    for kept, holds_any in zip(found.kept, found.holding, strict=True):
        for words in sorted(reference.kept[0].keys() | kept.keys()):
            one, other = reference.kept[0].get(words), kept.get(words)
            if is_attribute(words) and not (holds_any and _is_number(one) and _is_number(other)):
                continue  # no more than a mark of what was done already; it is not saved either
            if not is_same(one, other):
                return f"{words} was {_shown(other)} on a rank, and not {_shown(one)},"
    for given in found.returned:
        for words in sorted(reference.returned[0].keys() | given.keys()):
            if not is_same(reference.returned[0].get(words), given.get(words)):
                return f"{words} was of this rank's own parts"
    return None


def is_plain(value: Any) -> bool:
    """Whether it is one number or text, or some of them: what goes with every part of a parameter."""
    if isinstance(value, Tensor):
        return not value.ndim and not is_wrapper(value)
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, complex, str, type(None)))


def plain(value: Any) -> Any:
    """As JSON says it, so that ranks can tell each other; of what is no number, text or container of them only the class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not is_wrapper(value) else f"a tensor of {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return type(value).__name__


def is_same(one: Any, other: Any) -> bool:
    """Equal, or as near as numbers that were computed in another order are."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        # Some optimizers keep a table on the host until the first step shows them a device.
        one, other = one.detach().double(), other.detach().to(one.device).double()
        largest = float(other.abs().max()) if other.numel() else 0.0
        return torch.allclose(one, other, rtol=_TOLERANCE, atol=1e-6 * largest, equal_nan=True)
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_TOLERANCE) or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and bool(one == other)


def _is_near(own: Tensor, right: Tensor, weights: Tensor) -> bool:
    """Whether two ways that weights have gone are the same, within the rounding of the weights."""
    if not own.numel():
        return True
    rounding = 4 * torch.finfo(weights.dtype).eps * float(weights.abs().max())
    return bool(((own - right).abs() <= _TOLERANCE * right.abs() + rounding).all())


def _is_part(own: Any, whole: Any, parameter: Tensor, begin: int, end: int) -> bool:
    """Whether a state of elements [begin, end) is what the whole parameter's has for them."""
    if is_like(whole, parameter) and (parameter.ndim or isinstance(own, Tensor)):
        if not isinstance(own, Tensor) or own.numel() != end - begin or own.dtype != whole.dtype:
            return False
        return is_same(own.reshape(-1), whole.reshape(-1)[begin:end])
    mine, right = dict(pieces(own, "")), dict(pieces(whole, ""))
    return mine.keys() == right.keys() and all(is_same(mine[words], right[words]) for words in mine)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.item():g}" if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
    return repr(value)
