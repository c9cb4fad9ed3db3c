"""Accelerators in pickles: a function that closes over one is fingerprinted by datasets, and sent to spawned workers.

A pickle holds the settings in force and no rank: all ranks have the same bytes, at every time of the run. Out of it comes

    in a process that has an Accelerator    that one: `copy.deepcopy` and a pickle's way back are the object itself
    in any other, such as a worker          one that stands for the run: it knows settings, and by the launcher's variables the
                                            rank that started this process; what needs the other ranks it refuses
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ..config.environment import RankEnvironment
from ..errors import ShardwiseError
from ..run.accumulation import GradientState
from ..run.joined import accelerator_in_force
from .run import Run
from .settings import Settings, loss_scaler


class AbsentRanks:
    """The ranks of a run that this process is none of: their facts, and a refusal of everything else."""

    def __init__(self, device: str) -> None:
        place = RankEnvironment.read()
        self.rank, self.world_size = place.rank, place.world_size
        self.local_rank = place.local_rank or 0
        self.device = torch.device(device, self.local_rank) if device == "cuda" else torch.device(device)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ShardwiseError(
            "this Accelerator came out of a pickle into a process that is no rank of the run, such as a worker: it knows the "
            "run's settings and nothing more. Do what needs the ranks where Accelerator() was called."
        )


def reduced(accelerator: Any) -> tuple[Any, ...]:
    """What pickle keeps of it."""
    run = accelerator._run
    kept = {name: value for name, value in vars(run.settings).items() if name not in ("scaler", "log_with")}
    return unpickled, (type(accelerator), kept, run.ranks.device.type)


def unpickled(cls: type[Any], kept: dict[str, Any], device: str) -> Any:
    """The Accelerator of this process, or one that stands for the run which it came from."""
    known = accelerator_in_force()
    if isinstance(known, cls):
        return known
    if not GradientState().initialized:
        GradientState(kept["accumulation"])
    scaler = loss_scaler(kept["config"], kept["precision"], None)
    standing = object.__new__(cls)
    ranks: Any = AbsentRanks(device)
    object.__setattr__(standing, "_ranks", ranks)
    object.__setattr__(standing, "_run", Run(ranks, Settings(scaler=scaler, log_with=[], **kept)))
    return standing
