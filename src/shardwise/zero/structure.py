"""Whether a model still has the weights with which it was prepared, and no others that a step would leave out.

torch calls a hook for every module and parameter that is registered, also by assignment: one that goes into a prepared model
has the weights looked through at the next forward that records gradients, and nothing else costs anything. Some containers
write past the hook (`ModuleList.insert`), so the first such forward looks too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import PrepareError
from .guard import unasked

# The modules of prepared models. A module is in one prepared model at most.
_watched: WeakKeyDictionary[nn.Module, ref[Structure]] = WeakKeyDictionary()


class Structure:
    """The parameters of one model.

    held: gives the ids of those that the engine has.
    """

    def __init__(self, model: nn.Module, held: Callable[[], set[int]]) -> None:
        self._model = model
        self._held = held
        self._changed = True
        self._frozen: list[tuple[str, Parameter]] = []  # that came later, and that nobody trains in plain torch either
        self._watch()
        _listen()

    def change(self) -> None:
        """Something has been registered in the model."""
        self._changed = True

    def check(self) -> None:
        """Raise PrepareError if a weight requires gradients and the engine does not have it: it would never be trained."""
        if self._changed:
            self._changed = False
            self._watch()
            held = self._held()
            with unasked():
                others = [
                    (name, p) for name, p in self._model.named_parameters() if id(p) not in held and p.numel() > 0
                ]
            self._frozen = others
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                self._changed = True  # and the next forward says so again
                raise PrepareError(
                    f"{name} has come into this {type(self._model).__name__} after it was prepared: its gradients would not be "
                    "averaged, and no step would train it. Replace and add modules before `prepare`; or write new values into "
                    "the weights that are there, in `with shardwise.gathered(model, modify=True):`; or call "
                    "accelerator.free_memory(), and prepare the model and a new optimizer again."
                )

    def _watch(self) -> None:
        own = ref(self)
        for module in self._model.modules():
            _watched[module] = own


def _registered(module: nn.Module, name: str, value: Any) -> None:
    found = _watched.get(module)
    structure = found() if found is not None else None
    if structure is not None:
        structure.change()


_listening: list[Any] = []


def _listen() -> None:
    """From the first prepared model on, in every module: 0.2 us for each that is registered."""
    if not _listening:
        _listening.append(register_module_module_registration_hook(_registered))
        _listening.append(register_module_parameter_registration_hook(_registered))
