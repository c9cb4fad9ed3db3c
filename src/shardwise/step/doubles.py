"""An optimizer once more: for what visits the device, and for trials.

    double    has its settings and attributes; its groups are empty, it has no states    a step of pieces in a call of its own
    twin      shares nothing that a step may change, so that the user's stays as it is   a trial on small tensors

Neither has hooks, or the verbs that were set on the one object: those are the user's step, which runs once.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OptimizerError
from .overrides import is_manager

# Elements. An optimizer's own tensors, beside its states, that are longer than this are no settings.
_LARGEST = 1 << 20
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)


def double(optimizer: Optimizer) -> Any:
    """`optimizer` with its present settings and attributes, with empty groups, no states of parameters and no hooks.

    Numbers and tensors are its own, those in lists and dictionaries too: what a step counts stays in the double. So all calls
    of one step begin alike, with doubles of one that was made before the first. Objects are shared.
    """
    made: Any = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if not _belongs_to_the_object(optimizer, name):
            bound = isinstance(value, MethodType) and value.__self__ is optimizer
            made.__dict__[name] = MethodType(value.__func__, made) if bound else _own(value)
    _without_hooks(optimizer, made)
    made.state = defaultdict(dict)
    made.state.update((key, _own(value)) for key, value in optimizer.state.items() if not isinstance(key, Tensor))
    made.param_groups = [{n: _own(v) for n, v in {**group, "params": []}.items()} for group in optimizer.param_groups]
    return made


def _own(value: Any) -> Any:
    """A copy of tensors, and of the lists and dictionaries around them."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    if type(value) is dict:
        return {name: _own(item) for name, item in value.items()}
    if type(value) is list:
        return [_own(item) for item in value]
    return value


def twin(optimizer: Optimizer, stand_ins: Mapping[int, Tensor]) -> Any:
    """`optimizer` with copies of its settings and attributes, with empty groups, no states and no hooks.

    stand_ins: id(parameter) -> what the twin finds where the user's keeps that parameter in an attribute.
    Raises OptimizerError for an attribute that cannot be copied.
    """
    made: Any = object.__new__(type(optimizer))
    made.state, made.param_groups = defaultdict(dict), []
    memo: dict[int, Any] = {**stand_ins, id(optimizer): made}
    memo |= {id(optimizer.state): made.state, id(optimizer.param_groups): made.param_groups}
    for group in optimizer.param_groups:
        new: dict[str, Any] = {"params": []}
        memo |= {id(group): new, id(group["params"]): new["params"]}
        made.param_groups.append(new)
    for number, (group, new) in enumerate(zip(optimizer.param_groups, made.param_groups, strict=True)):
        for name, value in group.items():
            if name != "params":
                new[name] = _copied(optimizer, value, memo, f"the setting {name!r} of its group {number}")
    for name, value in vars(optimizer).items():
        if is_manager(value):
            made.__dict__[name] = value
        elif name not in ("state", "param_groups") and not _belongs_to_the_object(optimizer, name):
            made.__dict__[name] = _copied(optimizer, value, memo, f"its attribute {name!r}")
    _without_hooks(optimizer, made)
    return made


def _belongs_to_the_object(optimizer: Optimizer, name: str) -> bool:
    """Whether it stands in for a method of the class, as `step` of LR schedulers does, or holds hooks."""
    return callable(getattr(type(optimizer), name, None)) or _holds_hooks(name)


def _holds_hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


def _without_hooks(optimizer: Optimizer, made: Any) -> None:
    for name in vars(optimizer):
        if _holds_hooks(name):
            made.__dict__[name] = {}


def _copied(optimizer: Optimizer, value: Any, memo: dict[int, Any], what: str) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        memo.setdefault(id(value), value.detach().clone())  # torch copies no tensor that was computed
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:  # whatever the object's class raises
        raise OptimizerError(
            f"this {type(optimizer).__name__} cannot be tried without changing it: {what} cannot be copied "
            f"({type(error).__name__}: {error}). Keep it outside of the optimizer."
        ) from error


def refuse_what_it_reaches(optimizer: Optimizer) -> None:
    """Raise OptimizerError for an optimizer that keeps another optimizer, a module or large tensors beside its states."""
    name = type(optimizer).__name__
    held = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for attribute, value in held.items():
        if _belongs_to_the_object(optimizer, attribute) or is_manager(value):
            continue
        for thing in _reached(value, {id(optimizer)}):
            if isinstance(thing, Optimizer):
                raise OptimizerError(
                    f"this {name} steps another optimizer, the {type(thing).__name__} in its attribute {attribute!r}, "
                    f"whose states would be neither sharded nor saved. Give prepare the {type(thing).__name__}."
                )
            if isinstance(thing, nn.Module) and any(True for _ in thing.parameters()):
                raise OptimizerError(
                    f"this {name} keeps a {type(thing).__name__} in its attribute {attribute!r}: it works on weights past its "
                    "parameter groups, which hold this rank's shards. Take an optimizer that works on its groups."
                )
            if isinstance(thing, Tensor) and id(thing) not in mine and thing.numel() > _LARGEST:
                raise OptimizerError(
                    f"this {name} keeps a tensor of shape {tuple(thing.shape)} in its attribute {attribute!r}, beside the "
                    "states of its parameters: it would be neither sharded nor saved. Keep it in `state` of a parameter."
                )


def _reached(value: Any, seen: set[int], depth: int = 5) -> Iterator[Any]:
    """`value` and what can be reached from it: by containers, objects, bound methods and closures, `depth` of them deep."""
    if isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, (Tensor, nn.Module, Optimizer)) or not depth:
        return
    inside = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, Mapping):
        inside += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside += value
    elif isinstance(value, MethodType):
        inside += [value.__self__, value.__func__]
    elif isinstance(value, partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        inside += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    for item in inside:
        yield from _reached(item, seen, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
