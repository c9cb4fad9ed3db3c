"""Whether a micro-batch ends an optimizer step, and which prepared loader is being read: one state for the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ConfigError
from .handlers import KwargsHandler


class ActiveLoader(Protocol):
    """A prepared loader, as far as steps and metrics look at the one that is being read."""

    end_of_dataloader: bool

    @property
    def remainder(self) -> int: ...

    @property
    def last_round(self) -> tuple[Any, ...] | None: ...

    def trains(self) -> None: ...


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How gradients are accumulated.

    num_steps:            micro-batches per optimizer step.
    adjust_scheduler:     whether a scheduler's own count of calls also counts the micro-batches between steps.
    sync_with_dataloader: whether the last batch of a loader always ends a step.
    sync_each_batch:      whether the ranks reduce gradients after every micro-batch.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        if self.num_steps is not None and (not isinstance(self.num_steps, int) or self.num_steps < 1):
            raise ConfigError(
                f"gradient_accumulation_steps is {self.num_steps!r}; it must be a whole number, 1 or more."
            )


class GradientState:
    """Whether this micro-batch ends a step, and which prepared loader is being read. All instances share one state."""

    _sync_gradients = True
    _plugin: GradientAccumulationPlugin | None = None
    _listeners: list[Callable[[], bool]] = []  # noqa: RUF012 - of every Accelerator; False: it is gone
    # Loaders in the order in which their iterations began: an evaluation inside a training loop is on top.
    _reading: list[weakref.ref[ActiveLoader]] = []  # noqa: RUF012 - shared by all instances on purpose

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        """gradient_accumulation_plugin: what holds from now on; None leaves what the last Accelerator was given."""
        if gradient_accumulation_plugin is not None:
            GradientState._plugin = gradient_accumulation_plugin

    @classmethod
    def _reset_state(cls) -> None:
        cls._sync_gradients, cls._plugin = True, None
        cls._listeners, cls._reading = [], []

    @classmethod
    def configure(cls, plugin: GradientAccumulationPlugin | None, listener: Callable[[], bool]) -> None:
        """Take an Accelerator's settings, None where it says none and others hold.

        listener: called whenever `sync_gradients` is set; it gives False once its Accelerator is gone.
        """
        cls._listeners.append(listener)
        if plugin is not None or cls._plugin is None:
            cls._plugin, cls._sync_gradients = plugin, True

    @property
    def initialized(self) -> bool:
        """Whether an Accelerator, or a plugin, has said how gradients are accumulated."""
        return GradientState._plugin is not None

    @property
    def plugin_kwargs(self) -> dict[str, Any]:
        """The plugin's fields that differ from their defaults."""
        return self.plugin.to_kwargs()

    @property
    def dataloader_references(self) -> list[ActiveLoader]:
        """The prepared loaders that are being read, in the order in which that began."""
        return [loader for known in GradientState._reading if (loader := known()) is not None]

    @property
    def sync_gradients(self) -> bool:
        return GradientState._sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        GradientState._sync_gradients = bool(value)
        GradientState._listeners = [listener for listener in GradientState._listeners if listener()]

    @property
    def plugin(self) -> GradientAccumulationPlugin:
        if GradientState._plugin is None:
            GradientState._plugin = GradientAccumulationPlugin(num_steps=1)
        return GradientState._plugin

    @property
    def num_steps(self) -> int:
        return self.plugin.num_steps or 1

    @property
    def adjust_scheduler(self) -> bool:
        return self.plugin.adjust_scheduler

    @property
    def sync_with_dataloader(self) -> bool:
        return self.plugin.sync_with_dataloader

    @property
    def sync_each_batch(self) -> bool:
        return self.plugin.sync_each_batch

    def begin(self, loader: ActiveLoader) -> None:
        """`loader` starts to be read: it is the active one until it ends."""
        GradientState._reading.append(weakref.ref(loader))

    def end(self, loader: ActiveLoader) -> None:
        """One iteration over `loader` ended, at its end or by a `break`."""
        found = [index for index, ref in enumerate(GradientState._reading) if ref() is loader]
        if found:
            del GradientState._reading[found[-1]]

    @property
    def active_dataloader(self) -> ActiveLoader | None:
        """The prepared loader whose iteration began last and has not ended; None outside of all loops."""
        while GradientState._reading:
            loader = GradientState._reading[-1]()
            if loader is not None:
                return loader
            GradientState._reading.pop()
        return None

    @property
    def in_dataloader(self) -> bool:
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """True while the active loader's last batch is being worked on."""
        loader = self.active_dataloader
        return loader is not None and loader.end_of_dataloader

    @property
    def remainder(self) -> int:
        """At the last batch of the active loader, how many of its samples over all ranks are not repeats; 0 if all
        are; -1 outside of loops, before the last batch, or where it cannot be known."""
        loader = self.active_dataloader
        return -1 if loader is None else loader.remainder
