"""The header of a safetensors file is taken and refused as the format's own library does, on drawn and on chosen files."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from shardwise.errors import LoadingError
from shardwise.files.reader import TensorFile
from shardwise.files.safetensors_header import read_header

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
A = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'


def written(path: Path, header: str | bytes, data: bytes, length: int | None = None) -> str:
    """A file of these parts; `$` in the header stands for the entry A."""
    raw = header.replace("$", A).encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return str(path)


def theirs(path: str) -> dict[str, Any] | None:
    """What the format's own library finds: name -> (dtype, shape); None if it refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {n: (file.get_slice(n).get_dtype(), tuple(file.get_slice(n).get_shape())) for n in names}
    except SafetensorError:
        return None


def ours(path: str) -> dict[str, Any] | None:
    words = ""
    try:
        return {name: (t.dtype, t.shape) for name, t in read_header(path, LoadingError).tensors.items()}
    except LoadingError as error:
        words = str(error)
    assert path in words
    assert len(words) < 1000
    assert "\n" not in words
    return None


def same(path: str) -> bool:
    """Whether both take the file; they must agree on that, and on what it holds."""
    expected = theirs(path)
    assert ours(path) == expected
    return expected is not None


def drawn_header(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    content: dict[str, Any] = {}
    if chance.random() < 0.5:
        content["__metadata__"] = {"format": "pt"}
    rows, end = [], 0
    for number in range(chance.randint(0, 5)):
        dtype = chance.choice(list(SIZES))
        shape = [chance.randint(0, 3) for _ in range(chance.randint(0, 3))]
        numel = 1
        for length in shape:
            numel *= length
        begin, end = end, end + numel * SIZES[dtype]
        rows.append((f"t{number}", {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
    chance.shuffle(rows)
    content.update(rows)
    return content, bytes(end)


ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**25, 1.0, 0.5, "0", "F32", "f32", [], {}),
    *([0, 0], [0, 8], [8, 0], [1, 2, 3], [True, 1], {"a": "b"}, {"a": 1}, [[]], "F4", "BF16", "U64"),
)


def change(chance: random.Random, content: dict[str, Any], data: bytes) -> bytes:
    """One mutation of the header's structure or of the data's length; gives the data."""
    kind = chance.randrange(9)
    tensors = [name for name in content if name != "__metadata__"]
    if kind == 0:
        return data + bytes(chance.randint(1, 9))
    if kind == 1:
        return data[: max(0, len(data) - chance.randint(1, 9))]
    if kind == 2:
        content["__metadata__"] = chance.choice(ODD)
    elif kind == 3:
        content[chance.choice(["", "new", "\0", "ä"])] = chance.choice(ODD)
    elif tensors:
        row = content[chance.choice(tensors)]
        if not isinstance(row, dict) or len(row) < 3 or not isinstance(row["shape"], list):
            return data
        if kind == 4 and isinstance(row["data_offsets"], list) and len(row["data_offsets"]) == 2:
            row["data_offsets"][chance.randint(0, 1)] = chance.choice([0, len(data)]) + chance.choice(
                [-8, -4, -1, 1, 4, 8]
            )
        elif kind == 5:
            row[chance.choice(["dtype", "shape", "data_offsets", "more"])] = chance.choice(ODD)
        elif kind == 6:
            row["shape"] = [*row["shape"], chance.choice(ODD)]
        elif kind == 7:
            del row[chance.choice(["dtype", "shape", "data_offsets"])]
        else:
            row["data_offsets"] = [0, chance.choice([0, len(data) // 2, len(data)])]
    return data


def test_drawn_headers_are_taken_and_refused_alike(tmp_path):
    chance = random.Random(7)
    path, taken = tmp_path / "a.safetensors", 0
    for _ in range(2000):
        content, data = drawn_header(chance)
        for _ in range(chance.randint(0, 2)):
            data = change(chance, content, data)
        taken += same(written(path, json.dumps(content), data))
    assert 500 < taken < 1500


def test_drawn_bytes_are_taken_and_refused_alike(tmp_path):
    chance = random.Random(8)
    path, taken = tmp_path / "a.safetensors", 0
    for _ in range(1500):
        content, data = drawn_header(chance)
        raw = bytearray(json.dumps(content).encode() + data)
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(len(raw))
            what = chance.randrange(3)
            if what == 0:
                raw[at] ^= 1 << chance.randrange(8)
            elif what == 1:
                raw[at:at] = chance.choice([b" ", b"0", b"-", b"[", b"}", b",", b'"', b"\xff", b"\\", b"1e9"])
            elif len(raw) > 1:
                del raw[at]
        length = len(json.dumps(content)) + chance.choice([0, 0, 0, 0, 1, -1, 1 << 40])
        text = bytes(raw[: max(0, length)])
        if b'"t' in text and any(text.count(f'"t{n}"'.encode()) > 1 for n in range(5)):
            continue  # a name that occurs twice: see the test below
        taken += same(written(path, bytes(raw), b"", max(0, length)))
    assert taken > 30


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ("{}", 0),
        ("{} ", 0),
        ('  {"a":{$}}', 8),
        ('{"a":["F32",[2],[0,8]]}', 8),
        ('{"__metadata__":null,"a":{$}}', 8),
        ('{"a":{$,"more":[{"deep":1}]}}', 8),
        ('{"a":{$,"more":' + "[" * 125 + "]" * 125 + "}}", 8),
        ('{"z":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},"a":{$}}', 8),
        ('{"a":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}', 8),
    ],
)
def test_odd_headers_that_the_format_allows_are_read(tmp_path, header, data):
    assert same(written(tmp_path / "a.safetensors", header, bytes(data)))


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ('{"a":{$}}', 9, "1 bytes more"),
        ('{"a":{$}}', 7, "cut off"),
        ("[]", 0, "not a JSON object"),
        ("null", 0, "not a JSON object"),
        ("", 0, "not JSON"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', 8, "-8 bytes by its offsets"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4, "4 bytes by its offsets, but 8 by its shape"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,0]}}', 0, "0 bytes by its offsets"),
        ('{"a":{$},"b":{$}}', 8, "overlaps"),
        ('{"b":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}}', 8, "hole"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', 8, "not a list of sizes"),
        ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', 8, "not a list of sizes"),
        ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', 1, "not a list of sizes"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8, "two places"),
        ('{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}', 0, "no file can hold"),
        ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1, "but 2 by its shape"),
        ('{"a":{"dtype":"I4","shape":[2],"data_offsets":[0,8]}}', 8, "format does not have"),
        ('{"a":{"dtype":{},"shape":[2],"data_offsets":[0,8]}}', 8, "format does not have"),
        ('{"a":{"dtype":"F32","shape":[2]}}', 8, "lacks"),
        ('{"a":{$,"shape":[2]}}', 8, "twice"),
        ('{"__metadata__":{"a":1},"a":{$}}', 8, "metadata"),
        ('{"a":{$,"more":NaN}}', 8, "NaN"),
        ('{"a":{$,"more":1e400}}', 8, "out of range"),
        ('{"a":{$,"more":' + "1" * 5000 + "}}", 8, "300 digits"),
        ('{"a":{$,"more":' + "[" * 126 + "]" * 126 + "}}", 8, "127 levels"),
        ('{"a":' + "[" * 100_000, 8, "127 levels"),
        ('{"\\ud800":{$}}', 8, "half of a character"),
        (b'{"a\xff":{}}', 0, "UTF-8"),
    ],
)
def test_every_check_of_the_format_has_its_sentence(tmp_path, header, data, words):
    path = written(tmp_path / "a.safetensors", header, bytes(data))
    assert not same(path)
    with pytest.raises(LoadingError, match=words):
        TensorFile(path)


def test_a_name_that_occurs_twice_is_refused_where_the_format_lets_the_last_one_win(tmp_path):
    path = written(tmp_path / "a.safetensors", '{"a":{$},"a":{$}}', bytes(8))
    assert theirs(path) is not None
    with pytest.raises(LoadingError, match="'a' twice"):
        TensorFile(path)


@pytest.mark.parametrize("data", [b"", b"1234567", bytes(8), struct.pack("<Q", 1 << 40), struct.pack("<Q", 3) + b"{}"])
def test_a_file_without_a_header_is_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert not same(str(path))


def test_an_index_that_is_none_is_refused(tmp_path):
    path = written(tmp_path / "a.safetensors", '{"a":{$}}', bytes(8))
    index = tmp_path / "model.safetensors.index.json"
    for text, words in (
        ("[]", "not a JSON object"),
        ('{"weight_map": []}', "weight_map is not"),
        ('{"weight_map": {"b": "a.safetensors"}}', "lacks b"),
        ('{"weight_map": {"b": "x", "b": "a.safetensors"}}', "'b' twice"),
        ("[" * 10_000, "levels deep"),
    ):
        index.write_text(text)
        with pytest.raises(LoadingError, match=words):
            TensorFile(path)
    index.write_text('{"weight_map": {"b": "elsewhere.safetensors", "a": "a.safetensors"}}')
    assert list(TensorFile(path).tensors) == ["a"]
