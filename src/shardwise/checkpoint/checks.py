"""What a manifest and an index must look like, checked field by field before anything is done with them.

A file whose sum is right may still say anything: somebody may have written it by hand, or another program under the same name.
Here JSON becomes a Manifest or an Index, or a CheckpointError with the file, the field and what it holds. Afterwards names
are names and never paths, numbers are whole numbers within bounds, and every part lies in its file, within its tensor, and
apart from all others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from ..errors import CheckpointError
from ..files.documents import printed, shown
from ..files.writer import BLOCK_NBYTES, DTYPES, Place
from .manifest import FORMAT, MANIFEST, VERSION, Entry, Index, Manifest, Origin, Part, checksum_of

# 64 bits, as in the files of tensors.
_LARGEST = 1 << 63
_DIMENSIONS = 64  # torch's own limit
STORE = re.compile(r"frozen-[0-9a-f]{16}")
_ADDRESS = re.compile(
    r"model[0-9]+/(trained|frozen|buffer|adapter)/.+|(optimizer|average)[0-9]+/[^/]+/model[0-9]+/.+|(state|objects)(/.*)?",
    re.DOTALL,
)
_RUN = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"checkpoint_[0-9]{1,18}")


class Fields:
    """A JSON object of a file, asked for its fields by kind. Raises CheckpointError. where: file and place, for the errors."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise CheckpointError(f"{where} is {shown(content)}, which is no JSON object.")
        self.content: dict[str, Any] = content

    def _get(self, key: str, fits: Callable[[Any], bool], kind: str, otherwise: Any = ...) -> Any:
        value = self.content.get(key, otherwise)
        if value is ...:
            raise CheckpointError(f"{self.where} has no {key}.")
        if not (value is otherwise or fits(value)):
            raise CheckpointError(f"{self.where}: {key} is {shown(value)}, which is not {kind}.")
        return value

    def count(self, key: str, least: int = 0, below: int = _LARGEST) -> int:
        found: int = self._get(key, lambda v: is_count(v, least, below), f"a whole number from {least} on")
        return found

    def text(self, key: str, fits: Callable[[str], object], kind: str) -> str:
        found: str = self._get(key, lambda v: isinstance(v, str) and bool(fits(v)), kind)
        return found

    def optional(self, key: str, fits: Callable[[Any], object], kind: str) -> Any:
        """None where it is None or not there."""
        return self._get(key, lambda v: v is None or bool(fits(v)), kind, None)

    def counts(self, key: str, below: int = _LARGEST) -> tuple[int, ...]:
        found = self._get(
            key, lambda v: isinstance(v, list) and all(is_count(n, 0, below) for n in v), "a list of whole numbers"
        )
        return tuple(found)

    def mapping(self, key: str, otherwise: Any = ...) -> dict[str, Any]:
        found: dict[str, Any] = self._get(key, lambda v: isinstance(v, dict), "an object", otherwise)
        return found

    def rows(self, key: str) -> list[Any]:
        found: list[Any] = self._get(key, lambda v: isinstance(v, list), "a list")
        return found


def is_count(value: Any, least: int = 0, below: int = _LARGEST) -> bool:
    # A bool is an int to Python.
    return type(value) is int and least <= value < below


def manifest_from(content: Any, directory: object) -> Manifest:
    """The manifest of a checkpoint at `directory`, from the JSON of its file. Raises CheckpointError."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{directory} is not a checkpoint of shardwise: {MANIFEST} does not say {FORMAT!r}.")
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{directory} has version {shown(version)} of the format; this shardwise reads {VERSION}."
        )
    where = f"{directory}/{MANIFEST}"
    if content.get("checksum") != checksum_of(content):
        raise CheckpointError(f"{where} is damaged: its checksum differs.")
    fields = Fields(content, where)
    world_size, rows = fields.count("world_size", 1, 1 << 24), fields.rows("ranks")
    if len(rows) != world_size:
        raise CheckpointError(f"{where}: world_size is {world_size}, but it lists {len(rows)} rank(s).")
    return Manifest(
        world_size,
        fields.count("step"),
        fields.count("order", -1),
        tuple(_entry(Fields(row, f"{where}: rank {rank}"), rank) for rank, row in enumerate(rows)),
        _metric(fields),
        _frozen(fields),
        _facts(fields),
        _origin(fields),
    )


def _entry(fields: Fields, rank: int) -> Entry:
    stem = f"rank-{rank:05d}"
    index = fields.text("index", lambda name: name == f"{stem}.json", f"{stem}.json")
    tensors = fields.optional("tensors", lambda name: name == f"{stem}.safetensors", f"{stem}.safetensors")
    nbytes = fields.count("tensors_nbytes")
    if tensors is None and nbytes:
        raise CheckpointError(f"{fields.where}: has {nbytes} bytes of tensors, but no file of them.")
    return Entry(index, fields.count("index_crc", 0, 1 << 32), tensors, nbytes)


def _metric(fields: Fields) -> float | None:
    value = fields.optional("metric", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a number")
    return float(value) if value is not None and math.isfinite(value) else None


def _frozen(fields: Fields) -> dict[str, Any]:
    found = fields.mapping("frozen")
    if not found:
        return {"models": {}, "kept": "outside"}
    record = Fields(found, f"{fields.where}: frozen")
    kinds = ("inside", "outside")
    record.text("kept", lambda kept: kept in kinds or STORE.fullmatch(kept), "inside, outside or frozen-<digest>")
    for model, row in record.mapping("models").items():
        entry = Fields(row, f"{record.where}: {printed(model)}")
        entry.optional("source", lambda source: isinstance(source, str), "a text")
        _texts(entry.mapping("sums"), f"{entry.where}: sums")
    return found


def _facts(fields: Fields) -> dict[str, Any]:
    facts = fields.mapping("facts")
    for model, row in facts.items():
        entry = Fields(row, f"{fields.where}: facts: {printed(model)}")
        for key in ("config", "generation_config"):
            entry.optional(key, lambda value: isinstance(value, dict), "an object")
        for key in ("dtypes", "aliases"):
            _texts(entry.mapping(key, {}), f"{entry.where}: {key}")
        adapters = Fields(entry.mapping("peft", {}), f"{entry.where}: peft")
        for adapter in adapters.content:
            adapters.mapping(adapter)
        ignored = entry.content.get("ignored", [])
        if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
            raise CheckpointError(f"{entry.where}: ignored is {shown(ignored)}, which is not a list of names.")
    return facts


def _texts(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {printed(name)} is {shown(value)}, which is not a text.")


def _origin(fields: Fields) -> Origin | None:
    """None in checkpoints of versions that did not note it."""
    found = fields.optional("made", lambda value: isinstance(value, dict), "an object")
    if found is None:
        return None
    made = Fields(found, f"{fields.where}: made")
    run = made.text("run", _RUN.fullmatch, "the number of a run")
    return Origin(
        run, made.optional("name", lambda n: isinstance(n, str) and _NAME.fullmatch(n), "checkpoint_<number>")
    )


def index_from(content: Any, where: str, entry: Entry) -> Index:
    """One rank's index, from the JSON of its file. Raises CheckpointError, also if parts do not fit the file of tensors."""
    fields = Fields(content, where)
    rows, state = fields.mapping("tensors"), fields.mapping("state")
    if rows and entry.tensors is None:
        raise CheckpointError(f"{where} lists tensors, but the manifest has no file of them.")
    parts = [_part(address, Fields(row, f"{where}: {printed(address)}"), entry) for address, row in rows.items()]
    for before, after in pairwise(sorted(parts, key=lambda part: part.place.offset)):
        if before.place.offset + before.place.nbytes > after.place.offset:
            raise CheckpointError(
                f"{where}: {printed(before.address)} and {printed(after.address)} share bytes of the file."
            )
    return Index(parts, state)


def _part(address: str, fields: Fields, entry: Entry) -> Part:
    shape, begin, numel = fields.counts("shape"), fields.count("begin"), fields.count("numel", 1)
    if len(shape) > _DIMENSIONS:
        raise CheckpointError(f"{fields.where}: shape has {len(shape)} dimensions.")
    dtype = DTYPES[fields.text("dtype", lambda name: name in DTYPES, "a dtype")]
    offset, nbytes, blocks = fields.count("offset"), fields.count("nbytes"), fields.counts("blocks", 1 << 32)
    if begin + numel > math.prod(shape):
        raise CheckpointError(
            f"{fields.where}: elements {begin} to {begin + numel} are not in the shape {shown(shape)}."
        )
    if nbytes != numel * dtype.itemsize:
        raise CheckpointError(f"{fields.where}: {numel} elements of {dtype} are not {nbytes} bytes.")
    if len(blocks) != -(-nbytes // BLOCK_NBYTES):
        raise CheckpointError(f"{fields.where}: {nbytes} bytes have not {len(blocks)} checksum(s).")
    if offset + nbytes > entry.tensors_nbytes:
        raise CheckpointError(
            f"{fields.where}: bytes {offset} to {offset + nbytes} are not in a file of {entry.tensors_nbytes}."
        )
    return Part(address, shape, begin, numel, Place(dtype, offset, nbytes, blocks))


def check_together(parts: Mapping[str, list[Part]], directory: object) -> None:
    """Raise CheckpointError unless the parts of each tensor, over all ranks, are of one tensor and apart from each other.

    parts: by address, in the order of their elements. Weights have to be whole; states and averages belong to one.
    """
    for address, found in parts.items():
        where = f"{directory} is damaged: {printed(address)}"
        if _ADDRESS.fullmatch(address) is None:
            raise CheckpointError(
                f"{where} is not the name of a weight, an optimizer state or anything else that is saved."
            )
        role, *rest = address.split("/", 1)
        if role in ("state", "objects"):  # each rank has its own
            for part in found:
                if part.begin or part.numel != math.prod(part.shape):
                    raise CheckpointError(f"{where} is a part of a tensor, where a whole one is kept.")
            continue
        if any(part.shape != found[0].shape or part.place.dtype != found[0].place.dtype for part in found):
            raise CheckpointError(f"{where} has another shape or dtype in the files of different ranks.")
        ends = [0, *(part.begin + part.numel for part in found)]
        if any(part.begin < end for part, end in zip(found, ends, strict=False)):
            raise CheckpointError(f"{where} has elements that two ranks have written.")
        if (
            not rest[0].startswith("buffer/")
            and not found[0].place.dtype.is_floating_point
            and rest[0].startswith("trained/")
        ):
            raise CheckpointError(f"{where} is of {found[0].place.dtype}, which is not trained.")
        if role.startswith("model"):
            _check_whole(found, ends, where)
        else:
            weight = parts.get(_weight_of("/".join(rest)))
            if weight is not None and weight[0].shape != found[0].shape:
                raise CheckpointError(
                    f"{where} has shape {shown(found[0].shape)}, but its weight has {shown(weight[0].shape)}."
                )


def _check_whole(found: list[Part], ends: Iterable[int], where: str) -> None:
    *within, end = ends
    for part, before in zip(found, within, strict=True):
        if part.begin > before:
            raise CheckpointError(f"{where} lacks elements {before} to {part.begin}.")
    if end != math.prod(found[0].shape):
        raise CheckpointError(f"{where} lacks elements {end} to {math.prod(found[0].shape)}.")


def _weight_of(state: str) -> str:
    """`exp_avg/model0/q.weight` -> `model0/trained/q.weight`."""
    _, model, name = state.split("/", 2)
    return f"{model}/trained/{name}"
