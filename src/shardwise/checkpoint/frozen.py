"""Frozen weights in a checkpoint: where they came from and what they are, compared when it is loaded, kept where asked.

They do not change, so that a copy in every checkpoint would be the same bytes again and again. The record in the manifest has a
source and, for each weight, its dtype and a fingerprint that is the same however ranks have cut it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import CheckpointError
from ..ranks.agree import on_first, together
from ..ranks.agreeing import attempt
from ..ranks.ranks import Ranks
from ..step import intervals
from ..zero.sharded import ShardedModel
from . import directory
from .fingerprint import fingerprints
from .manifest import describer
from .places import refuse_foreign
from .read import Checkpoint, shared_by
from .run_state import RunState
from .write import Draft, open_staging, write_checkpoint

logger = logging.getLogger("shardwise")

# Each model is summed up once, and again after a script has written into it: (writes, sums).
_sums: WeakKeyDictionary[ShardedModel, tuple[int, dict[str, str]]] = WeakKeyDictionary()


def frozen_record(
    models: Sequence[nn.Module], run: RunState, include: bool | Literal["shared"], target: Path
) -> dict[str, Any]:
    """What the manifest of `target` says of frozen weights. Collective.

    models: the user's, in the run's order. include: with "shared" they are written now, beside `target`, unless they are there.
    """
    ranks = run.ranks
    found = {
        f"model{number}": {"source": _source(model), "sums": _sums_of(sharded, ranks)}
        for number, (model, sharded) in enumerate(zip(models, run.models, strict=True))
    }
    record: dict[str, Any] = {"models": found, "kept": "inside" if include is True else "outside"}
    if include == "shared":
        digest = hashlib.sha256(json.dumps([entry["sums"] for entry in found.values()]).encode()).hexdigest()[:16]
        store = target.parent / f"frozen-{digest}"
        record["kept"] = store.name
        if not on_first(ranks, lambda: _is_there(store)):
            staging = open_staging(store, ranks)
            write_checkpoint(
                staging, store, Draft(run.of_models.frozen_pieces()), ranks, describer(ranks.world_size, 0, -1)
            )
    return record


def compare_frozen(
    run: RunState, checkpoint: Checkpoint, since: Sequence[set[str]], *, strict: bool = True
) -> dict[int, set[str]]:
    """Model -> its frozen weights that are not those of the checkpoint, but are kept by it. Collective.

    since:  of each model the weights that it trains now, and the checkpoint had frozen. They are compared and given too.
    strict: False passes over those that only one of the two has.
    Raises CheckpointError if they differ and are not kept.
    """
    record = checkpoint.manifest.frozen
    differing: dict[int, set[str]] = {}
    for number, model in enumerate(run.models):
        saved = record["models"].get(f"model{number}")
        if saved is None:
            differing[number] = _given_back(model, checkpoint, f"model{number}/frozen/", since[number], run.ranks)
            continue
        sums = _sums_of(model, run.ranks) | _sums_of_trained(model, since[number], saved["sums"], run.ranks)
        names = {*sums, *saved["sums"]} if strict else sums.keys() & saved["sums"].keys()
        wrong = {name for name in names if sums.get(name) != saved["sums"].get(name)}
        if not strict or set(sums) == set(saved["sums"]):
            # What the checkpoint holds it gives back: frozen weights of adapters in any case, all where that was asked for.
            inside = {n for n in wrong if record["kept"] != "outside" or f"model{number}/frozen/{n}" in checkpoint}
            other_dtype = {n for n in wrong if _dtype(sums[n]) != _dtype(saved["sums"][n])}
            differing[number] = inside - other_dtype
            wrong -= differing[number]
            if other_dtype and record["kept"] == "outside":
                if run.ranks.rank == 0:
                    logger.warning(
                        "The frozen weights rest in another dtype than when %s was saved: they cannot be compared.",
                        checkpoint.directory,
                    )
                continue
        if not wrong:
            continue
        source = f" It was saved with those of {saved['source']}." if saved["source"] else ""
        raise CheckpointError(
            f"{checkpoint.directory}: {len(wrong)} frozen weight(s) of this model are not those that it was saved with, "
            f"the first is {min(wrong)}.{source} Load the same base model, or save with include_frozen=True."
        )
    differing = {number: names for number, names in differing.items() if names}
    if differing and record["kept"] not in ("inside", "outside"):
        together(run.ranks, lambda: checkpoint.add(shared_by(checkpoint), "model"), what="frozen weights: ")
    return differing


def _given_back(model: ShardedModel, checkpoint: Checkpoint, prefix: str, since: set[str], ranks: Ranks) -> set[str]:
    """The frozen weights that a checkpoint of another library holds, which says nothing of those that it does not hold.

    Raises CheckpointError for one of another shape.
    """
    members = [member for member in model.whole.members() if not member.trained or member.name in since]
    for member in members:
        if prefix + member.name in checkpoint and checkpoint.shape(prefix + member.name) != member.shape:
            raise CheckpointError(
                f"{checkpoint.directory}: the frozen weight {member.name} has shape {checkpoint.shape(prefix + member.name)}, "
                f"but this model's is {member.shape}."
            )
    absent = [member.name for member in members if prefix + member.name not in checkpoint]
    if absent and ranks.rank == 0:
        logger.warning(
            "%s was imported without %d frozen weight(s), the first is %s: they stay as they are here, and are not compared.",
            checkpoint.directory,
            len(absent),
            absent[0],
        )
    return {member.name for member in members} - set(absent)


def _is_there(store: Path) -> bool:
    """Whether the frozen weights are kept already. Raises CheckpointError where something else has their name."""
    found, _ = attempt(lambda: directory.resolve(store))
    if found is None:
        refuse_foreign(store)
    return found is not None


def forget_sums(models: Iterable[ShardedModel]) -> None:
    """The frozen weights of these models were written: sum them up anew when it is asked for."""
    for model in models:
        _sums.pop(model, None)


def _sums_of_trained(model: ShardedModel, names: set[str], saved: Mapping[str, str], ranks: Ranks) -> dict[str, str]:
    """What `_sums_of` would say of these if they were frozen: in the dtype that they had when they were saved. Collective."""
    if not names:
        return {}
    held = [
        replace(one, dtype=getattr(torch, _dtype(saved[one.name])))
        for one in intervals.share(intervals.trained(model), model.ranks)
        if one.name in names
    ]
    found = fingerprints(held, ranks)
    return {name: f"{_dtype(saved[name])} {total}" for name, total in found.items()}


def _sums_of(model: ShardedModel, ranks: Ranks) -> dict[str, str]:
    """Name -> dtype and fingerprint of each frozen weight. Collective."""
    if model not in _sums or _sums[model][0] != model.writes:
        held = intervals.share(intervals.frozen(model), model.ranks)
        dtypes = {m.name: str(m.dtype).removeprefix("torch.") for m in model.whole.members() if not m.trained}
        sums = {name: f"{dtypes[name]} {total}" for name, total in fingerprints(held, ranks).items()}
        _sums[model] = (model.writes, sums)
    return _sums[model][1]


def _dtype(text: str) -> str:
    return text.split(" ", 1)[0]


def _source(model: Any) -> str | None:
    """The hub id or path that the base weights were loaded from, where the model knows it."""
    base = getattr(model, "get_base_model", lambda: model)()
    found = getattr(getattr(base, "config", None), "_name_or_path", None)
    return str(found) if found else None
