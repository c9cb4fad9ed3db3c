"""The doors to a weight of which torch keeps no count: `Parameter.data`, and cuDNN's for recurrent layers.

What is written into a weight in place raises its version, and the engine sees it. What is written into `p.data` does not, and
`p.data = x` gives the parameter other memory than the engine's. So when the first model is prepared, the attribute of
torch's Parameter class becomes one of Python's, which costs each reader 0.2 us and acts on prepared weights alone:

    p.data          the weight counts as perhaps written until somebody has compared it
    p.data = x      x is copied into the weight where shape, dtype and device agree, else WriteError: model.half(), model.cpu()

On a GPU `flatten_parameters` of nn.LSTM, GRU and RNN, which scripts write into forwards and torch calls in `model.to`, moves
their weights into a buffer of cuDNN's. Of prepared weights it does nothing, and cuDNN copies them together at each call.
What goes past this file (`set_`) is found later, see `FlatBuffer.bring_back`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import WriteError

# torch's own, which know nothing of this file.
_RAW: Any = Tensor.data
_flatten: Any = nn.RNNBase.flatten_parameters


class Handed:
    """Which of some parameters have been handed out through `data`, by their place among them.

    names: what errors call them. Weights that are no floating numbers (codes of a quantised base) are not watched.
    """

    def __init__(self, parameters: Sequence[Parameter], names: Sequence[str]) -> None:
        self._parameters = tuple(parameters)
        self._names = tuple(names)
        self._out: dict[int, Tensor | None] = {}
        # Whether what is handed out is to be compared with what it was, for want of anything else to compare it with.
        self.keeps = False
        _install()
        entries = {
            id(parameter): _Entry(weakref.ref(parameter), weakref.ref(self), index)
            for index, parameter in enumerate(parameters)
            if parameter.is_floating_point()
        }
        _watched.update(entries)
        self.stop = weakref.finalize(self, _forget, entries)  # the parameters are nobody's again

    def take(self) -> dict[int, Tensor | None]:
        """Those handed out since the last time, with what they were then if `keeps`."""
        out, self._out = self._out, {}
        return out

    def __bool__(self) -> bool:
        return bool(self._out)

    def note(self, index: int) -> None:
        if index not in self._out:
            self._out[index] = _RAW.__get__(self._parameters[index]).clone() if self.keeps else None

    def assign(self, index: int, value: Tensor) -> None:
        parameter = self._parameters[index]
        own: Tensor = _RAW.__get__(parameter)
        if value.dtype != own.dtype or value.device != own.device or value.shape != own.shape:
            raise WriteError(
                f"{self._names[index]} is a prepared weight of shape {tuple(own.shape)} and {own.dtype} on {own.device}; it "
                f"was to become one of shape {tuple(value.shape)} and {value.dtype} on {value.device}. A prepared model keeps "
                "its shapes, dtypes and device. Copy values into it (p.copy_ under torch.no_grad()); for another dtype or "
                "device call accelerator.free_memory() first, and prepare it again."
            )
        if value.data_ptr() != own.data_ptr():
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                parameter.copy_(
                    value
                )  # counted as any write; torch would keep what a graph holds, here the graph is told


@dataclass(frozen=True)
class _Entry:
    parameter: weakref.ref[Parameter]
    watcher: weakref.ref[Handed]
    index: int


# By id of the parameter.
_watched: dict[int, _Entry] = {}


def _find(parameter: Parameter) -> tuple[Handed, int] | None:
    entry = _watched.get(id(parameter))
    if entry is None or entry.parameter() is not parameter:
        return None
    watcher = entry.watcher()
    return None if watcher is None else (watcher, entry.index)


def _forget(entries: Mapping[int, _Entry]) -> None:
    for key, entry in entries.items():
        if _watched.get(key) is entry:
            del _watched[key]


def _get(parameter: Parameter) -> Tensor:
    raw: Tensor = _RAW.__get__(parameter)  # of a released weight: raises
    found = _find(parameter)
    if found is not None:
        found[0].note(found[1])
    return raw


def _set(parameter: Parameter, value: Tensor) -> None:
    found = _find(parameter)
    if found is None:
        _RAW.__set__(parameter, value)
    else:
        found[0].assign(found[1], value)


def _flatten_parameters(module: nn.RNNBase) -> None:
    weights = vars(module).get("_flat_weights", ())
    if not any(isinstance(weight, Parameter) and _find(weight) is not None for weight in weights):
        _flatten(module)


_flatten_parameters.__doc__ = nn.RNNBase.flatten_parameters.__doc__


def _install() -> None:
    if "data" not in vars(Parameter):
        Parameter.data = property(_get, _set, doc=torch.Tensor.data.__doc__)  # type: ignore[assignment]
        nn.RNNBase.flatten_parameters = _flatten_parameters  # type: ignore[method-assign, assignment]
