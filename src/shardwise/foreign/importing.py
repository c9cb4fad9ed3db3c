"""`shardwise import`: a run that another library saved, as one of our checkpoints, so that it goes on here.

    DeepSpeed, ZeRO-1 to 3      a tag's directory, the one that holds `latest`, accelerate's or Trainer's around it
    accelerate's save_state     model.safetensors or pytorch_model.bin, optimizer.bin, ...

Neither library is needed, and nothing that a file names is run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.directory import next_order
from ..checkpoint.lineage import Lineage
from ..checkpoint.manifest import describer
from ..checkpoint.read import Checkpoint
from ..checkpoint.saved_states import check_states
from ..checkpoint.write import write_alone
from ..errors import CheckpointError
from ..files.documents import printed
from .accelerate import is_plain_state, read_accelerate
from .beside import add_beside
from .deepspeed import read_deepspeed
from .deepspeed_files import find_tag
from .run import ForeignRun


@dataclass(frozen=True)
class Imported:
    """What became of a run. source: the library that saved it. notes: a sentence for each thing that was not carried over."""

    path: Path
    source: str
    step: int
    world_size: int
    notes: Sequence[str]


def import_checkpoint(
    source: str | os.PathLike[str], output: str | os.PathLike[str], *, names: Sequence[str] | None = None
) -> Imported:
    """Write the run that was saved at `source` as a checkpoint at `output`, a directory that is new.

    names: the trained weights in the order in which the optimizer was given them; only accelerate's files may need it.
    Raises CheckpointError, and leaves nothing, for files that are damaged, incomplete, of two runs, or would run code.
    """
    folder, target = Path(os.path.abspath(source)), Path(os.path.abspath(output))
    if not folder.is_dir():
        raise CheckpointError(f"{printed(folder)} is no directory.")
    run = _read(folder, names)
    drafts = run.drafts()
    step = run.optimizer.steps if run.optimizer is not None else 0
    record = {"models": {}, "kept": "inside"}
    manifest = describer(len(drafts), step, next_order(target.parent), None, record, run.facts, Lineage().origin(None))
    write_alone(target, drafts, manifest, run.beside, lambda staging: _read_back(staging, folder, len(drafts)))
    return Imported(target, run.source, step, len(drafts), run.notes)


def _read_back(staging: Path, source: Path, world_size: int) -> None:
    """Raise CheckpointError unless a load would take what was written: weights are whole, states have their form."""
    try:
        checkpoint = Checkpoint(staging)
        check_states([checkpoint.state(rank) for rank in range(world_size)], range(world_size))
    except CheckpointError as error:
        raise CheckpointError(
            f"{printed(source)} does not hold a whole run, so nothing was written: {str(error).removeprefix(str(staging))}"
        ) from error


def _read(folder: Path, names: Sequence[str] | None) -> ForeignRun:
    tag = find_tag(folder)
    if tag is not None:
        if names is not None:
            raise CheckpointError(
                f"{printed(folder)} is a DeepSpeed checkpoint, which says the names itself: leave --names out."
            )
        run = read_deepspeed(tag)
        # A tag lies in a directory of DeepSpeed's own, in accelerate's or in Trainer's.
        add_beside(run, tag.parent)
        return run
    if is_plain_state(folder):
        run = read_accelerate(folder, names)
        add_beside(run, folder)
        return run
    raise CheckpointError(
        f"{printed(folder)} is neither a DeepSpeed checkpoint (a directory with `latest` or with *_model_states.pt) nor one of "
        "accelerate's save_state (model.safetensors or pytorch_model.bin, and optimizer.bin)."
    )
