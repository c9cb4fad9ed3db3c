"""What of a save stands until the next one: lists that take Python for each interval, and change only with the model's layout.

Each is known by its witnesses, the very objects that it was made from (units, slabs, an optimizer's states), and by facts.
They are held weakly: nothing lives longer because it was saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Standing:
    """Values that were made before, by name."""

    def __init__(self) -> None:
        self.made = 0  # how often something was made anew
        self._kept: dict[str, tuple[list[weakref.ref[Any]], object, Any]] = {}

    def of(
        self, name: str, witnesses: Sequence[object], facts: object, make: Callable[[], T], *, counts: bool = True
    ) -> T:
        """What `make` gave for these witnesses, in this order, and equal facts; else what it gives now.

        counts: `made` does.
        """
        found = self._kept.get(name)
        if found is not None and _are(found[0], witnesses) and found[1] == facts:
            kept: T = found[2]
            return kept
        made = make()
        self.made += counts
        self._kept[name] = ([weakref.ref(one) for one in witnesses], facts, made)
        return made

    def clear(self) -> None:
        """Forget everything."""
        self.made += 1
        self._kept.clear()


def _are(refs: Sequence[weakref.ref[Any]], objects: Sequence[object]) -> bool:
    return len(refs) == len(objects) and all(ref() is one for ref, one in zip(refs, objects, strict=True))
