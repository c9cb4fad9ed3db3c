"""A prepared model read by code that knows nothing of shards: whole tensors stand in for its parameters meanwhile.

    with standing_in(model, tensors):          every module holds `tensors` in place of its parameters
        model.state_dict()                     torch's own, peft's own, transformers' own

To learn beforehand which weights such code would read, and gather only those, it is run once on blanks: tensors of the right
shapes over a single zero, so that a model of any size costs nothing. `Reads` notes what an operation computes with:

    blank of A --detach--> a value of the result      A goes out as it is
    blank of E --embedding--> computed                E is read, the result is computed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What gives the very tensor again, under another Python object.
_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}

# id(model) of the models that stand-ins are in now.
_inside: set[int] = set()


def is_standing_in(model: nn.Module) -> bool:
    """Whether `standing_in` is open for `model`: what reads it now reads plain tensors, and is to be left alone."""
    return id(model) in _inside


@contextmanager
def standing_in(model: nn.Module, tensors: Mapping[int, Tensor], modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Inside, each parameter of `model` is the tensor under its id, in every module that has it; others stay as they are.

    modules: others that have such parameters, without being in the model now.
    Nothing is copied, and nothing that is written into them is kept. Not around a forward: the engine's hooks would not
    know the tensors.
    """
    earlier: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    _inside.add(id(model))
    try:
        for module in dict.fromkeys((*modules, *model.modules())):
            for name, parameter in list(module._parameters.items()):
                if parameter is None or id(parameter) not in tensors:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(tensors[id(parameter)], requires_grad=False)
                earlier.append((module, name, parameter))
                module._parameters[name] = made[id(parameter)]
        yield
    finally:
        _inside.discard(id(model))
        for module, name, parameter in earlier:
            module._parameters[name] = parameter


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU over memory for one element."""
    return torch.zeros((1,) * len(shape), dtype=dtype).expand(shape)


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, notes which of the named tensors operations compute with. Handing one on as it is does not count.

    named: name -> tensor. Of two names of one tensor the first one is meant.
    refuse: the error for a name, raised when it is read; None allows it.
    """

    def __init__(self, named: Mapping[str, Tensor], refuse: Callable[[str], Exception] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[str] = set()
        self._named = dict(named)  # storages that live keep their addresses for themselves
        self._names: dict[int, list[str]] = {}
        for name, tensor in named.items():
            self._names.setdefault(_storage_of(tensor), []).append(name)
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SAME:
            for leaf in tree_leaves((args, kwargs)):
                names = self._names.get(_storage_of(leaf), []) if isinstance(leaf, Tensor) else []
                self.read.update(names)
                if names and self._refuse is not None:
                    raise self._refuse(names[0])
        return func(*args, **(kwargs or {}))

    def source_of(self, value: Any) -> str | None:
        """The name of the tensor that `value` is, if it is one of them as it was."""
        for name in self._names.get(_storage_of(value), []) if isinstance(value, Tensor) else []:
            named = self._named[name]
            if (value.shape, value.stride(), value.storage_offset(), value.dtype) == (
                named.shape, named.stride(), named.storage_offset(), named.dtype,
            ):  # fmt: skip
                return name if name not in self.read else None
        return None


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
