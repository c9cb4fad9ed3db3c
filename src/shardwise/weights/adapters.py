"""What the files of an adapter hold, asked from peft itself: no rule of its names is written down here.

peft's own function is run once on blanks of the model's weights (see `zero/stand_ins.py`). What it gives back unchanged says
which weight stands under which name in the file; what it computes with says which weights it needs for the rest:

    base_model...q_proj.lora_A.weight   <-  base_model...q_proj.lora_A.ref.weight      goes out as it is
    prompt_embeddings                   <-  reads prompt_encoder.default.*             is computed

So it makes no difference whether an adapter is trained in this run, frozen, inactive or loaded for inference. Only these
weights are gathered then, and peft is run again on them.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.documents import read_configuration
from ..zero.sharded import ShardedModel
from ..zero.stand_ins import Reads, blank
from ..zero.whole import persistent_buffers

T = TypeVar("T")

# transformers' models that have adapters without peft's model around them save them under peft's names.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Contents:
    """The tensors of one adapter's file.

    weights:  name in the file -> name in the prepared model, of parameters and buffers that go out as they are.
    computed: names in the file of what peft computes, or keeps outside of the model's state dict.
    reads:    the parameters that it computes them from.
    """

    weights: dict[str, str]
    computed: tuple[str, ...]
    reads: frozenset[str]

    @property
    def names(self) -> set[str]:
        """Every name in the file."""
        return {*self.weights, *self.computed}


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into `model`."""
    return sys.modules.get("peft") is not None and isinstance(getattr(model, "peft_config", None), dict)


def is_saved_as_adapters(model: nn.Module) -> bool:
    """Whether its save_pretrained saves adapters: peft's own models, and transformers' that were given some."""
    peft: Any = sys.modules.get("peft")
    return has_adapters(model) and (isinstance(model, peft.PeftModel) or _is_of_transformers(model))


def _is_of_transformers(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def contents_of(
    sharded: ShardedModel, model: nn.Module, adapters: Sequence[str], embeddings: bool | str = "auto"
) -> dict[str, Contents]:
    """For each of `adapters` what peft would save of it. Without communication, and nothing is gathered.

    model: the prepared one or a part of it. embeddings: peft's save_embedding_layers.
    """
    blanks = _blanks(sharded)
    named = {**blanks, **persistent_buffers(sharded.model)}
    found = {}
    for adapter in adapters:
        reads = Reads(named)
        with undisturbed(model), sharded.whole.standing_in(blanks), reads:
            state = state_of(sharded, model, adapter, embeddings)
        weights = {name: source for name, value in state.items() if (source := reads.source_of(value)) is not None}
        computed = tuple(name for name in state if name not in weights)
        found[adapter] = Contents(weights, computed, frozenset(reads.read & blanks.keys()))
    return found


def state_of(
    sharded: ShardedModel,
    model: Any,
    adapter: str,
    embeddings: bool | str = "auto",
    state_dict: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """peft's state of an adapter by the names in its file, from the weights that stand in now, or from `state_dict`."""
    peft: Any = sys.modules["peft"]
    state: dict[str, Any] = peft.get_peft_model_state_dict(
        model,
        state_dict=state_dict if state_dict is not None else readable_state(sharded, model),
        adapter_name=adapter,
        save_embedding_layers=embeddings,
    )
    return {_PREFIX + name: value for name, value in state.items()} if _is_of_transformers(model) else state


def readable_state(sharded: ShardedModel, model: nn.Module) -> dict[str, Tensor] | None:
    """None: `model.state_dict()` serves. With a quantised base, whose layers add scales that are sharded, what it would give
    without them."""
    if not sharded.is_quantised:
        return None
    return {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model, every_name=True)}


def written_config(model: Any, adapter: str) -> dict[str, Any]:
    """The content of the adapter's adapter_config.json, as peft writes it."""
    config, base = copy.copy(model.peft_config[adapter]), model
    auto_mapping = None
    if hasattr(model, "get_base_model"):
        base = model.get_base_model()
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = vars(base).get("name_or_path") or None
        if config.task_type is None:
            auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder, auto_mapping_dict=auto_mapping)
        return read_configuration(Path(folder) / "adapter_config.json", CheckpointError)


def on_whole(sharded: ShardedModel, values: Mapping[str, Tensor], action: Callable[[], T], missing: str) -> T:
    """What `action` gives while `values`, by the engine's names, stand in for parameters, and blanks for the others.

    Raises CheckpointError if it computes with a blank: the weight's name and `missing`.
    """
    blanks = {name: value for name, value in _blanks(sharded).items() if name not in values}
    reads = Reads(blanks, refuse=lambda name: CheckpointError(f"{name} {missing}"))
    with sharded.whole.standing_in({**blanks, **values}), reads:
        return action()


def _blanks(sharded: ShardedModel) -> dict[str, Tensor]:
    """A blank for each parameter, by its name, in the dtype that it is saved in."""
    return {m.name: blank(m.shape, m.dtype) for m in sharded.whole.members()}


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside, peft may note things in its configurations, draw random numbers and warn: nothing of it stays.

    Gradients stay on: without them torch computes an LSTM in another way, with other last digits.
    """
    earlier = {name: dict(vars(config)) for name, config in model.peft_config.items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name, fields in earlier.items():
                vars(model.peft_config[name]).update(fields)
