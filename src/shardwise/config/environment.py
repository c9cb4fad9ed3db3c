"""What the launcher told this process through the environment: the only place that reads it.

torchrun, Slurm's `srun` under torchrun, and `shardwise launch` all set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. A process without them is a run of one rank. This file must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among the ranks, as the launcher set it.

    launched: False when no launcher set the variables; then rank 0 of 1.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> RankEnvironment:
        """Raises ConfigError if only some of the variables are set, or one is not a whole number."""
        env = os.environ if environ is None else environ
        if "WORLD_SIZE" not in env and "RANK" not in env:
            return cls()
        values: dict[str, int] = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            default = {"LOCAL_RANK": env.get("RANK"), "LOCAL_WORLD_SIZE": env.get("WORLD_SIZE")}.get(name)
            text = env.get(name, default)
            if text is None:
                raise ConfigError(
                    f"{name} is not set in the environment, but its companions are. Start the script "
                    "with `shardwise launch` or `torchrun`, or unset RANK and WORLD_SIZE."
                )
            try:
                values[name] = int(text)
            except ValueError:
                raise ConfigError(f"{name}={text!r} in the environment is not a whole number.") from None
        if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
            raise ConfigError(f"RANK={values['RANK']} is not between 0 and WORLD_SIZE={values['WORLD_SIZE']} - 1.")
        return cls(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"], True)


def without_multicast() -> None:
    """Keep torch's symmetric memory from making multicast objects, which copies do not need, unless somebody asked for them."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
