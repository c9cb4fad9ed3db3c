"""save_checkpoint and load_checkpoint, on shardwise's own format: a directory that appears whole or not at all.

    save_dir/
      latest                  the tag that was saved last, one line
      zero_to_fp32.py         makes a file of torch with whole fp32 weights of it
      global_step20/          a checkpoint, see checkpoint/manifest.py; `shardwise export` reads it too

The engine's counters and the client's state lie in it. Random generators are kept, and are not set by a load, as in DeepSpeed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Protocol

from ...checkpoint.directory import resolve
from ...checkpoint.run_folder import RunFolder
from ...checkpoint.run_saving import load_run, save_run
from ...checkpoint.run_state import RunState
from ...errors import CheckpointError, ConfigError
from ...files.documents import SETTINGS_NBYTES, read_text
from ...files.names import below
from ...front.entering import PreparedModel
from ...plan.precision import LossScaler
from ...ranks.agree import on_first, together
from ...run.plugins import ProjectConfiguration
from .optimizer import ZeroOptimizer

logger = logging.getLogger("shardwise")

LATEST = "latest"
_SCRIPT = '''#!/usr/bin/env python
"""Whole fp32 weights of a checkpoint of shardwise, as a file of torch: zero_to_fp32.py CHECKPOINT_DIR OUTPUT [-t TAG]"""

from shardwise.compat.deepspeed.zero_to_fp32 import main

if __name__ == "__main__":
    main()
'''


class Saved(Protocol):
    """What of an engine is saved and brought back."""

    optimizer: ZeroOptimizer | None
    lr_scheduler: Any
    global_steps: int
    micro_steps: int
    skipped_steps: int
    loaded_checkpoint_tag: str | None

    @property
    def prepared(self) -> PreparedModel: ...


def save(
    engine: Saved, save_dir: str, tag: str | None, client: dict[str, Any], latest: bool, without_frozen: bool
) -> bool:
    """See `DeepSpeedEngine.save_checkpoint`. Raises CheckpointError with the same words on every rank."""
    ranks = engine.prepared.sharded.ranks
    ranks.together(lambda: _check_directory(save_dir))
    name = f"global_step{engine.global_steps}" if tag is None else str(tag)
    ranks.require_same("save_checkpoint", {"save_dir": str(save_dir), "tag": name, "without_frozen": without_frozen})
    folder = RunFolder()
    target = Path(save_dir) / name
    place = on_first(ranks, lambda: _chosen(folder, target))
    counters = {
        "step": engine.global_steps,
        "micro_steps": engine.micro_steps,
        "skipped_steps": engine.skipped_steps,
        "backwards": 0 if engine.optimizer is None else engine.optimizer.backwards.count,
        "client": client,
    }
    save_run(_run_of(engine), place, counters, include_frozen=not without_frozen)

    def finish() -> None:
        folder.release()
        if ranks.rank == 0:
            if latest:
                _write(Path(save_dir) / LATEST, f"{name}\n")
            script = Path(save_dir) / "zero_to_fp32.py"
            _write(script, _SCRIPT)
            script.chmod(0o755)

    together(ranks, finish, what=f"{target}: ")
    return True


def _check_directory(save_dir: Any) -> None:
    if not isinstance(save_dir, (str, os.PathLike)) or not str(save_dir):
        raise ConfigError(f"save_checkpoint: save_dir is {save_dir!r}, which names no directory.")


def _chosen(folder: RunFolder, target: Path) -> Any:
    target.parent.mkdir(parents=True, exist_ok=True)
    return folder.choose(ProjectConfiguration(), target, None)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _run_of(engine: Saved, *, optimizer: bool = True, scheduler: bool = True) -> RunState:
    sharded, wrapped, schedule = engine.prepared.sharded, engine.optimizer, engine.lr_scheduler
    kept = schedule if callable(getattr(schedule, "state_dict", None)) else None
    stepped = optimizer and wrapped is not None
    return RunState(
        ranks=sharded.ranks,
        models=[sharded],
        steppers=[wrapped.stepper] if stepped and wrapped is not None else [],
        schedulers=[kept] if scheduler and kept is not None else [],
        loaders=[],
        objects=[],
        averages=[],
        scaler=wrapped.scaler if stepped and wrapped is not None else LossScaler(enabled=False),
    )


def load(
    engine: Saved,
    load_dir: str,
    tag: str | None,
    *,
    strict: bool,
    optimizer: bool,
    scheduler: bool,
    counts: bool,
) -> tuple[str | None, dict[str, Any] | None]:
    """See `DeepSpeedEngine.load_checkpoint`. Raises CheckpointError with the same words on every rank.

    optimizer, scheduler, counts: whether the states of these and the engine's counters come beside the weights.
    """
    ranks = engine.prepared.sharded.ranks
    path = on_first(ranks, lambda: find(load_dir, tag))
    if path is None:
        if ranks.rank == 0:
            logger.warning(
                "%s has no file %s, so nothing was loaded. To load a checkpoint of it pass its tag, the name of its directory.",
                load_dir, LATEST,
            )  # fmt: skip
        return None, None
    run = _run_of(engine, optimizer=optimizer, scheduler=scheduler)
    _, counters = load_run(run, path, strict=strict, generators=False)
    if counts:
        engine.global_steps = int(counters["step"])
        engine.micro_steps = int(counters.get("micro_steps", 0))
        engine.skipped_steps = int(counters.get("skipped_steps", 0))
        if engine.optimizer is not None:
            engine.optimizer.backwards.count = int(counters.get("backwards", 0))
    engine.loaded_checkpoint_tag = path.name
    return str(path), dict(counters.get("client") or {})


def find(folder: str | Path, tag: str | None) -> Path | None:
    """The checkpoint of a tag, or of the file `latest`; None if there is no such file. Raises CheckpointError if it is none."""
    where = Path(folder)
    if tag is None:
        named = where / LATEST
        if not named.is_file():
            return None
        path = below(where, read_text(named, CheckpointError, SETTINGS_NBYTES).strip(), f"{named}: the tag")
    else:
        path = where / str(tag)
    theirs = sorted([*path.glob("*_model_states.pt"), *path.glob("*_optim_states.pt")])
    if theirs:
        raise CheckpointError(
            f"{path} was written by DeepSpeed itself ({theirs[0].name}): shardwise, which stands for it here, has a format "
            "of its own. `shardwise import` brings such a checkpoint over."
        )
    return resolve(path)
