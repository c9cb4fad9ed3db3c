"""What a key of the schema says of itself beside its type, default and values: its flag, its question, its comment in a file.

    prefetch_units: Annotated[int, whole_number(0), Setting("How many units are gathered ahead.", ENGINE)] = 1

is all that the front ends need to know of a setting: `cli/flags.py` makes the flags of these, `cli/config.py` the questions,
`yaml_file.py` the comments, `agreement.py` what ranks must have in common, and `compat/` the keys of its section. This file
knows no setting by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from .fields import Kind

# The parts of --help, in their order.
ZERO, TRAINING, PROCESSES, MACHINES, ENGINE = PANELS = ("ZeRO", "Training", "Processes", "Machines", "Engine")


@dataclass(frozen=True)
class Wording:
    """How `shardwise config` asks for a setting.

    text:    the question; help: one line on what it means.
    choices: value -> text, for a question that is answered with the arrow keys.
    """

    text: str
    help: str
    choices: dict[Any, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One key.

    help:    of its flag, which is named as the key; without it there is no flag.
    panel:   the part of --help that shows the flag.
    metavar: what stands there for the value, where that is not what the kind of value says.
    switch:  the flag takes no value; `--no_name` says false.
    also:    the flag's other names, as users of accelerate know them.
    after:   the flag that it follows in --help, where that is not the one above it in the schema.
    comment: beside the key in a file that is written.
    asked:   the question for it.
    own:     why ranks may differ in it; without a reason they must have it in common.
    in_json: a key of EngineConfig is also one of the section `shardwise` in a DeepSpeed JSON. False for what concerns the
             launcher or an Accelerator alone, and for what DeepSpeed has a key of its own for.
    """

    help: str = ""
    panel: str = ENGINE
    metavar: str | None = None
    switch: bool = False
    also: tuple[str, ...] = ()
    after: str | None = None
    comment: str | None = None
    asked: Wording | None = None
    own: str | None = None
    in_json: bool = True


def setting_of(info: FieldInfo) -> Setting:
    """What a field of the schema says of itself; of one that must be empty, that there is nothing to compare."""
    said = next((item for item in info.metadata if isinstance(item, Setting)), None)
    if said is not None:
        return said
    empty = any(isinstance(item, Kind) and item.empty for item in info.metadata)
    return Setting(own="is empty" if empty else None)


def metavar_of(info: FieldInfo) -> str:
    """What stands for a value of this field in --help."""
    own = setting_of(info).metavar
    kinds = (item.metavar for item in info.metadata if isinstance(item, Kind))
    return own or next((text for text in kinds if text is not None), "TEXT")
