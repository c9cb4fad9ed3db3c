"""What a checkpoint consists of, as it is written on disk.

    checkpoint_3/
      manifest.json             format, world size, step; size and sum of every index; its own sum. Written last.
      rank-00000.json           index of rank 0's tensors: parameter, shape, interval, dtype, place, sums; its state as JSON
      rank-00000.safetensors    the tensors, each a flat interval
      rank-00001.json ...

An index part is one rank's interval of one tensor. All of it is JSON and safetensors: nothing in it can run code. What is read
back is checked field by field, see `checks.py`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..files.writer import Place, Spec, dtype_name

FORMAT = "shardwise-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """Elements [begin, begin + numel) of the tensor of an address, in one file."""

    address: str
    shape: tuple[int, ...]
    begin: int
    numel: int
    place: Place


@dataclass
class Index:
    """What one rank wrote: its parts, and its state (see `codec`)."""

    parts: list[Part] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


def index_text(rows: Sequence[str], state: dict[str, Any]) -> str:
    """The JSON of an index. rows: of each part `row_head` and `row_end`."""
    return f'{{"tensors":{{{",".join(rows)}}},"state":{_json(state)}}}\n'


def row_head(address: str, shape: Sequence[int], begin: int, spec: Spec, offset: int) -> str:
    """The row of a tensor that will lie at byte `offset` of its file, up to the sums of its blocks."""
    row = {
        "shape": list(shape),
        "begin": begin,
        "numel": spec.shape[0],
        "dtype": dtype_name(spec.dtype),
        "offset": offset,
        "nbytes": spec.nbytes,
    }
    return f'{_json(address)}:{_json(row)[:-1]},"blocks":['


def row_end(blocks: Sequence[int]) -> str:
    """What follows a `row_head`."""
    return f"{','.join(map(str, blocks))}]}}"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@dataclass(frozen=True)
class Entry:
    """One rank's two files, as the manifest lists them."""

    index: str
    index_crc: int
    tensors: str | None  # None where the rank had no tensor to write
    tensors_nbytes: int


@dataclass(frozen=True)
class Origin:
    """Who made a checkpoint: only what automatic naming has made is ever removed, and only by its own run.

    run:   the number of the run.
    name:  the name that automatic naming gave; None where the script named the directory.
    after: the numbers of the runs that it went on with, the first one first.
    """

    run: str
    name: str | None
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The checkpoint as a whole.

    step:    optimizer steps taken. order: counts up over the saves of a directory; the newest has the highest, and frozen
             weights that checkpoints share have -1.
    metric:  what `save_state(metric=)` said, for keeping the best. frozen: where frozen weights are, see `frozen_record`.
    facts:   of each model, see `facts_of`. made: None in checkpoints of versions that did not note it.
    """

    world_size: int
    step: int
    order: int
    entries: tuple[Entry, ...]
    metric: float | None = None
    frozen: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    made: Origin | None = None

    def to_text(self) -> str:
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "world_size": self.world_size,
            "step": self.step,
            "order": self.order,
            "metric": self.metric,
            "frozen": self.frozen,
            "facts": self.facts,
            "made": None if self.made is None else {**vars(self.made), "after": list(self.made.after)},
            "ranks": [vars(entry) for entry in self.entries],
        }
        content["checksum"] = checksum_of(content)
        return json.dumps(content, indent=1) + "\n"


def describer(
    world_size: int,
    step: int,
    order: int,
    metric: float | None = None,
    frozen: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    made: Origin | None = None,
) -> Callable[[Sequence[Entry]], Manifest]:
    """What makes the manifest once every rank's files are known."""
    value = None if metric is None else float(metric)
    return lambda entries: Manifest(world_size, step, order, tuple(entries), value, frozen or {}, facts or {}, made)


def checksum_of(content: dict[str, Any]) -> int:
    """The sum of a manifest's JSON object, but for the sum itself."""
    kept = {key: value for key, value in content.items() if key != "checksum"}
    return zlib.crc32(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())


def text_checksum(text: str) -> int:
    return zlib.crc32(text.encode())
