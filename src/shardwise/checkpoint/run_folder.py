"""The directories of a run's checkpoints, as ProjectConfiguration names them: where a save goes, where a load looks, what the
limits remove. Every judgement here is rank 0's; the callers tell the others.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..files.documents import shown
from ..ranks.agreeing import attempt
from ..run.plugins import ProjectConfiguration
from . import directory
from .lineage import Lineage
from .manifest import Origin
from .places import followed, refuse_foreign

logger = logging.getLogger("shardwise")


@dataclass(frozen=True)
class Place:
    """Where a save goes. named: as the script knows it, where that is a link. order, made, metric: see `Manifest`."""

    target: Path
    named: str
    order: int
    made: Origin
    metric: float | None


@dataclass
class RunFolder:
    """What this process has claimed, and the runs that it goes on with.

    looked_at: folders of which others were told. orders: the last that was given in a folder that is claimed, where nobody else
    saves: to read all manifests takes 5 ms for each.
    """

    lineage: Lineage = field(default_factory=Lineage)
    locks: dict[Path, directory.Lock] = field(default_factory=dict)
    looked_at: set[Path] = field(default_factory=set)
    orders: dict[Path, int] = field(default_factory=dict)

    def numbered(self, project: ProjectConfiguration) -> Path:
        """Where automatic naming puts checkpoints. Raises CheckpointError without it."""
        if project.project_dir is None or not project.automatic_checkpoint_naming:
            raise CheckpointError(
                "no directory was given. Name one, or make the Accelerator with "
                "ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True)."
            )
        return Path(project.project_dir) / "checkpoints"

    def choose(
        self, project: ProjectConfiguration, output_dir: str | os.PathLike[str] | None, metric: float | None
    ) -> Place:
        """Where the coming save goes and its place in the order, with the directory claimed for this run."""
        score = _score(metric)
        if output_dir is None:
            folder = self.numbered(project)
            self._claim(folder / ".lock")
            directory.sweep(folder)
            number = directory.next_number(folder, project.iteration)
            project.iteration = number + 1
            target = folder / f"checkpoint_{number}"
            self.orders[folder] = self.orders[folder] + 1 if folder in self.orders else directory.next_order(folder)
            return Place(target, str(target), self.orders[folder], self.lineage.origin(target.name), score)
        given = Path(os.path.abspath(output_dir))
        target = followed(given)
        refuse_foreign(target)
        self._claim(target.with_name(f".lock-{target.name}"))
        return Place(target, str(given), directory.next_order(target.parent), self.lineage.origin(None), score)

    def choose_to_load(
        self, project: ProjectConfiguration, input_dir: str | os.PathLike[str] | None
    ) -> tuple[Path, Path | None]:
        """The directory to search, and the checkpoint in it if one was named. Raises CheckpointError if that is none."""
        if input_dir is None:
            return self.numbered(project), None
        given = Path(os.path.abspath(input_dir))
        if given.name == "latest" and not given.exists():
            return given.parent, None
        return given.parent, directory.resolve(given)

    def prune(self, project: ProjectConfiguration, place: Place) -> None:
        """Keep to the limits. What cannot be removed is a warning: the save itself is done."""
        folder = place.target.parent
        if folder not in self.looked_at:
            self.looked_at.add(folder)
            others, _ = attempt(lambda: directory.not_counted(folder, self.lineage.runs))
            if others:
                logger.warning(
                    "%s: total_limit leaves %s%s alone: this run, and those that it goes on with, have not made them.",
                    folder,
                    ", ".join(others[:3]),
                    f" and {len(others) - 3} more" if len(others) > 3 else "",
                )
        _, error = attempt(
            lambda: directory.prune(
                folder,
                self.lineage.runs,
                newest=project.total_limit,
                best=project.keep_best,
                smaller_is_better=project.smaller_is_better,
            )
        )
        if error is not None:
            logger.warning(
                "%s was saved, but an older checkpoint could not be removed, as total_limit asks: %s.",
                place.target,
                error,
            )

    def _claim(self, path: Path) -> None:
        if path not in self.locks:
            self.locks[path] = directory.Lock(path)

    def release(self) -> None:
        """Give back what was claimed."""
        for lock in self.locks.values():
            lock.release()
        self.locks.clear()
        self.orders.clear()


def _score(metric: float | None) -> float | None:
    """A metric that checkpoints can be compared by; None, and said, where it is no finite number."""
    try:
        value = None if metric is None else float(metric)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save_state: metric is {shown(metric)}, which is not a number.") from error
    if value is None or math.isfinite(value):
        return value
    logger.warning("save_state: metric is %s; this checkpoint has no place among the best.", value)
    return None
