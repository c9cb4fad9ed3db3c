"""What a checkpoint consists of, as it is written on disk, and how a directory is judged without reading its tensors.

    checkpoint_3/
      manifest.json             format, world size, step; size and sum of every index; its own sum. Written last.
      rank-00000.json           index of rank 0's tensors: parameter, shape, interval, dtype, place, sums; its state as JSON
      rank-00000.safetensors    the tensors, each a flat interval
      rank-00001.json ...

An index part is one rank's interval of one tensor. All of it is JSON and safetensors: nothing in it can run code.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .tensor_file import Place, dtype_name, dtype_named

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

    def to_text(self) -> str:
        rows = {
            part.address: {
                "shape": list(part.shape),
                "begin": part.begin,
                "numel": part.numel,
                "dtype": dtype_name(part.place.dtype),
                "offset": part.place.offset,
                "nbytes": part.place.nbytes,
                "blocks": list(part.place.blocks),
            }
            for part in self.parts
        }
        return json.dumps({"tensors": rows, "state": self.state}, separators=(",", ":")) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Index:
        """Raises KeyError, TypeError or ValueError for a text that is no index."""
        content = json.loads(text)
        parts = [
            Part(
                address,
                tuple(row["shape"]),
                int(row["begin"]),
                int(row["numel"]),
                Place(dtype_named(row["dtype"]), int(row["offset"]), int(row["nbytes"]), tuple(row["blocks"])),
            )
            for address, row in content["tensors"].items()
        ]
        return cls(parts, content["state"])


@dataclass(frozen=True)
class Entry:
    """One rank's two files, as the manifest lists them."""

    index: str
    index_crc: int
    tensors: str | None  # None where the rank had no tensor to write
    tensors_nbytes: int


@dataclass(frozen=True)
class Manifest:
    """The checkpoint as a whole.

    step:    optimizer steps taken. order: counts up over the saves of a directory; the newest has the highest.
    metric:  what `save_state(metric=)` said, for keeping the best. frozen: where frozen weights are, see `save`.
    """

    world_size: int
    step: int
    order: int
    entries: tuple[Entry, ...]
    metric: float | None = None
    frozen: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

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
            "ranks": [vars(entry) for entry in self.entries],
        }
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=1) + "\n"


def describer(
    world_size: int,
    step: int,
    order: int,
    metric: float | None = None,
    frozen: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> Callable[[Sequence[Entry]], Manifest]:
    """What makes the manifest once every rank's files are known."""
    value = None if metric is None else float(metric)
    return lambda entries: Manifest(world_size, step, order, tuple(entries), value, frozen or {}, facts or {})


def _checksum(content: dict[str, Any]) -> int:
    kept = {key: value for key, value in content.items() if key != "checksum"}
    return zlib.crc32(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())


def text_checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete checkpoint: every file is there and has its size. Contents are checked when they are read.

    Raises CheckpointError with the reason why `directory` is not a complete checkpoint.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a checkpoint of shardwise, or one whose save was cut short: it has no {MANIFEST}."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{directory} is not a checkpoint of shardwise: {MANIFEST} does not say {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{directory} has version {content.get('version')} of the format; this shardwise reads {VERSION}."
        )
    if content.get("checksum") != _checksum(content):
        raise CheckpointError(f"{path} is damaged: its checksum differs.")
    entries = tuple(Entry(**row) for row in content["ranks"])
    for entry in entries:
        for name, nbytes in ((entry.index, None), (entry.tensors, entry.tensors_nbytes)):
            if name is None:
                continue
            try:
                size = (directory / name).stat().st_size
            except OSError:
                raise CheckpointError(f"{directory} is incomplete: {name} is missing.") from None
            if nbytes is not None and size != nbytes:
                raise CheckpointError(f"{directory} is damaged: {name} has {size} bytes instead of {nbytes}.")
    fields = ("world_size", "step", "order")
    numbers = {name: int(content[name]) for name in fields}
    return Manifest(
        **numbers, entries=entries, metric=content["metric"], frozen=content["frozen"], facts=content["facts"]
    )


def read_index(directory: Path, entry: Entry) -> Index:
    """One rank's index, its sum checked. Raises CheckpointError."""
    path = directory / entry.index
    try:
        text = path.read_text(encoding="utf-8")
        if text_checksum(text) != entry.index_crc:
            raise CheckpointError(f"{path} is damaged: its checksum differs.")
        return Index.from_text(text)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}.") from None
