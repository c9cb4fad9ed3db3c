"""Saving the state of a run into a directory, and bringing it back: functions over a `RunState`, for whatever holds a run.

    save_run(run, target)     settle, draft, write: the directory appears whole or not at all
    load_run(run, path)       read the indexes, compare, and only then change anything

What of a run is in the `RunState` is what is saved, or brought back: without steppers a load is of the weights alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from ..errors import CheckpointError
from ..ranks.agree import sees_another, together
from ..ranks.ranks import Ranks
from ..zero.sharded import ShardedModel
from .frozen import compare_frozen, forget_sums, frozen_record
from .manifest import Manifest, describer, text_checksum
from .model_facts import KeptAdapters, adapters_of, dtypes_of, facts_of
from .patience import Progress, patiently
from .read import Checkpoint
from .run_folder import Place
from .run_models import Changed
from .run_state import RunState
from .saved_states import check_states, say_what_lacks
from .write import Draft, open_staging, write_checkpoint

logger = logging.getLogger("shardwise")

_facts: WeakKeyDictionary[ShardedModel, dict[str, Any]] = WeakKeyDictionary()


class DamagedError(CheckpointError):
    """This checkpoint cannot be read to its end; an older one may do."""


@dataclass(frozen=True)
class Drafted:
    """What a save is about to write. manifest: describes it, see `write_checkpoint`. failed: how an error begins."""

    draft: Draft
    manifest: Callable[..., Manifest]
    failed: str


# Saving.


def draft_run(
    run: RunState, place: Place, counters: Mapping[str, Any], include_frozen: bool | Literal["shared"]
) -> Drafted:
    """This rank's part of a checkpoint of a run that is settled. Arguments as `save_run`. Collective."""
    frozen = frozen_record([sharded.model for sharded in run.models], run, include_frozen, place.target)
    kept = [adapters_of(model) for model in run.models]
    failed = f"{place.target} was not saved: "
    whole = include_frozen is True
    draft = together(run.ranks, lambda: run.draft(dict(counters), kept, with_frozen=whole), what=failed)
    assert draft is not None
    facts = _facts_of(run.models, kept)
    world_size = run.ranks.world_size
    return Drafted(draft, describer(world_size, run.step, place.order, place.metric, frozen, facts, place.made), failed)


def save_run(
    run: RunState,
    place: Place,
    counters: Mapping[str, Any] | None = None,
    *,
    include_frozen: bool | Literal["shared"] = False,
) -> None:
    """Write the run to `place.target`. Collective; between two optimizer steps.

    place:          where, the same on every rank; see `RunFolder.choose`.
    counters:       plain numbers, texts, tensors and containers of them, which `load_run` gives back; "step" is among them.
    include_frozen: False keeps a fingerprint of frozen weights; True keeps them; "shared" keeps them once, beside the target.
    Raises CheckpointError with the same words on every rank; what was there is then unharmed.
    """
    run.settle()
    made = draft_run(run, place, {"step": run.step, **(counters or {})}, include_frozen)
    staging = open_staging(place.target, run.ranks)
    write_checkpoint(staging, place.target, made.draft, run.ranks, made.manifest)


def _facts_of(models: Sequence[ShardedModel], adapters: Sequence[KeptAdapters]) -> dict[str, Any]:
    for model in models:
        if model not in _facts:
            _facts[model] = facts_of(model)
    # What is trained may change from one save to the next.
    return {f"model{n}": {**_facts[m], "dtypes": dtypes_of(m), **adapters[n].facts} for n, m in enumerate(models)}


# Loading.


def load_run(
    run: RunState,
    path: Path,
    *,
    strict: bool = True,
    generators: bool = True,
    hooks: Sequence[Callable[[], Any]] = (),
) -> tuple[Checkpoint, dict[str, Any]]:
    """Bring the checkpoint `path` into the run; gives it, and its counters. Collective.

    strict:     False passes over weights that only one of the two has.
    generators: False leaves the random generators as they are.
    hooks:      called once the checkpoint is known to fit, before anything is changed.
    Raises CheckpointError with the same words on every rank; DamagedError, of its kind, for one that cannot be read to its end.
    What was found before anything was read has changed nothing.
    """
    ranks = run.ranks
    run.settle()
    what = f"{path} could not be loaded: "
    checkpoint, states = _open(path, ranks)
    changed = together(ranks, lambda: run.check(checkpoint, states[0], strict=strict), what="")
    assert changed is not None
    _thaw(run, changed, path)
    since = {f"model{number}/{name}" for number, found in enumerate(changed) for name in found.since}
    groups = run.of_optimizers.group_names()
    together(ranks, lambda: run.of_optimizers.check_groups(states, groups, since), what=what)
    for hook in hooks:
        together(ranks, hook, what=what)
    frozen = compare_frozen(run, checkpoint, [found.since for found in changed], strict=strict)
    for model in run.models:
        model.drop_gradients()
    reading = Progress("reads its part")
    try:
        patiently(ranks, lambda: run.restore_tensors(checkpoint, states, frozen), reading, what=f"Loading {path}")
    except CheckpointError as error:
        raise DamagedError(what + str(error)) from error
    run.publish()
    counters = together(ranks, lambda: run.restore_rest(states, groups, since, generators=generators), what=what)
    assert counters is not None
    forget_sums(run.models[number] for number in frozen)
    if ranks.rank == 0:
        say_what_lacks(states[0], path, {"scheduler": len(run.schedulers), "registered object": len(run.objects)})
    return checkpoint, counters


def _thaw(run: RunState, changed: Sequence[Changed], path: Path) -> None:
    """Weights that the checkpoint has trained get a place for what was trained, also while they are frozen here."""
    for model, found in zip(run.models, changed, strict=True):
        model.thawing.thaw_names(found.thawed)
        if found.thawed and run.ranks.rank == 0:
            logger.warning(
                "%s holds %d trained weight(s) that are frozen here, the first is %s. They take its values, and are "
                "trained once they require gradients.",
                path,
                len(found.thawed),
                min(found.thawed),
            )


def _open(path: Path, ranks: Ranks) -> tuple[Checkpoint, list[dict[str, Any]]]:
    def read() -> tuple[Checkpoint, list[dict[str, Any]]]:
        checkpoint = Checkpoint(path)
        # Registered objects may be large, and those of other ranks are theirs.
        mine = (0, ranks.rank)
        states = [
            checkpoint.state(rank, () if rank in mine else ("objects",))
            for rank in range(checkpoint.manifest.world_size)
        ]
        check_states(states, [rank for rank in mine if rank < len(states)])
        return checkpoint, states

    try:
        found = patiently(ranks, read, Progress("reads the indexes"), what=f"Loading {path}")
    except CheckpointError as error:
        raise DamagedError(f"{path} could not be loaded: {error}") from error
    assert found is not None
    # Machines that each read their own disk have perhaps saved there at different times.
    apart = sees_another(ranks, text_checksum(found[0].manifest.to_text()))
    if apart is not None:
        raise CheckpointError(
            f"{path} could not be loaded: it is another checkpoint on {apart.host} (rank {apart.rank}) than on "
            f"{apart.host_of_0} (rank 0). Load from a directory that all machines share, or copy one machine's there."
        )
    return found
