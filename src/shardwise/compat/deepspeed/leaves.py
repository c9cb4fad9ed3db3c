"""Leaf modules: what DeepSpeed must be told about mixtures of experts, and shardwise finds out.

The ranks agree before each gather until they know the order, and a rank whose batch meets other experts gathers theirs with the
rest. So naming a module a leaf has no effect on what is computed; the names are kept for those who ask.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import nn

from ...errors import ConfigError

_leaves: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _found(model: nn.Module, classes: Sequence[type | str], must: bool) -> list[nn.Module]:
    """The modules of these classes. Raises ConfigError where there is none and there must be."""
    names = {item for item in classes if isinstance(item, str)}
    kinds = tuple(item for item in classes if isinstance(item, type))
    found = [
        module
        for module in model.modules()
        if isinstance(module, kinds)
        or {type(module).__name__, f"{type(module).__module__}.{type(module).__name__}"} & names
    ]
    if not found and must:
        kinds_here = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(
            f"no module of this {type(model).__name__} is one of {list(classes)}. It has {', '.join(kinds_here)}."
        )
    return found


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """The modules of these classes, which are leaves from now on. Raises ConfigError if there is none."""
    found = _found(model, leaf_module_classes, raise_if_not_found)
    for module in found:
        _leaves.add(module)
    return found


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """The modules of these classes, which are leaves no longer."""
    found = _found(model, leaf_module_classes, raise_if_not_found)
    for module in found:
        _leaves.discard(module)
    return found


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """(the modules of these paths, which are leaves from now on; the names that there are not)."""
    return _named(model, module_names, raise_if_not_found, lambda path, name: path == name)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Sequence[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """The same for modules whose paths end in these names."""
    return _named(model, module_name_suffixes, raise_if_not_found, lambda path, name: path.endswith(name))


def _named(
    model: nn.Module, names: Sequence[str], must: bool, fits: Callable[[str, str], bool]
) -> tuple[list[nn.Module], list[str]]:
    found: list[nn.Module] = []
    missing: list[str] = []
    for name in names:
        here = [module for path, module in model.named_modules() if fits(path, name)]
        found += [module for module in here if not any(module is other for other in found)]
        missing += [] if here else [name]
    if missing and must:
        raise ConfigError(f"this {type(model).__name__} has no modules {', '.join(missing)}.")
    for module in found:
        _leaves.add(module)
    return found, missing


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module in _leaves]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this module is a leaf."""
    return model in _leaves
