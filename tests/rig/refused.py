"""What a script may not do under shardwise although torch lets it: the only errors that a random program may end a verb with.

Each row is a sentence for users, when it holds, and what is raised then, on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rig.scripts import Script
from shardwise.errors import CheckpointError, ReleasedParameterError, ShardwiseError


@dataclass(frozen=True)
class Refusal:
    """says: the rule. verb: that it is about. holds: of (the script in plain torch, the verb's arguments)."""

    says: str
    verb: str
    error: type[ShardwiseError]
    words: str
    holds: Callable[[Script, Sequence[Any]], bool]


REFUSED = (
    Refusal(
        "zero_stage 3: a loss comes through an output of the model, or of a block, or by a way that the first steps took.",
        "backward",
        ReleasedParameterError,
        "a backward needs .*which is released",
        lambda script, args: script.setting.stage == 3 and args[1] in ("caught", "caught_alone"),
    ),
    Refusal(
        "A checkpoint without the frozen weights is loaded where those have the values that they were saved with.",
        "load",
        CheckpointError,
        r"frozen weight\(s\) of this model are not those",
        lambda script, args: not script.is_base_of(*args),
    ),
    Refusal(
        "A checkpoint is loaded into optimizers with the groups that it was saved with; torch raises ValueError.",
        "load",
        CheckpointError,
        "parameter group",
        lambda script, args: not script.has_groups_of(args[0]),
    ),
)


def is_refused(verb: str, args: Sequence[Any], error: ShardwiseError, script: Script) -> bool:
    """Whether the table says that this verb is refused in this setting, with this error."""
    return any(
        row.verb == verb
        and type(error) is row.error
        and re.search(row.words, str(error)) is not None
        and row.holds(script, args)
        for row in REFUSED
    )
