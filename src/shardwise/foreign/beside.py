"""What accelerate and Trainer write beside weights and optimizer: schedules, loss scale, generators, registered objects.

    accelerate's save_state     scheduler.bin, scheduler_1.bin, scaler.pt, random_states_0.pkl, custom_checkpoint_0.pkl
    Trainer's checkpoint-N      scheduler.pt, rng_state.pth or rng_state_0.pth

A file of these that cannot be taken as it is leaves the import as a sentence, not as an error, but for one that is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ..checkpoint.generators import check_generator_states
from ..errors import CheckpointError
from ..files.documents import printed
from ..ranks.agreeing import attempt
from .pickles import Fields, array_of_words, read_pickle
from .run import ForeignRun, can_be_kept

_GENERATORS = (
    # name of a rank's file, of the one rank's where it differs, and the keys in it
    (
        "random_states_{}.pkl",
        None,
        {"python": "random_state", "numpy": "numpy_random_seed", "torch": "torch_manual_seed"},
    ),
    ("rng_state_{}.pth", "rng_state.pth", {"python": "python", "numpy": "numpy", "torch": "cpu"}),
)
_CUDA = ("torch_cuda_manual_seed", "cuda")


def add_beside(run: ForeignRun, folder: Path) -> None:
    """Put what lies in `folder` into `run`. Raises CheckpointError for a file that is damaged or would run code."""
    if not run.schedulers:
        run.schedulers = _numbered(folder, "scheduler", ".bin", run) or _numbered(folder, "scheduler", ".pt", run)
        run.lacks = [kind for kind in run.lacks if kind != "scheduler"] + ([] if run.schedulers else ["scheduler"])
    if "scheduler" in run.lacks:
        run.notes.append("No state of a schedule is carried over: a prepared scheduler begins at its start.")
    run.objects = _objects(folder, run)
    if not run.objects:
        run.lacks.append("registered object")
    if (folder / "scaler.pt").is_file():
        run.scaler = _scaler(folder / "scaler.pt")
    _add_generators(run, folder)
    run.notes.append(
        "The position in the data is not in it: the first epoch of this run begins at its start, unless the script skips what "
        "was read (skip_first_batches)."
    )


def _numbered(folder: Path, stem: str, suffix: str, run: ForeignRun) -> list[dict[str, Any]]:
    """The states in `stem.bin`, `stem_1.bin` ... that a checkpoint can hold; none if one of them is not."""
    found: list[dict[str, Any]] = []
    while (path := folder / f"{stem}{f'_{len(found)}' if found else ''}{suffix}").is_file():
        state = Fields(read_pickle(path), printed(path)).content
        if not can_be_kept(state):
            run.notes.append(
                f"{path.name} is not carried over: it holds objects that are no numbers, texts, lists or tensors."
            )
            return []
        found.append(state)
    return found


def _objects(folder: Path, run: ForeignRun) -> list[Any]:
    found: list[Any] = []
    while (path := folder / f"custom_checkpoint_{len(found)}.pkl").is_file():
        state, error = attempt(lambda: read_pickle(path))
        if error is not None or not can_be_kept(state):
            run.notes.append(
                f"Registered objects are not carried over: {error or f'{path.name} holds more than plain values.'}"
            )
            return []
        found.append(state)
    return found


def _scaler(path: Path) -> dict[str, Any]:
    content = Fields(read_pickle(path), printed(path))
    if not content.content:  # one that was not enabled
        return {"value": 1.0, "good_steps": 0}
    return {
        "value": float(content.get("scale", (int, float), "a number")),
        "good_steps": content.count("_growth_tracker"),
    }


def _add_generators(run: ForeignRun, folder: Path) -> None:
    for each, only, keys in _GENERATORS:
        paths = [folder / each.format(rank) for rank in range(len(run.pieces))]
        if only is not None and len(paths) == 1 and not paths[0].is_file():
            paths = [folder / only]
        if not paths[0].is_file():
            continue
        absent = next((path for path in paths if not path.is_file()), None)
        if absent is not None:
            raise CheckpointError(f"{printed(folder)} is incomplete: {absent.name} is missing.")
        files = [Fields(read_pickle(path), printed(path)) for path in paths]
        if isinstance(files[0].content.get("step"), int):
            run.counter = files[0].count("step")
        states = [_generators(file.content, keys, rank, len(files)) for rank, file in enumerate(files)]
        _, error = attempt(lambda: _check(states))  # noqa: B023 - called at once
        if error is None:
            run.generators = states
            return
        run.notes.append(f"Random generators are not carried over: those in {paths[0].name} cannot be taken ({error}).")
        return
    run.notes.append("Random generators are not in it: they stay as the script seeds them.")


def _check(states: Sequence[dict[str, Any]]) -> None:
    for state in states:
        check_generator_states(state)


def _generators(content: Mapping[Any, Any], keys: Mapping[str, str], rank: int, world_size: int) -> dict[str, Any]:
    """One rank's generators, as `checkpoint/generators.py` keeps them."""
    found = {name: content.get(key) for name, key in keys.items()}
    match found["numpy"]:
        case (str() as kind, words, int() as position, int() as has_gauss, float() as gauss):
            raw = array_of_words(words)
            if raw is not None:
                found["numpy"] = (kind, numpy.frombuffer(raw, "<u4").copy(), position, has_gauss, gauss)
    cuda = next((content[key] for key in _CUDA if key in content), None)
    devices = cuda if isinstance(cuda, list) else [cuda]
    # Of every device that the process saw. Which one was its own is only known on one machine.
    if devices[0] is not None and (len(devices) == 1 or world_size <= len(devices)):
        found["cuda"] = devices[0 if len(devices) == 1 else rank]
    return found
