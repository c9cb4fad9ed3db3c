"""What a checkpoint tells about its models, so that they can be exported without the script: configurations and names."""

from __future__ import annotations

from typing import Any

from .checkpoint.tensor_file import dtype_name
from .zero.sharded import ShardedModel


def facts_of(sharded: ShardedModel) -> dict[str, Any]:
    """JSON of one model.

    config, generation_config: transformers', or None. peft: {adapter: its configuration}, empty without PEFT.
    dtypes: those that the user gave to trained weights. aliases: {other name of a tied weight: its name}.
    ignored: names that transformers does not save.
    """
    model: Any = sharded.model
    firsts = {id(p): name for name, p in model.named_parameters()}
    every = [(name, firsts[id(p)]) for name, p in model.named_parameters(remove_duplicate=False)]
    content = _configuration(model, "config")
    if content is not None and hasattr(model, "can_generate"):
        content["architectures"] = [type(model).__name__]
    adapters = getattr(model, "peft_config", None)
    return {
        "class": type(model).__name__,
        "config": content,
        "generation_config": _configuration(model, "generation_config"),
        "peft": {
            name: _plain(adapter.to_dict())
            for name, adapter in (adapters if isinstance(adapters, dict) else {}).items()
        },
        "dtypes": {m.name: dtype_name(m.dtype) for m in sharded.whole.members() if m.trained},
        "aliases": {name: first for name, first in every if name != first},
        "ignored": sorted(getattr(model, "_keys_to_ignore_on_save", None) or ()),
    }


def _configuration(model: Any, name: str) -> Any:
    found: Any = getattr(model, name, None)
    return _plain(found.to_dict()) if hasattr(found, "to_dict") else None


def _plain(value: Any) -> Any:
    """As JSON can hold it, the way the libraries themselves write their configurations."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)
    return str(value).removeprefix("torch.")
