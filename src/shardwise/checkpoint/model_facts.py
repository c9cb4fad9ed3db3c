"""What a checkpoint tells about its models, so that they can be exported without the script: configurations and names.

Of adapters it holds whatever their files need: trained weights and buffers are in it anyway; frozen ones and what peft computes
are added, for adapters are small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..files.writer import dtype_name
from ..weights.adapters import Contents, contents_of, has_adapters, on_whole, state_of, undisturbed, written_config
from ..weights.export import refuse_empty
from ..zero.sharded import ShardedModel


def facts_of(sharded: ShardedModel) -> dict[str, Any]:
    """JSON of one model.

    config, generation_config: transformers', or None.
    aliases: {other name of a tied weight: its name}.
    ignored: names that transformers does not save.
    """
    model: Any = sharded.model
    firsts = {id(p): name for name, p in model.named_parameters()}
    every = [(name, firsts[id(p)]) for name, p in model.named_parameters(remove_duplicate=False)]
    content = _configuration(model, "config")
    if content is not None and hasattr(model, "can_generate"):
        content["architectures"] = [type(model).__name__]
    return {
        "class": type(model).__name__,
        "config": content,
        "generation_config": _configuration(model, "generation_config"),
        "aliases": {name: first for name, first in every if name != first},
        "ignored": sorted(getattr(model, "_keys_to_ignore_on_save", None) or ()),
    }


def dtypes_of(sharded: ShardedModel) -> dict[str, str]:
    """The dtypes that the user gave to trained weights, by name."""
    return {name: dtype_name(dtype) for name, dtype in sharded.whole.trained_dtypes().items()}


@dataclass
class KeptAdapters:
    """What a checkpoint keeps of a model's adapters.

    facts:    JSON, on rank 0; empty without peft. peft: {adapter: its configuration}; adapters: {adapter: {"weights": {name in
              its file: name in the model}, "computed": [names in its file]}, or {"error": why it cannot be exported}}.
    frozen:   the frozen weights that their files need; the same on every rank.
    computed: "<adapter>/<name in its file>" -> what peft computes, on rank 0.
    """

    facts: dict[str, Any] = field(default_factory=lambda: {"peft": {}, "adapters": {}})
    frozen: frozenset[str] = frozenset()
    computed: dict[str, Tensor] = field(default_factory=dict)


# Of each model: its adapters' configurations when peft was asked, the answers, and whether embeddings are saved with each.
_asked: WeakKeyDictionary[ShardedModel, tuple[dict[str, Any], dict[str, Contents | str], dict[str, bool]]]
_asked = WeakKeyDictionary()


def adapters_of(sharded: ShardedModel) -> KeptAdapters:
    """What a checkpoint is to keep of the model's adapters. Collective.

    An adapter that peft itself could not save is no error here: only an export will need it.
    """
    if not has_adapters(sharded.model):
        return KeptAdapters()
    ranks = sharded.ranks
    found = ranks.together(lambda: _ask(sharded) if ranks.rank == 0 else ({}, {}))
    configurations, contents = found
    known = [entry for entry in contents.values() if isinstance(entry, Contents)]
    reads: frozenset[str] = frozenset().union(*(entry.reads for entry in known))
    needed = {name for entry in known for name in entry.weights.values()}
    computes = any(entry.computed for entry in known)
    reads, needed, computes = ranks.broadcast_object((reads, needed, computes))
    buffers = [unit.frozen for unit in sharded.units if unit.frozen is not None] if needed else []
    kept = KeptAdapters(frozen=frozenset(m.name for frozen in buffers for m in frozen.members if m.name in needed))
    if computes:
        tensors = sharded.whole.on_first(reads.__contains__)
        ranks.together(lambda: _compute(sharded, contents, tensors, kept.computed) if ranks.rank == 0 else None)
    kept.facts = {
        "peft": configurations,
        "adapters": {
            adapter: {"error": entry}
            if isinstance(entry, str)
            else {"weights": entry.weights, "computed": list(entry.computed)}
            for adapter, entry in contents.items()
        },
    }
    return kept


def _ask(sharded: ShardedModel) -> tuple[dict[str, Any], dict[str, Contents | str]]:
    """The adapters' configurations, and the contents of their files or why peft would not save them."""
    model: Any = sharded.model
    configurations: dict[str, Any] = {}
    contents: dict[str, Contents | str] = {}
    earlier, answers, embeddings = _asked.get(sharded, ({}, {}, {}))
    for adapter in model.peft_config:
        try:
            configurations[adapter] = written_config(model, adapter)
            if earlier.get(adapter) == configurations[adapter]:
                contents[adapter] = answers[adapter]
                continue
            # Whether embeddings belong to it peft may look up on the hub: once, and not in every save.
            own: bool | str = embeddings.get(adapter, "auto")
            found = contents_of(sharded, model, [adapter], own)[adapter]
            if own == "auto":
                embeddings[adapter] = found.names != contents_of(sharded, model, [adapter], False)[adapter].names
            contents[adapter] = found
        except Exception as error:  # of peft, about an adapter that it cannot save
            configurations.setdefault(adapter, {})
            contents[adapter] = f"{type(error).__name__}: {error}"
    _asked[sharded] = (configurations, contents, embeddings)
    return configurations, contents


def _compute(
    sharded: ShardedModel, contents: dict[str, Contents | str], tensors: dict[str, Tensor], out: dict[str, Tensor]
) -> None:
    """Put what peft computes into `out`; an adapter for which it fails is an error in `contents`."""
    embeddings = _asked[sharded][2]
    for adapter, entry in contents.items():
        if isinstance(entry, str) or not entry.computed:
            continue
        try:
            with undisturbed(sharded.model):
                state = on_whole(
                    sharded,
                    tensors,
                    lambda: state_of(sharded, sharded.model, adapter, embeddings[adapter]),  # noqa: B023 - called at once
                    "was not gathered.",
                )
            made = {f"{adapter}/{name}": state[name].detach().to("cpu", copy=True) for name in entry.computed}
            refuse_empty(made)
            for tensor in made.values():
                dtype_name(tensor.dtype)  # raises for one that a file cannot hold
            out.update(made)
        except Exception as error:  # of peft, as above
            contents[adapter] = f"{type(error).__name__}: {error}"


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
