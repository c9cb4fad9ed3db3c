"""Who is told, in this process, what `activity` publishes for the others: a record of the run listens so."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """What hears of the training path. See `watching/watch.py`."""

    def begins(self, doing: int) -> None:
        """A pass or a step begins (a `Doing`), on the main thread or on autograd's; with NONE it ends."""

    def stepped(self) -> None:
        """An optimizer step is done: on every rank behind the same collectives."""

    def calls(self, verb: str) -> None:
        """The script is in a verb for which the ranks meet; `returns` follows."""

    def returns(self) -> None:
        """The verb that was called last is over."""
