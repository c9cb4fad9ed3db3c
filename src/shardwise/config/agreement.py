"""What the ranks of a run must have in common, key by key, and the words for what differs.

Every machine has a configuration file of its own and every process its own environment, so two ranks can be told different
things. `AGREED` has the keys that then change numbers, or the number and order of messages between the ranks; `OWN` those
that are a machine's own, with the reason, which the schema gives (`setting.py`). This file compares plain values; who
carries them from rank to rank is told in `ranks/meeting.py` and `Ranks.compare`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .compiling import CompileConfig
from .schema import Config, every_setting
from .setting import setting_of

# A machine's own, or of no effect: key -> why ranks may differ in it. The others are compared. A size of memory is among those:
# the rank with the least room decides, so machines with different GPUs need no different numbers; and a rank without a budget
# would not take part where the others ask each other for theirs.
_WHY = {".".join(key): setting_of(info).own for key, info in every_setting()}
OWN: dict[str, str] = {key: why for key, why in _WHY.items() if why is not None}
AGREED: tuple[str, ...] = tuple(key for key in _WHY if key not in OWN)

VERSIONS = ("shardwise version", "torch version")
OBJECTS = "the list of objects"
# Where one of these differs, other facts differ with it: they are told alone.
_ALONE = (VERSIONS[0], OBJECTS)
SAME_EVERYWHERE = "Give every machine the same configuration, flags and packages, and every rank the same script."
_MOST = 8  # differences that one error lists


def keys_of_schema() -> list[str]:
    """Every key of the configuration that has no keys below it, dotted."""
    return list(_WHY)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings in force that ranks must have in common: dotted key -> plain JSON value.

    What two spellings say alike is alike here: a section that is not there has its defaults.
    """
    values = config.model_dump(mode="json")
    values["deepspeed_config"] = config.zero.model_dump(mode="json")
    values["dynamo_config"] = (config.compiling or CompileConfig()).model_dump(mode="json")
    found: dict[str, Any] = {}
    for key in AGREED:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


@dataclass(frozen=True)
class Difference:
    """A fact that not all ranks have alike. ranks: by its value, as text, in the order of the ranks."""

    key: str
    ranks: dict[str, list[int]]

    def __str__(self) -> str:
        """`zero_stage is 3 on ranks 0-2 and 2 on rank 3`."""
        return self.told(ranks_said)

    def told(self, who: Callable[[list[int]], str]) -> str:
        """As `str`. who: words for rows that are perhaps no ranks."""
        return f"{self.key} is " + " and ".join(f"{value} on {who(rows)}" for value, rows in self.ranks.items())

    @property
    def first_other(self) -> int:
        """The first rank that differs from rank 0."""
        return min(ranks[0] for ranks in list(self.ranks.values())[1:])


def differences(rows: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """What is not the same in all rows, one for each rank."""
    found: dict[str, Difference] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        ranks: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            ranks.setdefault(said(row[key]) if key in row else "not there", []).append(rank)
        if len(ranks) > 1:
            found[key] = Difference(key, ranks)
    if any(key in found for key in _ALONE):
        return [found[key] for key in (*VERSIONS, OBJECTS) if key in found]
    return list(found.values())


def disagreement(what: str, differing: Sequence[Difference], remedy: str) -> str:
    """An error's text for what `differences` found: `the settings of ranks 0 and 1 differ: ...`.

    what: with `{ranks}` where the first two are named that differ.
    """
    first = min(difference.first_other for difference in differing)
    return f"{what.format(ranks=f'ranks 0 and {first}')}: {listed(differing, ranks_said)}. {remedy}"


def listed(differing: Sequence[Difference], who: Callable[[list[int]], str]) -> str:
    """The first of them, and how many more there are. who: see `Difference.told`."""
    texts = [difference.told(who) for difference in differing[:_MOST]]
    if len(differing) > _MOST:
        texts.append(f"and {len(differing) - _MOST} more")
    return "; ".join(texts)


def of_any_version(kind: type[Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in what a process of perhaps another version said: what is not known here is left out."""
    return {name: said[name] for name in kind.__dataclass_fields__ if name in said}


def ranks_said(ranks: Iterable[int], noun: str = "rank") -> str:
    """`rank 1`, `ranks 0-2, 5`. noun: what else is numbered."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    alone = len(runs) == 1 and runs[0][0] == runs[0][1]
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"{noun}{'' if alone else 's'} {', '.join(parts)}"


def said(value: Any) -> str:
    """A plain value as a configuration file would say it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) and value else json.dumps(value, sort_keys=True)
