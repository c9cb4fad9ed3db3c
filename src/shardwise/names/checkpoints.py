"""Weights out of the files that `save_model` writes, into a model that is whole or prepared."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, LoadingError
from ..files.documents import read_json_object
from ..files.names import below
from ..zero.access import gathered
from .files import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    Named,
    load_state_dict,
)
from .models import find_tied_parameters
from .refused import RefusedError

logger = logging.getLogger("shardwise")

_SHOWN = 5


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: Named,
    device_map: dict[str, int | str | torch.device] | None = None,
    offload_folder: Named | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: list[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Load weights into `model` in place, a file at a time; of a prepared one each rank takes its part. Runs no code of files.

    Collective for a prepared model; every rank reads the files. Raises PrepareError for weights without memory.
    checkpoint: a file of safetensors or of torch.save, an index of several, or a folder with one of these.
    strict:     LoadingError where names of files and model differ; else that is a warning. A tied weight has one name in files.
    Refused are a device_map and what belongs to it, dtype (`model.to(dtype)` says it), and reading on rank 0 alone.
    """
    given = {
        "device_map": device_map,
        "offload_folder": offload_folder,
        "dtype": dtype,
        "offload_state_dict": offload_state_dict,
        "offload_buffers": offload_buffers,
        "keep_in_fp32_modules": keep_in_fp32_modules,
        "offload_8bit_bnb": offload_8bit_bnb,
        "full_state_dict=False": not full_state_dict,
        "broadcast_from_rank0": broadcast_from_rank0,
    }
    refused = [name for name, value in given.items() if value]
    if refused:
        raise RefusedError(
            f"load_checkpoint_in_model: {', '.join(refused)} cannot be given: a model is not spread over devices here. Use "
            "transformers' from_pretrained(..., device_map=...) for inference; a model that is to be trained is built in "
            "`with accelerator.init():` and given to prepare."
        )
    expected = set(model.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded: set[str] = set()
    for path in _files_of(Path(checkpoint)):
        part = load_state_dict(path)
        loaded |= set(part)
        known = {name: tensor for name, tensor in part.items() if name in expected}
        # On every rank, so that each takes its part of the values into its masters; it is whole for this file's weights only.
        with gathered(model, [parameters[name] for name in known if name in parameters]):
            model.load_state_dict(known, strict=False)
    for names in find_tied_parameters(model):
        if loaded & set(names):
            loaded |= set(names) & expected
    missing, strange = sorted(expected - loaded), sorted(loaded - expected)
    if not missing and not strange:
        return
    said = f"load_checkpoint_in_model: {checkpoint} and this {type(model).__name__} differ."
    said += _listed(" The files lack", missing) + _listed(" The model has no", strange)
    if strict:
        raise LoadingError(said)
    logger.warning("%s", said)


def _listed(words: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{words} {', '.join(names[:_SHOWN])}{more}." if names else ""


def _files_of(place: Path) -> list[Path]:
    """The files of weights that a checkpoint has. Raises LoadingError where it is none, ConfigError where it may be several."""
    if place.is_dir():
        indices = sorted(place.glob("*.index.json"))
        known = [place / name for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME) if (place / name).is_file()]
        whole = [place / name for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME) if (place / name).is_file()]
        found = known or whole or indices
        if not found:
            raise LoadingError(
                f"{place} has no {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} and no index of several files. Give the file itself."
            )
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ConfigError(f"{place} has {names}. Give the one to load.")
        place = found[0]
    if not place.is_file():
        raise LoadingError(f"{place} is no file and no folder of weights.")
    if not place.name.endswith(".index.json"):
        return [place]
    places: Any = read_json_object(place, LoadingError).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise LoadingError(f"{os.fspath(place)}: its weight_map does not give a file for each name.")
    return [below(place.parent, name, "a file of weights") for name in sorted(set(places.values()))]
