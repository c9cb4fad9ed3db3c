"""Files of text are read within limits: whatever lies in their place, one sentence says so, soon and without much memory."""

from __future__ import annotations

import ast
import json
import os
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shardwise.checkpoint.merge import merge
from shardwise.config.check import from_environment
from shardwise.config.deepspeed_json import read_deepspeed_json
from shardwise.config.resolve import resolve
from shardwise.config.schema import ENVIRONMENT_KEY
from shardwise.config.yaml_file import read_yaml
from shardwise.errors import CheckpointError, ConfigError, LoadingError, ShardwiseError
from shardwise.estimate.meta_model import build_meta_model
from shardwise.files import documents
from shardwise.files.documents import check_json, parse_json, read_json, read_text
from shardwise.files.torch_file import OtherFormatError, TorchFile

SOURCE = Path(documents.__file__).parents[1]


@contextmanager
def soon(within_s: float = 5.0, mib: int = 500) -> Iterator[None]:
    """What is inside computes for no longer, and the process does not grow by more. (A wait for ever is pytest's to find.)"""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < within_s
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mib << 10


def words_of(action: Callable[[], Any]) -> str:
    """The sentence of a ShardwiseError: one line of bounded length, that stands for the whole."""
    with pytest.raises(ShardwiseError) as error, soon():
        action()
    words = str(error.value)
    assert "\n" not in words
    assert len(words) < 1500
    return words


# Kinds and sizes.


def _gigabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 << 30)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "full": (lambda path: path.symlink_to("/dev/full"), "is a device, not a file"),
    "pipe": (os.mkfifo, "is a pipe, not a file"),
    "directory": (Path.mkdir, "is a directory, not a file"),
    "socket": (_socket, "is a socket, not a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "there is no such file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "gigabytes": (_gigabytes, "bytes; such a file has at most"),
    "kernel": (lambda path: path.symlink_to("/proc/kmsg"), "x.json"),
    "bytes": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "UTF-8"),
}


def _model(path: Path) -> Any:
    return build_meta_model(str(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_json(path, CheckpointError),
        read_yaml,
        read_deepspeed_json,
        _model,
    ],
    ids=["json", "yaml", "deepspeed", "model"],
)
def test_what_is_no_small_file_is_refused_before_it_is_read(tmp_path, kind, read):
    make, words = KINDS[kind]
    path = tmp_path / "x.json"
    make(path)
    found = words_of(lambda: read(path))
    if read is _model and kind in ("directory", "dangling", "loop"):
        words = "no config.json" if kind == "directory" else "no such file"
    assert words in found
    assert str(tmp_path) in found


def test_the_size_is_a_limit_also_where_the_file_grows(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("x" * 100)
    assert "more than 10 bytes" not in words_of(lambda: read_text(path, ConfigError, 10))
    status = os.stat_result((*os.stat(path)[:6], 0, *os.stat(path)[7:]))
    monkeypatch.setattr(os, "fstat", lambda descriptor: status)
    assert "more than 10 bytes" in words_of(lambda: read_text(path, ConfigError, 10))
    assert read_text(path, ConfigError, 100) == "x" * 100


# JSON.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "127 levels"),
        ('{"a":' * 100_000, "127 levels"),
        ('{"a": %s}' % ("[" * 127 + "]" * 127), "127 levels"),
        ("1" * 5000, "300 digits"),
        ("[1" + "0" * 400 + "]", "300 digits"),
        ("[1e999]", "out of range"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"x": [{"b": 1, "a": 1, "b": 2}]}', "the key 'b' twice"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ('"\\', "not JSON"),
        ('"' + '\\"' * 100_000, "not JSON"),
        ("[" + "[]," * 4_000_001 + "[]]", "4000000 values"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_json_that_no_reader_should_meet_is_one_sentence(text, words):
    assert words in words_of(lambda: parse_json(text, "x.json", CheckpointError))


def test_json_of_other_libraries_is_read_as_they_read_it():
    found = parse_json(
        '{"a": 1, "a": Infinity, "deep": %s}' % ("[" * 120 + "]" * 120),
        "x",
        ConfigError,
        infinities=True,
        repeated_keys=True,
    )
    assert found["a"] == float("inf")


def test_brackets_and_digits_in_texts_do_not_count():
    value = {"a": "[" * 1000 + '"' + "1" * 1000 + "\\", "b": ["{" * 1000]}
    assert parse_json(json.dumps(value), "x", ConfigError) == value


def test_what_could_not_be_read_is_not_written():
    for value in ([[]] * 4_000_001, 10**400, "x" * (65 << 20)):
        with pytest.raises(CheckpointError):
            check_json(json.dumps(value), "x", CheckpointError)


# YAML.


def _bomb(width: int, depth: int, merged: bool = False) -> str:
    lines = ["a0: &a0 {k: 1}" if merged else "a0: &a0 [x, x]"]
    for level in range(1, depth):
        inner = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} {{<<: [{inner}]}}" if merged else f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_bomb(10, 10), "written out, are more than 10000 values"),
        (_bomb(10, 10, merged=True), "written out, are more than 10000 values"),
        ("a: &a\n" + "".join(f"  k{n}: &b{n} {{x: 1}}\n" for n in range(3)) + "b: &c [*c]\n", "part of itself"),
        ("a: &a {b: *a}\n", "part of itself"),
        ("a: " + "[" * 1000, "50 levels"),
        ("a: " + "{b: " * 1000, "50 levels"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 200)), ""),
        ("a: [" + "1," * 100_000 + "1]", "10000 values"),
        ("a: 0x" + "f" * 100_000, "64 digits"),
        ("a: " + "1" * 5000, "64 digits"),
        ("a: " + ":".join(["1"] * 5000), "64 digits"),
        ("a: 2001-99-99", "not YAML"),
        ("? [a, b]\n: 1\n", "unhashable key"),
        ("? {a: b}\n: 1\n", "not YAML"),
        ("a: *b", "undefined alias"),
        ("a: &a 1\nb: &a 2\nc: !!set {x}\n", ""),
        ('a: "\\ud800"', ""),
        ("num_processes: .inf", "num_processes"),
        ("deepspeed_config: {gradient_clipping: .nan}", "gradient_clipping"),
        ("\x07", "not YAML"),
        ("a: b\n---\nc: d\n", "not YAML"),
        ("#" * (257 << 10), "at most 262144"),
    ],
)
def test_yaml_that_stands_for_more_than_it_says_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text, errors="surrogatepass")
    with pytest.raises(ConfigError) as error, soon():
        resolve({}, str(path))
    assert words in str(error.value)
    for line in str(error.value).splitlines():
        assert line.startswith(str(path))


def test_a_large_file_of_settings_is_read_in_a_moment(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("use_cpu: true\n" + "# a comment\n" * 20_000)
    with soon(within_s=3):
        assert read_yaml(path).values == {"use_cpu": True}
    path.write_text("base: &base {num_processes: 2}\nuse_cpu: true\nmore: [*base, *base]\n")
    assert read_yaml(path).values["more"] == [{"num_processes": 2}] * 2


# A small fuzz of each reader of a foreign file: one line for each problem, or a value.

GOOD: dict[str, Any] = {
    "deepspeed": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale": 0},
        "gradient_clipping": 1.0,
        "train_batch_size": 8,
    },
    "model": {
        **{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40, "architectures": ["LlamaForCausalLM"]},
    },
    "adapter": {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "alpha_pattern": {"q": 4}, "fan_in_fan_out": False},
}
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2.5, 1e308, -1e308, 10**299, "", "x", "auto", "\x1b[2J\n", "\ud800", "9" * 5000),
    *([], [1], {}, {"a": {"b": [{}]}}, [[[[]]]], {"device": "cpu"}, ["x"] * 50),
)


def _drawn(chance: random.Random, good: Any) -> bytes:
    """A file that is like a good one but for one or two changes of its structure, or of its bytes."""
    value = json.loads(json.dumps(good))
    if chance.random() < 0.6:
        for _ in range(chance.randint(1, 2)):
            place = value
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = chance.choice([*keys, "new"]) if isinstance(place, dict) or not keys else chance.choice(keys)
                inner = place[key] if key in keys else None
                if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.4:
                    break
                place = inner
            if isinstance(place, dict):
                place[key] = chance.choice(ODD)
        return json.dumps(value).encode()
    raw = bytearray(json.dumps(value).encode())
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(raw) + 1)
        raw[at : at + chance.randint(0, 3)] = chance.choice(
            [b"", b"\xff", b"[" * 500, b'"', b"NaN", b"9" * 400, b"{", b"\\", b"\0", b",", b'"stage":1,']
        )
    return bytes(raw[: chance.randint(0, len(raw))] if chance.random() < 0.2 else raw)


def _survives(action: Callable[[], Any]) -> bool:
    """Whether it gave a value; if not, its error is one of ours and of lines that a terminal can show."""
    error: ShardwiseError | None = None
    with soon():
        try:
            action()
        except ShardwiseError as caught:
            error = caught
    if error is None:
        return True
    assert all(line.isprintable() for line in str(error).splitlines() or [""]), repr(str(error))
    assert len(str(error)) < 20_000
    return False


@pytest.mark.parametrize("kind", ["deepspeed", "model"])
def test_drawn_files_are_read_or_refused(tmp_path, kind):
    chance = random.Random(3)
    path, good = tmp_path / "x.json", 0
    path.write_text(json.dumps(GOOD["model"]))
    build_meta_model(str(path))  # imports what it needs
    for _ in range(250 if kind == "deepspeed" else 120):
        path.write_bytes(_drawn(chance, GOOD[kind]))
        if kind == "deepspeed":
            good += _survives(lambda: resolve({"deepspeed_config_file": str(path)}))
        else:
            good += _survives(lambda: build_meta_model(str(path)))
    assert good > 10


def test_drawn_configurations_in_a_directory_are_read_or_refused(tmp_path):
    chance = random.Random(4)
    for _ in range(80):
        (tmp_path / "config.json").write_bytes(_drawn(chance, GOOD["model"]))
        _survives(lambda: build_meta_model(str(tmp_path)))


def test_drawn_adapters_and_bases_are_merged_or_refused(tmp_path):
    chance = random.Random(5)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    good = 0
    for number in range(120):
        for folder in (base, adapter):
            folder.mkdir(exist_ok=True)
        save_file({"q.weight": torch.ones(4, 3)}, base / "model.safetensors")
        (base / "config.json").write_text("{}")
        save_file(
            {
                "base_model.model.q.lora_A.weight": torch.ones(2, 3),
                "base_model.model.q.lora_B.weight": torch.ones(4, 2),
            },
            adapter / "adapter_model.safetensors",
        )
        (adapter / "adapter_config.json").write_bytes(json.dumps(GOOD["adapter"]).encode())
        if number:
            spoiled = chance.choice([base / "config.json", *[adapter / "adapter_config.json"] * 2])
            spoiled.write_bytes(_drawn(chance, GOOD["adapter"] if spoiled.parent == adapter else {"dtype": "x"}))
        if number % 5 == 4:
            spoiled = chance.choice([base / "model.safetensors", adapter / "adapter_model.safetensors"])
            raw = bytearray(spoiled.read_bytes())
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            spoiled.write_bytes(bytes(raw))
        if number % 20 == 19:
            spoiled = chance.choice([base / "model.safetensors", adapter / "adapter_config.json", base / "config.json"])
            spoiled.unlink()
            os.mkfifo(spoiled)
        merged = _survives(lambda: merge(base, adapter, tmp_path / "out", dtype=torch.bfloat16))
        assert merged or number
        good += merged
        if number % 20 == 19:
            spoiled.unlink()
    assert good > 20
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "out"}


def test_a_merge_does_not_write_through_a_link(tmp_path):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    for folder in (base, adapter, out):
        folder.mkdir()
    save_file({"q.weight": torch.ones(4, 3)}, base / "model.safetensors")
    (base / "tokenizer.json").write_text("the base's")
    save_file(
        {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "base_model.model.q.lora_B.weight": torch.ones(4, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps(GOOD["adapter"]))
    (tmp_path / "precious").write_text("mine")
    (out / "tokenizer.json").symlink_to(tmp_path / "precious")
    merge(base, adapter, out)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (out / "tokenizer.json").read_text() == "the base's"


def test_the_configuration_of_the_environment_is_read_with_the_same_limits():
    for text in ("[" * 100_000, "{", "[]", '{"num_processes": %s}' % ("9" * 5000)):
        found = words_of(lambda: from_environment({ENVIRONMENT_KEY: text}))  # noqa: B023
        assert ENVIRONMENT_KEY in found


# Files of torch.save, of which only the structure is read.


@pytest.mark.parametrize("zipped", [True, False])
def test_drawn_files_of_torch_are_read_or_refused(tmp_path, zipped):
    chance = random.Random(6)
    path = tmp_path / "a.bin"
    state = {"a": torch.ones(700), "b": torch.arange(9), "c": torch.ones(3, 3)[1:]}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, good = path.read_bytes(), 0
    for _ in range(200):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            # Mostly where the pickle and the directory lie, not in the numbers.
            at = chance.choice(
                [chance.randrange(600), len(raw) - 1 - chance.randrange(800), chance.randrange(len(raw))]
            )
            raw[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, raw[at] ^ 1 << chance.randrange(8)])
        path.write_bytes(bytes(raw[: chance.randrange(len(raw))] if chance.random() < 0.1 else raw))
        with soon():
            try:
                file = TorchFile(path, 500)
            except (LoadingError, OtherFormatError):
                continue
        for _, stretch in file.storages:
            assert stretch.offset + stretch.nbytes <= path.stat().st_size
        good += 1
    assert good > 10


def test_an_archive_of_torch_whose_records_are_too_short_or_compressed_is_not_read_in_stretches(tmp_path):
    import zipfile

    torch.save({"a": torch.ones(5000)}, tmp_path / "a.bin")
    for method, length, wanted in (
        (zipfile.ZIP_DEFLATED, None, OtherFormatError),
        (zipfile.ZIP_STORED, 100, LoadingError),
    ):
        with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name)[: length if name.endswith("data/0") else None])
        with pytest.raises(wanted):
            TorchFile(tmp_path / "b.bin", 500)


# Every reader comes through here.

# Files of the kernel, and what this run's own processes tell each other, which are what they are.
ALLOWED = {
    "config.machine": {"read_text"},
    "config.drives": {"read_text"},
    "cli.many": {"read_bytes"},
    "cli.machines": {"loads"},
    "config.launchers": {"loads"},
    "ranks.board": {"loads"},
    "files.apart": {"loads"},  # two processes of this program
    "files.documents": {"loads"},
    "ranks.meeting": {"loads", "read_text"},
    "config.foreign": {"loads"},
}
READERS = {"load", "loads", "read_text", "read_bytes", "safe_load"}


def test_no_other_file_reads_text_json_or_yaml():
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, owner = node.func.attr, ast.unparse(node.func.value)
            reads = called in ("read_text", "read_bytes") or (owner in ("json", "yaml") and called in READERS)
            assert not reads or called in ALLOWED.get(module, ()), f"{path}:{node.lineno} calls {owner}.{called}"
