"""The run that this process has joined, of which there is one: joining it once, by whatever asks first, and leaving it."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from ..config.accelerate_variables import configuration
from ..config.check import from_environment
from ..config.schema import Config
from ..errors import ConfigError
from ..ranks import unfinished
from ..ranks.agreeing import attempt
from ..ranks.ranks import Ranks
from . import beside
from .accumulation import GradientState


class AcceleratorSettings(Protocol):
    """An Accelerator, as far as the state of the run speaks of it."""

    @property
    def mixed_precision(self) -> str: ...

    @property
    def deepspeed_plugin(self) -> Any: ...

    @property
    def deepspeed_plugins(self) -> Any: ...

    @property
    def dynamo_plugin(self) -> Any: ...


class Joined:
    """What this process has joined. Class attributes, because there is one run per process."""

    ranks: Ranks | None = None
    # In the order in which they were made, each with the configuration that it works by.
    accelerators: list[tuple[weakref.ref[AcceleratorSettings], Config]] = []  # noqa: RUF012


def join_run(*, use_cpu: bool | None = None, timeout_s: float | None = None, beside_accelerate: bool = False) -> Ranks:
    """The ranks of this process's run; joins it at the first call, which is collective.

    use_cpu:   None takes the configuration's answer.
    timeout_s: how long a collective may wait, in seconds; None takes the configuration's.
    beside_accelerate: accelerate itself reads its variables in this process, so they are not looked at here.
    Raises ConfigError if the run was already joined on a GPU and `use_cpu` is asked for now, and what `Ranks.join` raises.
    """
    if Joined.ranks is not None:
        check_device(Joined.ranks, use_cpu)
        return Joined.ranks
    config, problem = attempt(from_environment if beside_accelerate else lambda: configuration()[0])
    config = config or Config()
    ranks = join_first(config, use_cpu=use_cpu, timeout_s=timeout_s, problem=problem)
    if problem is not None:
        raise problem
    return ranks


def join_first(
    config: Config, *, use_cpu: bool | None = None, timeout_s: float | None = None, problem: Exception | None = None
) -> Ranks:
    """The ranks of the run; joins it, by these settings, if this process has not. problem: see `Ranks.join`."""
    if Joined.ranks is None:
        Joined.ranks = Ranks.join(
            use_cpu=config.use_cpu if use_cpu is None else use_cpu,
            timeout_s=config.engine.collective_timeout_s if timeout_s is None else timeout_s,
            problem=problem,
            wait_warning_s=config.engine.wait_warning_s,
        )
        beside.tell(Joined.ranks)
    return Joined.ranks


def check_device(ranks: Ranks, use_cpu: bool | None) -> None:
    """ConfigError if the run was joined on a GPU, and the CPU is asked for now."""
    if use_cpu and ranks.device.type != "cpu":
        raise ConfigError(
            f"this process already joined the run on {ranks.device}; ask for the CPU where the first state or Accelerator is "
            "made."
        )


def leave_run() -> None:
    """Leave the run, once no save in the background needs the other ranks: after this the process may join another one."""
    if Joined.ranks is not None:
        unfinished.finish()
        Joined.ranks.leave()
    forget_run()


def forget_run() -> None:
    """Drop the views of the run without taking the process group down; for whoever owns the group."""
    Joined.ranks = None
    Joined.accelerators = []
    GradientState._reset_state()
    beside.forget()


def remember_accelerator(accelerator: AcceleratorSettings, config: Config) -> None:
    """Make `accelerator` the one that AcceleratorState speaks of, as long as it lives; then the one before it again."""
    Joined.accelerators = [(known, its) for known, its in Joined.accelerators if known() is not None]
    Joined.accelerators.append((weakref.ref(accelerator), config))


def accelerator_in_force() -> AcceleratorSettings | None:
    """The Accelerator that was made last of those that live."""
    return next((found for known, _ in reversed(Joined.accelerators) if (found := known()) is not None), None)


def configuration_in_force() -> Config | None:
    """The configuration of that one, which holds for what a script does not say to another: one run has one set of settings."""
    return next((config for known, config in reversed(Joined.accelerators) if known() is not None), None)
