"""Files by accelerate's names and verbs.

Weights that `save_model` writes have these names, those of the Hugging Face libraries. A checkpoint of `save_state` has one
file of tensors and one of JSON for each rank in the place of OPTIMIZER_NAME and its like (docs/design/checkpoints.md),
which are here for scripts that name files of their own by them.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import IO, Any, cast

import torch
from torch import Tensor

from ..errors import ConfigError
from ..run.process import PartialState

MODEL_NAME = "pytorch_model"
SAFE_MODEL_NAME = "model"
WEIGHTS_NAME = f"{MODEL_NAME}.bin"
WEIGHTS_PATTERN_NAME = "pytorch_model{suffix}.bin"
WEIGHTS_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
SAFE_WEIGHTS_NAME = f"{SAFE_MODEL_NAME}.safetensors"
SAFE_WEIGHTS_PATTERN_NAME = "model{suffix}.safetensors"
SAFE_WEIGHTS_INDEX_NAME = f"{SAFE_WEIGHTS_NAME}.index.json"
OPTIMIZER_NAME = "optimizer"
SCHEDULER_NAME = "scheduler"
SAMPLER_NAME = "sampler"
SCALER_NAME = "scaler.pt"
RNG_STATE_NAME = "random_states"
PROFILE_PATTERN_NAME = "profile_{suffix}.json"
# What torch.compile's own backend knows, and torch's launcher.
TORCH_DYNAMO_MODES = ["default", "reduce-overhead", "max-autotune"]

Named = str | os.PathLike[str]


def save(obj: Any, f: Named | IO[bytes], save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Write `obj` on the main process, or on the first one of each machine with `save_on_each_node`. Not collective.

    safe_serialization: a dictionary of tensors as safetensors; of those that share their memory, the first by name.
    """
    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if not safe_serialization:
        torch.save(obj, f)
        return
    from safetensors.torch import save_file

    from .models import clean_state_dict_for_safetensors

    save_file(clean_state_dict_for_safetensors(obj), cast(Any, f), metadata={"format": "pt"})


def load(f: Named | IO[bytes], map_location: Any = None, **kwargs: Any) -> Any:
    """`torch.load` that runs no code of the file unless `weights_only=False` is given; numpy's arrays are taken, too."""
    import numpy

    plain: list[Any] = [numpy.ndarray, numpy.dtype, cast(Any, numpy)._core.multiarray._reconstruct]
    plain += [type(numpy.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
    kwargs.setdefault("weights_only", True)
    with torch.serialization.safe_globals(plain):
        return torch.load(f, map_location=map_location, **kwargs)


def load_state_dict(checkpoint_file: Named, device_map: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of a file of safetensors or of torch.save, without running code of it.

    device_map: all to one device, `{"": device}`; others are for models spread over devices, and are refused.
    """
    devices = set(map(str, (device_map or {"": "cpu"}).values()))
    if len(devices) > 1:
        raise ConfigError(
            f"load_state_dict: device_map names {sorted(devices)}. Only from_pretrained's device_map spreads a model."
        )
    device = devices.pop()
    if os.fspath(checkpoint_file).endswith(".safetensors"):
        from safetensors.torch import load_file

        return OrderedDict(load_file(checkpoint_file, device=device))
    found: dict[str, Tensor] = torch.load(checkpoint_file, map_location=device, weights_only=True)
    return found
