"""An Accelerator's ways to write: whole weights, any object, and (in a later version) the state of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint.export import save_weights
from .errors import PrepareError, ShardwiseError
from .plugins import ProjectConfiguration
from .process import PartialState
from .zero.sharded import find_sharded

_CHECKPOINTS = (
    "comes with shardwise's checkpoint release and is not in this version. Until then: save_model or "
    "get_state_dict for the weights, and `save` for anything else."
)


class Saving(PartialState):
    """The writing verbs of an Accelerator."""

    project_configuration: ProjectConfiguration
    _custom_objects: list[Any]

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model itself: `prepare` never wraps it. keep_torch_compile=False takes off torch.compile's wrapper."""
        if not keep_torch_compile and hasattr(model, "_orig_mod"):
            return model._orig_mod
        return model

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole state dict, on the CPU of rank 0; {} on the other ranks. Collective.

        Works under every stage; `zero3_save_16bit_model` is not needed for it.
        """
        sharded = find_sharded(self.unwrap_model(model, keep_torch_compile=False))
        if sharded is None:
            return dict(model.state_dict()) if self.is_main_process else {}
        return sharded.state_dict()

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write `obj` to `f` on the main process (on one process per machine with save_on_each_node)."""
        if self.project_configuration.save_on_each_node:
            here = self.is_local_main_process
        else:
            here = self.is_main_process
        if not here:
            return
        if safe_serialization:
            save_file({name: tensor.contiguous() for name, tensor in obj.items()}, f, metadata={"format": "pt"})
        else:
            torch.save(obj, f)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the whole weights: model.safetensors, or parts and an index. Collective; an error is every rank's."""
        weights = self.get_state_dict(model)
        problem: Exception | None = None
        if self.is_main_process:
            try:
                tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
                save_weights(
                    tensors, save_directory, max_shard_size=max_shard_size, safe_serialization=safe_serialization
                )
            except Exception as error:
                problem = error
        self._ranks.agree(problem)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Have `save_state` and `load_state` also keep these. Raises PrepareError for one without (load_)state_dict."""
        for item in objects:
            if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
                raise PrepareError(
                    f"register_for_checkpointing: a {type(item).__name__} has no state_dict and load_state_dict."
                )
        self._custom_objects.extend(objects)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> str:
        raise ShardwiseError(f"save_state {_CHECKPOINTS}")

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **kwargs: Any) -> None:
        raise ShardwiseError(f"load_state {_CHECKPOINTS}")

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        raise ShardwiseError(f"register_save_state_pre_hook belongs to save_state, which {_CHECKPOINTS}")

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        raise ShardwiseError(f"register_load_state_pre_hook belongs to load_state, which {_CHECKPOINTS}")
