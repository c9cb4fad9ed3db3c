"""What ranks have kept in a checkpoint, checked for its form before anything of a run is changed.

The state of a rank is what `RunState.draft` puts into its index: decoded, it may still be anything, if the file was changed by
hand. A field that is missing or of another kind makes the checkpoint a damaged one, which a search for the newest passes over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files.documents import printed, shown
from ..zero.buffers import unpacked
from .checks import is_count
from .generators import check_generator_states

logger = logging.getLogger("shardwise")

_OF_EACH = {"buffers": dict, "generators": dict, "optimizers": list, "loaders": list}
_OF_THE_FIRST = {"models": int, "schedulers": list, "scaler": dict, "counters": dict, "objects": list}


def check_states(states: Sequence[Any], objects_of: Sequence[int]) -> None:
    """Raise CheckpointError unless `states` are those of the ranks of one run, as `RunState` takes them.

    objects_of: the ranks whose registered objects were decoded.
    """
    for rank, state in enumerate(states):
        where = f"the state of rank {rank}"
        for key, kind in (_OF_EACH | (_OF_THE_FIRST if rank == 0 else {})).items():
            found = state.get(key) if key != "objects" or rank in objects_of else []
            if not isinstance(found, kind) or isinstance(found, bool):
                raise CheckpointError(f"{where}: {key} is {shown(found)}, which is not what a save writes.")
        for address, buffer in state["buffers"].items():
            _check_buffer(buffer, f"{where}: {printed(address)}")
        if rank and rank in objects_of and not isinstance(state.get("objects", ...), list | None):
            raise CheckpointError(
                f"{where}: objects is {shown(state.get('objects'))}, which is not what a save writes."
            )
        if len(state["optimizers"]) != len(states[0]["optimizers"]):
            raise CheckpointError(f"{where}: has other optimizers than rank 0.")
        for saved in state["optimizers"]:
            _check_optimizer(saved, where, first=rank == 0)
        _check_generators(state["generators"], where)
    first = states[0]
    averages = first.get("averages", [])  # versions before averages wrote none
    if not isinstance(averages, list) or not all(map(is_count, averages)):
        raise CheckpointError(f"the state of rank 0: averages is {shown(averages)}, which are no counts.")
    if not isinstance(first.get("lacks", []), list):
        raise CheckpointError(
            f"the state of rank 0: lacks is {shown(first['lacks'])}, which is not what a save writes."
        )
    if not is_count(first["counters"].get("step")):
        raise CheckpointError(f"the state of rank 0: counters is {shown(first['counters'])}, which has no step.")
    for saved in first["loaders"]:
        together = saved.get("samples_at_a_time") if isinstance(saved, dict) else -1
        if not (together is None or is_count(together)) or not is_count(saved.get("batches")):
            raise CheckpointError(f"the state of rank 0: a loader is at {shown(saved)}, which is no place in an epoch.")


def check_counts(number: int, saved: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Raise CheckpointError if optimizer `number` has other groups than were saved, where torch raises ValueError.

    saved: its state of rank 0. sizes: of each group now, the number of parameters. The order of groups is free.
    """
    have, count = len(sizes), len(saved["groups"])
    if have != count:
        raise CheckpointError(
            f"optimizer {number} was saved with {count} parameter group(s), and has {have} here. Build the groups as they "
            "were, those that add_param_group has added included, before load_state."
        )
    then = saved.get("sizes", sizes)  # versions before these wrote none
    if sorted(then) != sorted(sizes):
        raise CheckpointError(
            f"the parameter groups of optimizer {number} were saved with {', '.join(map(str, then))} parameters, and have "
            f"{', '.join(map(str, sizes))} here, frozen ones included. Build the groups as they were, before load_state."
        )


def lacking(first: Mapping[str, Any]) -> list[str]:
    """Kinds of objects of which an imported checkpoint has no states: "scheduler", "registered object". first: of rank 0."""
    found: list[str] = first.get("lacks", [])
    return found


def say_what_lacks(first: Mapping[str, Any], path: Path, prepared: Mapping[str, int]) -> None:
    """Warn of what a checkpoint that was imported cannot give back. prepared: how many there are of each kind."""
    for kind in lacking(first):
        if prepared.get(kind):
            logger.warning(
                "%s was imported from another library and holds no state of a %s: the %d prepared here begin(s) at the start.",
                path,
                kind,
                prepared[kind],
            )
    if not first["generators"]:
        logger.warning("%s was imported without random generators: they go on as they are.", path)


def _check_buffer(saved: Any, where: str) -> None:
    try:
        shape = tuple(unpacked(saved).shape)
        fits = isinstance(saved, Tensor) or shape == tuple(saved["shape"])
    except Exception:  # whatever torch says of parts that do not fit
        fits = False
    if not fits:
        raise CheckpointError(f"{where} is {shown(saved)}, which is no buffer.")


def _check_optimizer(saved: Any, where: str, *, first: bool) -> None:
    names = saved.get("names") if isinstance(saved, dict) else None
    fits = (
        isinstance(names, list)
        and all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in names)
        and isinstance(saved.get("numbers"), dict)
        and all(isinstance(numbers, dict) for numbers in saved["numbers"].values())
    )
    if fits and first:
        groups = saved.get("groups")
        fits = (
            isinstance(groups, list)
            and len(groups) == len(names or ())
            and all(isinstance(group, dict) and "params" not in group for group in groups)
        )
        sizes = saved.get("sizes", [])
        fits = fits and isinstance(sizes, list) and all(map(is_count, sizes))
        fits = fits and is_count(saved.get("steps")) and isinstance(saved.get("step_was_skipped"), bool)
    if not fits:
        raise CheckpointError(f"{where}: an optimizer is {shown(saved)}, which is not what a save writes.")


def _check_generators(saved: dict[str, Any], where: str) -> None:
    if not saved:  # imported without any
        return
    try:
        check_generator_states(saved)
    except Exception as error:  # of three libraries
        raise CheckpointError(
            f"{where}: a random generator cannot take its state ({type(error).__name__}: {shown(str(error))})."
        ) from error
