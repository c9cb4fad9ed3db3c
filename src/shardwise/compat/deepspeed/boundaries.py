"""Where a step ends among the micro-batches of an engine: what its configuration counts, or what the script says instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...errors import ConfigError
from ...zero.sharded import ShardedModel
from .settings import Settings


class Boundaries:
    """said: whether the micro-batch at work ends a step, as the script has said; None where it is counted.

    quiet: whether the script is inside of no_sync.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.said: bool | None = None
        self.quiet = False

    def ends_step(self, micro_steps: int) -> bool:
        """Whether the micro-batch behind `micro_steps` others ends a step; False where nobody has them counted."""
        if self.said is not None:
            return self.said
        return self._settings.managed and (micro_steps + 1) % self._settings.steps == 0

    def may_step(self, micro_steps: int) -> bool:
        """Whether a step may come now; where the script alone knows of its micro-batches, always."""
        return (self.said is None and not self._settings.managed) or self.ends_step(micro_steps)

    def tell(self, sharded: ShardedModel, micro_steps: int) -> None:
        """Tell the model whether a step ends here."""
        sharded.sync_gradients = sharded.at_boundary = self.may_step(micro_steps) and not self.quiet

    def no_sync(self, announce: Callable[[], None]) -> Iterator[None]:
        """`DeepSpeedEngine.no_sync` around its block. announce: called at its begin and its end, to `tell` the model."""
        if self._settings.stage >= 2:
            raise ConfigError(
                f"no_sync: gradients are sharded at stage {self._settings.stage}, and reduced in every backward. Leave it "
                "out, or train at stage 0 or 1."
            )
        if self.quiet:
            raise ConfigError("no_sync: it cannot be entered again inside of itself.")
        self.quiet = True
        announce()
        try:
            yield
        finally:
            self.quiet = False
            announce()
