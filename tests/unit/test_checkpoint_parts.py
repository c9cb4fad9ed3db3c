"""The parts of a checkpoint that need no ranks: files, sums, state as JSON, intervals."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, OrderedDict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from shardwise.checkpoint.codec import decode, encode
from shardwise.checkpoint.directory import next_number, not_counted, prune, survey
from shardwise.checkpoint.fingerprint import part_sums
from shardwise.checkpoint.lineage import Lineage
from shardwise.checkpoint.manifest import Entry, Manifest, Origin, index_text, text_checksum
from shardwise.errors import CheckpointError
from shardwise.files import writer
from shardwise.files.writer import Spec, TensorFile, read_part
from shardwise.step.intervals import Interval, Rest, share

STATES: list[Any] = [
    {"lr": 0.1, "nested": [1, (2, "x"), {"deep": None}], "flag": True},
    {1: "a", (2, 3): "b", "!": "c"},
    {"milestones": Counter({3: 1, 7: 2}), "ordered": OrderedDict(b=1, a=2)},
    [math.inf, -math.inf, 1e-300, 0.1 + 0.2, -0.0],
    {"set": {1, 2}, "queue": deque([1, 2]), "range": range(3, 9, 2), "bytes": b"\x00\xff"},
    numpy.random.RandomState(3).get_state(),
    {"number": numpy.float32(0.1), "count": numpy.int64(7)},
]


def through(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, tensors, "state"))
    return decode(json.loads(text), tensors.__getitem__)


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
def test_state_comes_back_as_it_was(state):
    again = through(state)
    assert repr(again) == repr(state)
    assert type(again) is type(state)


def test_tensors_come_back_with_dtype_and_shape():
    state = {
        "step": torch.tensor(7.0),
        "half": torch.randn(3, 2).bfloat16(),
        "empty": torch.empty(0, 4, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
        "strided": torch.arange(12).reshape(3, 4).T,
        "array": numpy.arange(6.0).reshape(2, 3),
    }
    again = through(state)
    for name, value in state.items():
        assert again[name].shape == value.shape
        assert again[name].dtype == value.dtype
        assert (again[name] == value).all()
    again["step"] += 1
    assert state["step"] == 7


def test_an_array_without_elements_comes_back():
    again = through({"a": numpy.zeros((0, 3), numpy.float32)})
    assert again["a"].shape == (0, 3)
    assert again["a"].dtype == numpy.float32


@pytest.mark.parametrize(
    "forged",
    [
        *(
            {"!": kind}
            for kind in ("float", "bytes", "number", "scalar", "array", "tensor", "dict", "tuple", "set", "x", [], 1)
        ),
        *({"!": "scalar", "dtype": name, "value": 1} for name in ("load", "nothing", "hub", "", "float32\0")),
        *({"!": "number", "dtype": name, "value": 10**12} for name in ("V8", "O", "U9", "x")),
        *({"!": "tensor", "dtype": "uint8", "shape": shape} for shape in ([1 << 60], [-2], "x", [[]], None)),
        {"!": "tensor", "dtype": "uint8", "shape": [1], "name": "elsewhere"},
        {"!": "array", "dtype": "O", "shape": [0]},
        {"!": "dict", "items": [1, 2]},
        {"!": "dict", "items": [[{}, 1]]},
        {"!": "set", "items": [{}]},
        {"!": "range", "items": []},
        {"!": "bytes", "value": "ä"},
        {"!": "float", "value": []},
    ],
    ids=str,
)
def test_a_state_that_no_save_writes_is_one_error(forged):
    with pytest.raises(CheckpointError) as error:
        decode({"a": [forged]}, {}.__getitem__)
    assert "\n" not in str(error.value)


def test_what_cannot_be_held_is_named_with_its_path():
    with pytest.raises(CheckpointError, match="state/a is a number of more than 300 digits"):
        encode({"a": 10**301}, {}, "state")
    with pytest.raises(CheckpointError, match=r"state/a/1 is a builtins\.object"):
        encode({"a": [1, object()]}, {}, "state")
    with pytest.raises(CheckpointError, match="array of object"):
        encode({"a": numpy.array([object()])}, {}, "state")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_NBYTES", 64)


def _write(path: Path) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    tensors = {
        "odd": torch.randint(0, 255, (3,), dtype=torch.uint8, generator=source),
        "half": torch.randn(5, 7, generator=source).bfloat16(),
        "wide": torch.randn(101, generator=source, dtype=torch.float64),
        "scalar": torch.tensor(3.0),
    }
    specs = [Spec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    with TensorFile(path, specs) as file:
        for name in ("wide", "odd", "scalar", "half"):  # not the announced order
            file.write(name, tensors[name])
    _places.clear()
    _places.update(file.places)
    return tensors


_places: dict[str, Any] = {}


def test_a_tensor_file_is_plain_safetensors_and_read_in_parts(tmp_path, small_blocks):
    path = tmp_path / "a.safetensors"
    tensors = _write(path)
    again = load_file(path)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    for begin, numel in ((0, 101), (7, 1), (8, 8), (50, 51), (100, 1)):
        out = torch.empty(numel, dtype=torch.float64)
        read_part(path, _places["wide"], begin, out)
        assert torch.equal(out, tensors["wide"][begin : begin + numel])


def test_every_flipped_byte_is_found_by_who_reads_it(tmp_path, small_blocks):
    path = tmp_path / "a.safetensors"
    tensors = _write(path)
    place, whole = _places["wide"], path.read_bytes()
    for byte in range(place.offset, place.offset + place.nbytes, 37):
        data = bytearray(whole)
        data[byte] ^= 16
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged between bytes"):
            read_part(path, place, 0, torch.empty(101, dtype=torch.float64))
    path.write_bytes(whole[: place.offset + 100])
    with pytest.raises(CheckpointError, match="cut off"):
        read_part(path, place, 0, torch.empty(101, dtype=torch.float64))
    out = torch.empty(8, dtype=torch.float64)
    read_part(path, place, 0, out)  # of a block that is whole
    assert torch.equal(out, tensors["wide"][:8])


def test_a_file_holds_what_was_announced_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    specs = [Spec("a", torch.float32, (2,)), Spec("b", torch.float32, (2,))]
    with pytest.raises(CheckpointError, match="announced for"), TensorFile(path, specs) as file:
        file.write("a", torch.zeros(3))
    with pytest.raises(CheckpointError, match="b was announced"), TensorFile(path, specs) as file:
        file.write("a", torch.zeros(2))
    file = TensorFile(path, specs)
    file.write("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match="twice"):
        file.write("a", torch.zeros(2))
    file.discard()
    with pytest.raises(CheckpointError, match="same name"):
        TensorFile(path, [specs[0], specs[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_fingerprint_does_not_depend_on_how_a_tensor_is_cut(dtype):
    value = (torch.randn(1003, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    whole = part_sums(value, 0)
    for cuts in ((0, 64, 1003), (0, 8, 512, 1000, 1003)):
        parts = [part_sums(value[a:b], a * dtype.itemsize) for a, b in itertools.pairwise(cuts)]
        assert tuple(sum(part[i] for part in parts) % 2**64 for i in (0, 1)) == whole
    other = value.clone()
    other[[3, 11]] = other[[11, 3]]  # the same bytes in another order
    assert part_sums(other, 0) != whole
    with pytest.raises(CheckpointError, match="cuts a word"):
        part_sums(value, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_of_copied_intervals_hold_each_element_once(world_size):
    sizes = [1, 5, 64, 200, 3, 129]
    held = [
        Interval(f"p{i}", (n,), 0, n, torch.float32, True, Rest(torch.arange(float(n)), 0)) for i, n in enumerate(sizes)
    ]
    seen: Counter[tuple[str, float]] = Counter()
    for rank in range(world_size):
        alone = SimpleNamespace(rank=0, size=1)
        ranks: Any = SimpleNamespace(rank=rank, world_size=world_size, copies=alone, alike=alone)
        for part in share(held, ranks):
            assert part.begin % 64 == 0
            values = part.read().tolist()
            assert values == [float(part.begin + i) for i in range(part.numel)]
            seen.update((part.name, value) for value in values)
    assert len(seen) == sum(sizes)
    assert set(seen.values()) == {1}


RUN = "a" * 32


def _empty(folder: Path, number: int, metric: float | None, made: Origin | None = None) -> Path:
    """A checkpoint that automatic naming made, without a tensor."""
    path = folder / f"checkpoint_{number}"
    path.mkdir(parents=True)
    text = index_text([], {})
    (path / "rank-00000.json").write_text(text)
    entry = Entry("rank-00000.json", text_checksum(text), None, 0)
    made = made or Origin(RUN, path.name)
    (path / "manifest.json").write_text(Manifest(1, number, number, (entry,), metric, made=made).to_text())
    return path


def test_the_directory_is_counted_and_pruned(tmp_path):
    for number, metric in enumerate((None, 2.0, 5.0, 1.0, 3.0, None)):
        _empty(tmp_path, number, metric)
    (tmp_path / "checkpoint_9").mkdir()
    assert next_number(tmp_path, 2) == 10
    found = survey(tmp_path)
    assert [f.manifest.order for f in found.complete] == [5, 4, 3, 2, 1, 0]
    assert "no manifest.json" in found.skipped[0][1]
    prune(tmp_path, {RUN}, newest=1, best=1, smaller_is_better=False)
    assert [f.manifest.order for f in survey(tmp_path).complete] == [5, 2]
    assert prune(tmp_path, {RUN}, newest=None) == []


def test_only_what_its_own_runs_have_numbered_is_pruned(tmp_path):
    other, copied, named = "b" * 32, "checkpoint_1", None
    for number, made in enumerate(
        (
            None,
            Origin(RUN, copied),
            Origin(RUN, named),
            Origin(other, "checkpoint_3"),
            None,
            Origin(RUN, "checkpoint_50"),
        )
    ):
        _empty(tmp_path, number, None, made)
    removed = prune(tmp_path, {RUN}, newest=1)
    # 0 and 4 carry their own names, of this run; 5 says another name than it has, 2 none, 3 is another run's.
    assert [path.name for path in removed] == ["checkpoint_0", "checkpoint_1"]
    assert not_counted(tmp_path, {RUN}) == ["checkpoint_5", "checkpoint_3", "checkpoint_2"]
    assert [path.name for path in prune(tmp_path, {RUN, other}, newest=1)] == ["checkpoint_3"]


def test_a_run_goes_on_with_those_that_it_has_resumed():
    first = Lineage()
    second = Lineage()
    second.resume(first.origin("checkpoint_1"))
    third = Lineage()
    third.resume(second.origin("checkpoint_2"))
    third.resume(second.origin("checkpoint_2"))
    assert third.origin(None).after == (first.own, second.own)
    assert third.runs == {first.own, second.own, third.own}
    second.resume(second.origin("checkpoint_2"))
    assert second.after == (first.own,)
    first.resume(None)
    assert first.runs == {first.own}
