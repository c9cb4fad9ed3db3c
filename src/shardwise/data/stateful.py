"""Prepared loaders as torchdata's StatefulDataLoader, for scripts that ask `isinstance` before they call `state_dict`.

The class that comes out is both; what it does is ours and torch's. torchdata's own iteration counts what was read ahead, so
its methods are covered by those of torch's DataLoader that they replace; `state_dict` and `load_state_dict` are those of
the prepared loader. Its constructor is never called.

    PreparedLoader -> the user's class -> torch's methods -> StatefulDataLoader -> DataLoader
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

from torch.utils.data import DataLoader


def as_stateful(loader: Any) -> None:
    """Make `loader`, which is prepared, one of torchdata's class too, where torchdata is installed; say so on it everywhere."""
    loader.use_stateful_dataloader = True
    theirs = _torchdatas_class()
    if theirs is not None and not isinstance(loader, theirs):
        loader.__class__ = _both(type(loader), theirs)


@functools.cache
def _torchdatas_class() -> type | None:
    if importlib.util.find_spec("torchdata") is None:
        return None
    if importlib.util.find_spec("torchdata.stateful_dataloader") is None:  # before 0.8
        return None
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader  # type: ignore[no-any-return]


_classes: dict[type, type] = {}


def _both(ours: type, theirs: type) -> type:
    if ours not in _classes:
        _classes[ours] = _made_of(ours, theirs)
    return _classes[ours]


def _made_of(ours: type, theirs: type) -> type:
    replaced = {
        name: vars(DataLoader)[name]
        for name, value in vars(theirs).items()
        if inspect.isfunction(value) and name in vars(DataLoader)
    }
    torchs = type("_TorchsMethods", (DataLoader,), {"__module__": __name__, **replaced})
    return type(ours)(ours.__name__, (ours, torchs, theirs), {"__module__": ours.__module__, "__doc__": ours.__doc__})
