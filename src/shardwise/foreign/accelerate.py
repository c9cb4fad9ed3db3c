"""A directory of accelerate's `save_state` without DeepSpeed or FSDP, as a run of ours.

    model.safetensors | pytorch_model.bin     every weight and buffer, in the model's dtype
    optimizer.bin                             torch's state dict: states by number, see `matching.py`
    random_states_0.pkl, ...                  one for each rank

The files do not say which of the tensors that no optimizer trains are buffers: all are kept as frozen weights, and a load takes
what its model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.pieces import Piece, given_piece
from ..errors import CheckpointError, LoadingError
from ..files.documents import printed, shown
from ..files.reader import FileStretch, TensorFile
from ..files.writer import Spec, dtype_name
from .matching import Shape, match_named, match_shapes
from .pickles import Fields, checked_name, named_tensors, number_of, read_pickle, with_values
from .run import MODEL, ForeignOptimizer, ForeignRun, master_dtype, settings_of, whole_piece

# States that have no element for each of a weight's, as torch's optimizers call them.
_NUMBERS = ("step", "mu_product", "eta", "mu")
_WEIGHTS, _PICKLED, _OPTIMIZER = "model.safetensors", "pytorch_model.bin", "optimizer.bin"


def is_plain_state(folder: Path) -> bool:
    return (folder / _OPTIMIZER).is_file() and any((folder / name).is_file() for name in (_WEIGHTS, _PICKLED))


def read_accelerate(folder: Path, names: Sequence[str] | None) -> ForeignRun:
    """The run that was saved in `folder`. names: see `import_checkpoint`. Raises CheckpointError.

    Values of tensors are read when they are written.
    """
    where = printed(folder)
    several = [
        name for name in ("model_1.safetensors", "pytorch_model_1.bin", "optimizer_1.bin") if (folder / name).is_file()
    ]
    if several:
        raise CheckpointError(f"{where} holds {several[0]}: runs of several models or optimizers are not imported.")
    weights = _weights(folder)
    ranks = max(1, len(list(folder.glob("random_states_*.pkl"))))
    run = ForeignRun("accelerate", [[] for _ in range(ranks)])
    content = Fields(read_pickle(folder / _OPTIMIZER), printed(folder / _OPTIMIZER))
    states, groups = content.get("state", dict, "a dictionary"), content.rows("param_groups")
    members = [Fields(group, f"{content.where}: a parameter group").numbers("params") for group in groups]
    shapes = [
        [_shape(states.get(number), f"{content.where}: parameter {shown(number)}") for number in row] for row in members
    ]
    found = _matched(
        shapes, weights, groups, names, in_order=not (folder / _WEIGHTS).is_file(), where=content.where, run=run
    )
    by_number = {
        number: name for row, own in zip(members, found, strict=True) for number, name in zip(row, own, strict=True)
    }
    trained = set(by_number.values())
    for name, weight in weights.items():
        kind, dtype = ("trained", master_dtype(weight.dtype)) if name in trained else ("frozen", weight.dtype)
        if math.prod(weight.shape):
            run.pieces[0].append(weight.piece(f"{MODEL}/{kind}/{name}", dtype))
    run.optimizer = ForeignOptimizer(
        found, [settings_of(group, f"{content.where}: a parameter group") for group in groups]
    )
    _add_states(run, states, by_number, weights, content.where)
    run.facts = {MODEL: _facts(weights, trained)}
    return run


class _Weight:
    """A tensor of the model's file, which is read when it is asked for."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read

    def piece(self, address: str, dtype: torch.dtype) -> Piece:
        spec = Spec(address, dtype, (math.prod(self.shape),))
        return given_piece(address, self.shape, 0, spec, lambda: self.read().reshape(-1).to(dtype))


def _weights(folder: Path) -> dict[str, _Weight]:
    """The tensors by name, in the order of the file; those that share memory once, under the first name."""
    if (folder / _WEIGHTS).is_file():
        try:
            tensors = TensorFile(folder / _WEIGHTS).tensors
        except LoadingError as error:
            raise CheckpointError(str(error)) from error
        return {name: _Weight(shape, dtype, _reader(place, dtype)) for name, (dtype, shape, place) in tensors.items()}
    where = printed(folder / _PICKLED)
    found: dict[str, _Weight] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in named_tensors(Fields(read_pickle(folder / _PICKLED), where).content, where).items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if not tensor.numel() or memory not in seen:
            seen.add(memory)
            found[name] = _Weight(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
    return found


def _reader(place: FileStretch, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            return place.read(0, place.nbytes).view(dtype)
        except LoadingError as error:
            raise CheckpointError(str(error)) from error

    return read


def _shape(state: Any, where: str) -> Shape:
    """The shape that a parameter's states tell of it; None if it has none."""
    found = {
        tuple(with_values(value, where).shape)
        for name, value in Fields({} if state is None else state, where).content.items()
        if isinstance(value, Tensor) and name not in _NUMBERS
    }
    if len(found) > 1:
        raise CheckpointError(
            f"{where} has states of the shapes {sorted(found)}: an optimizer whose states are not like its weights is not"
            " imported."
        )
    return next(iter(found), None)


def _matched(
    shapes: Sequence[Sequence[Shape]],
    weights: Mapping[str, _Weight],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None,
    *,
    in_order: bool,
    where: str,
    run: ForeignRun,
) -> list[list[str]]:
    known = {name: weight.shape for name, weight in weights.items() if weight.dtype.is_floating_point}
    if names is None and all("param_names" in group for group in groups):
        names = [checked_name(name, where) for group in groups for name in group["param_names"]]
    try:
        if names is not None:
            return match_named(shapes, known, names)
        found = match_shapes(shapes, known, in_order=in_order)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    run.notes.append(
        "The optimizer's states are kept by number: they were given to the weights in the model's order. If the script hands "
        "its optimizer another one, import with --names."
    )
    return found


def _add_states(
    run: ForeignRun, states: Mapping[Any, Any], by_number: Mapping[Any, str], weights: Mapping[str, _Weight], where: str
) -> None:
    assert run.optimizer is not None
    for number, state in states.items():
        if number not in by_number:
            raise CheckpointError(f"{where}: has states of {shown(number)}, which is in none of its parameter groups.")
        name = by_number[number]
        numbers: dict[str, Any] = {}
        for key, value in Fields(state, f"{where}: {printed(name)}").content.items():
            if isinstance(value, Tensor) and key not in _NUMBERS:
                if not isinstance(key, str) or not key or "/" in key:
                    raise CheckpointError(f"{where}: {shown(key)} is not the name of an optimizer's state.")
                own = master_dtype(weights[name].dtype) if value.is_floating_point() else value.dtype
                run.pieces[0].append(whole_piece(f"optimizer0/{key}/{MODEL}/{name}", value, own))
            else:
                numbers[key] = value.clone() if isinstance(value, Tensor) else value
        run.optimizer.numbers[name] = numbers
        run.optimizer.steps = max(run.optimizer.steps, int(number_of(numbers.get("step", 0), f"{where}: step")))


def _facts(weights: Mapping[str, _Weight], trained: set[str]) -> dict[str, Any]:
    return {
        "class": "",
        "config": None,
        "generation_config": None,
        "aliases": {},
        "ignored": [],
        "dtypes": {name: dtype_name(weight.dtype) for name, weight in weights.items() if name in trained},
        "peft": {},
        "adapters": {},
    }
