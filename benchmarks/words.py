"""A word that names what is compared, taken apart: `NAME[:STAGE][+OPTION...]`. It knows no engine, and imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

# Options of shardwise, and the dtype in which moments that are offloaded then rest.
STATE_DTYPES = {"bf16states": "bf16", "int8states": "int8"}
STAGES = {"shardwise": ("0", "1", "2", "3"), "deepspeed": ("1", "2", "3")}


@dataclass(frozen=True)
class Word:
    """text: as it was written. prefetch: of `+prefetchN`, which only shardwise has; 1 where it is not said."""

    text: str
    kind: str
    stage: int | None
    options: frozenset[str]
    prefetch: int = 1

    @classmethod
    def taken_apart(cls, text: str, kinds: Mapping[str, Collection[str]]) -> Self:
        """kinds: the options of each name; all have +compile and +aot. Raises ValueError for a word that names nothing."""
        head, *options = text.strip().split("+")
        kind, _, stage = head.partition(":")
        prefetch = 1
        for option in list(options):
            if match := re.fullmatch(r"prefetch(\d+)", option):
                prefetch = int(match.group(1))
                options.remove(option)
        if kind not in kinds:
            raise ValueError(f"no engine is called {kind!r}; there are {', '.join(kinds)}")
        if stage not in STAGES.get(kind, ("",)):
            raise ValueError(
                f"{text!r}: a stage belongs to shardwise (0 to 3) and deepspeed (1 to 3), and to nothing else"
            )
        if unknown := set(options) - set(kinds[kind]) - {"compile", "aot"}:
            raise ValueError(f"{text!r}: {kind} has no option {', '.join(sorted(unknown))}")
        if prefetch != 1 and kind != "shardwise":
            raise ValueError(f"{text!r}: prefetch is an option of shardwise")
        return cls(text.strip(), kind, int(stage) if stage else None, frozenset(options), prefetch)

    @property
    def backend(self) -> str | None:
        """Of torch.compile, or None in eager."""
        return "inductor" if "compile" in self.options else "aot_eager" if "aot" in self.options else None
