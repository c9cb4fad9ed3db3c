"""Settings of single parameters that bitsandbytes keeps beside its optimizers, by the ids of the parameters' objects.

transformers' Trainer asks so for the states of embeddings in 32 bits. The engine steps other tensors in the place of the user's
parameters: for a call those stand in the manager, with the settings of what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# id of the user's parameter, and what is stepped in its place
Pairs = Iterable[tuple[int, Tensor]]


def is_manager(value: Any) -> bool:
    """Whether that is bitsandbytes' manager: one object for the process, which optimizers share."""
    return type(value).__name__ == "GlobalOptimManager" and type(value).__module__.partition(".")[0] == "bitsandbytes"


def _manager_of(optimizer: Optimizer) -> Any:
    found = vars(optimizer).get("mng")
    return found if is_manager(found) else None


def _by_id(manager: Any) -> Mapping[int, Mapping[str, Any]]:
    of_modules: dict[int, Mapping[str, Any]] = {
        id(getattr(module, name)): config for module, name, config in manager.module_weight_config_triple
    }
    of_modules.update(manager.pid2config)
    return of_modules


def settings_of(optimizer: Optimizer) -> Callable[[Tensor], Any]:
    """A function of the user's parameters: what is set for that one alone, in a form that can be compared; None for nothing."""
    manager = _manager_of(optimizer)
    known = {} if manager is None else _by_id(manager)
    return lambda parameter: repr(sorted(known[id(parameter)].items())) if id(parameter) in known else None


@contextmanager
def standing_in(optimizer: Optimizer, pairs: Callable[[], Pairs]) -> Iterator[None]:
    """Inside, tensors have the settings of the parameters in whose place they are stepped."""
    manager = _manager_of(optimizer)
    known = {} if manager is None else _by_id(manager)
    if not known:
        yield
        return
    kept = manager.pid2config, manager.index2config, manager.module_weight_config_triple
    manager.pid2config = {id(tensor): known[key] for key, tensor in pairs() if key in known}
    manager.index2config, manager.module_weight_config_triple = {}, []  # places in groups are others
    try:
        yield
    finally:
        manager.pid2config, manager.index2config, manager.module_weight_config_triple = kept
