"""Which runs this one goes on with: it may remove what automatic naming made in them, and nothing else.

run A   checkpoint_0 .. checkpoint_5                        made: {run: A, after: []}
run B   resumes checkpoint_5, saves checkpoint_6            made: {run: B, after: [A]}      limits: A's and B's
run C   resumes checkpoint_3, saves checkpoint_7            made: {run: C, after: [A]}      limits: A's and C's, not B's
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from .manifest import Origin

_LONGEST = 1000  # a run that starts again and again


@dataclass
class Lineage:
    """own: the number of this run. after: those of the runs that it has resumed, the first one first."""

    own: str = field(default_factory=lambda: uuid.uuid4().hex)
    after: tuple[str, ...] = ()

    def resume(self, made: Origin | None) -> None:
        """This run goes on with a checkpoint of `made`."""
        if made is not None:
            known = dict.fromkeys((*self.after, *made.after, made.run))
            known.pop(self.own, None)
            self.after = tuple(known)[-_LONGEST:]

    def origin(self, name: str | None) -> Origin:
        """What a checkpoint of this run says. name: what automatic naming called it."""
        return Origin(self.own, name, self.after)

    @property
    def runs(self) -> frozenset[str]:
        return frozenset((self.own, *self.after))
