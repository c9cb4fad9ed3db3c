"""The argument objects of an Accelerator: small dataclasses with accelerate's names and fields.

Each field either has its effect here or is refused when the object is made: a setting that does nothing would be a lie
told to the user. Loader settings are in `data/prepare.py`, accumulation in `run/accumulation.py`,
ZeRO in `run/deepspeed_plugin.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .deepspeed_plugin import DeepSpeedPlugin
from .handlers import KwargsHandler

__all__ = [
    "AutocastKwargs",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "GradScalerKwargs",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "ProfileKwargs",
    "ProjectConfiguration",
]


@dataclass
class ProjectConfiguration:
    """Where a run writes.

    project_dir, logging_dir:    logging_dir defaults to project_dir.
    automatic_checkpoint_naming: number checkpoints below project_dir/checkpoints.
    total_limit:                 complete checkpoints that are kept, the newest; None keeps all.
    keep_best:                   so many more are kept, the best by the `metric` given to save_state.
    smaller_is_better:           what "best" means.
    iteration:                   the number of the next one.
    save_on_each_node:           one process per machine writes what `Accelerator.save` is given, not only rank 0.
    """

    project_dir: str | os.PathLike[str] | None = None
    logging_dir: str | os.PathLike[str] | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False
    keep_best: int = 0
    smaller_is_better: bool = True

    def __post_init__(self) -> None:
        if self.total_limit is not None and self.total_limit < 1:
            raise ConfigError(f"ProjectConfiguration: total_limit is {self.total_limit}; keep at least one checkpoint.")
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | os.PathLike[str] | None = None) -> None:
        """Set project_dir, and logging_dir where it is not set yet."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """timeout: how long a collective may wait; None takes the configuration's collective_timeout_s.

    The backend follows from the device (NCCL on CUDA, gloo on CPU) and the address from the launcher.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.backend not in (None, "nccl", "gloo"):
            raise ConfigError(f"InitProcessGroupKwargs: backend {self.backend!r} is not supported; nccl and gloo are.")
        if self.init_method not in (None, "env://"):
            raise ConfigError(
                "InitProcessGroupKwargs: init_method can only be env://, the address that the launcher set."
            )


@dataclass
class GradScalerKwargs(KwargsHandler):
    """The fp16 loss scale. Without this object the configuration's `loss_scale` holds."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass
class AutocastKwargs(KwargsHandler):
    """How `Accelerator.autocast` enters torch's autocast. Prepared models compute in the precision by themselves."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Accepted for scripts that set it for DDP: the engine handles unused parameters and static graphs by itself.

    A communication hook would change the numbers, so it is refused.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: Any = "no"
    comm_wrapper: Any = "no"
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hooks = (self.comm_hook, self.comm_wrapper)
        if self.comm_state_option or any(str(getattr(hook, "value", hook)) not in ("no", "None") for hook in hooks):
            raise ConfigError(
                "DistributedDataParallelKwargs: comm_hook, comm_wrapper and comm_state_option belong to torch's DDP, which is "
                "not used. For 16-bit reductions set reduce_dtype: bf16 in shardwise_config."
            )


@dataclass
class ProfileKwargs(KwargsHandler):
    """What `Accelerator.profile` hands to torch.profiler.

    activities:       "cpu", "cuda"; default: what there is.
    schedule_option:  keywords of torch.profiler.schedule.
    output_trace_dir: where every rank writes profile_{rank}.json in Chrome's format.
    """

    activities: Sequence[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | os.PathLike[str] | None = None

    def build(self, rank: int) -> torch.profiler.profile:
        """A profiler that is not started yet; ConfigError for an unknown activity, or a directory that cannot be made."""
        known = {"cpu": torch.profiler.ProfilerActivity.CPU, "cuda": torch.profiler.ProfilerActivity.CUDA}
        names = [name.lower() for name in self.activities or ()]
        if set(names) - set(known):
            raise ConfigError(f"ProfileKwargs: activities are {sorted(known)}, not {sorted(set(names) - set(known))}.")
        if self.output_trace_dir is not None:  # not when there is a trace to write
            try:
                Path(self.output_trace_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"ProfileKwargs: output_trace_dir {self.output_trace_dir}: {error.strerror}."
                ) from error
        ready = self.on_trace_ready
        if ready is None and self.output_trace_dir is not None and self.schedule_option is not None:
            ready = self.writer(rank)
        return torch.profiler.profile(
            activities=[known[name] for name in names] or None,
            schedule=torch.profiler.schedule(**self.schedule_option) if self.schedule_option else None,
            on_trace_ready=ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )

    def writer(self, rank: int) -> Callable[[torch.profiler.profile], None]:
        """What writes a finished trace."""
        assert self.output_trace_dir is not None
        folder = Path(self.output_trace_dir)

        def write(profile: torch.profiler.profile) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(folder / f"profile_{rank}.json"))

        return write
