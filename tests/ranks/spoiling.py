"""Draws of what can be wrong with a checkpoint: damage that is blind, and forgeries whose sums are right.

`drawn(seed)` gives one way to spoil the newest of two checkpoints. It is applied on one rank, to a copy of a good directory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Spoiling:
    """words: what is done, for a failing test. apply: (checkpoint, older checkpoint, chance) spoils it.

    by_others: it needs a process that is not root, and is a matter of permissions.
    """

    words: str
    seed: int
    apply: Callable[[Path, Path, random.Random], None]
    by_others: bool = False

    def __call__(self, checkpoint: Path, older: Path) -> None:
        self.apply(checkpoint, older, random.Random(self.seed))


# Blind damage: the sums are those of before.


def _any_file(checkpoint: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(checkpoint.iterdir()))


def _truncate(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path = _any_file(checkpoint, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def _flip(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path = _any_file(checkpoint, chance)
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


def _append(checkpoint: Path, older: Path, chance: random.Random) -> None:
    with _any_file(checkpoint, chance).open("ab") as file:
        file.write(chance.choice([b"\0", b"}", b"x" * 5000]))


def _delete(checkpoint: Path, older: Path, chance: random.Random) -> None:
    _any_file(checkpoint, chance).unlink()


def _socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        # The name of a socket may have 107 characters.
        here = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 << 30)


THINGS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": _socket_at,
    "a directory": Path.mkdir,
    "eight gigabytes": _sparse,
    "nothing but a name": Path.touch,
    **{
        f"a link to {target}": lambda path, target=target: path.symlink_to(target)
        for target in ("/dev/zero", "/dev/full", "/dev/null", "/dev/tty", "/proc/kmsg", "nowhere", "../..", "/")
    },
    "a link to itself": lambda path: path.symlink_to(path.name),
}


def _thing(name: str) -> Callable[[Path, Path, random.Random], None]:
    def apply(checkpoint: Path, older: Path, chance: random.Random) -> None:
        path = _any_file(checkpoint, chance)
        path.unlink()
        THINGS[name](path)

    return apply


def _thing_for_all(name: str) -> Callable[[Path, Path, random.Random], None]:
    def apply(checkpoint: Path, older: Path, chance: random.Random) -> None:
        shutil.rmtree(checkpoint)
        THINGS[name](checkpoint)

    return apply


TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "bytes": b'{"format": "\xff\xfe"}',
    "NaN": b'{"format": "shardwise-checkpoint", "version": NaN}',
    "a list": b"[1, 2, 3]",
    "null": b"null",
    "many values": b"[" + b"0," * 4_100_000 + b"0]",
    "one key twice": b'{"format": "x", "format": "shardwise-checkpoint", "version": 1}',
    "another program's": b'{"name": "app", "icons": [], "start_url": "."}',
}


def _text(name: str) -> Callable[[Path, Path, random.Random], None]:
    def apply(checkpoint: Path, older: Path, chance: random.Random) -> None:
        chance.choice([checkpoint / MANIFEST, *checkpoint.glob("rank-*.json")]).write_bytes(TEXTS[name])

    return apply


def _swap(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path = _any_file(checkpoint, chance)
    path.write_bytes((older / path.name).read_bytes())


def _swap_ranks(checkpoint: Path, older: Path, chance: random.Random) -> None:
    suffix = chance.choice([".json", ".safetensors"])
    one, other = checkpoint / f"rank-00000{suffix}", checkpoint / f"rank-00001{suffix}"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


# Forgeries: whoever wrote the file has made its sums right.


def sealed(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with sums that are right, of the indexes that lie there too."""
    ranks = manifest.get("ranks")
    for number, row in enumerate(ranks if isinstance(ranks, list) else []):
        index = checkpoint / f"rank-{number:05d}.json"
        if isinstance(row, dict) and index.is_file():
            row["index_crc"] = zlib.crc32(index.read_bytes())
    manifest.pop("checksum", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = zlib.crc32(text.encode())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


NAMES = (
    "../checkpoint_0/manifest.json",
    "/etc/passwd",
    "..",
    ".",
    "",
    "rank-00000.json\0",
    "a/b",
    "\\\\x\\y",
    "~",
    "/dev/zero",
)
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3.5, 1 << 40, 1 << 62, 1 << 64, 10**60, 10**290, -(10**30), "", "x", "\ud800"),
    *("\x1b[2J\r\n", [], {}, [None], [[[]]], {"a": {}}, [0] * 40, ["x", 1], "9" * 3000, float("inf"), float("nan")),
    *(
        {"!": "tensor"},
        {"!": "tuple", "items": 3},
        {"!": "number", "dtype": "O", "value": {}},
        {"!": "array"},
        {"!": []},
    ),
    *({"!": "scalar", "dtype": "load", "value": "x"}, {"!": "set", "items": [[]]}, {"!": "float", "value": "x"}),
    *(
        {"!": "tensor", "name": "../x", "dtype": "float32", "shape": [-5]},
        {"!": "bytes", "value": "ä"},
        {"!": "future"},
    ),
    *({"!": "tensor", "dtype": "uint8", "shape": [1 << 60]}, {"!": "range", "items": [0, 1 << 62, 1]}, *NAMES),
)


def _change(chance: random.Random, value: Any, stay_within: int) -> None:
    """Put something odd at one place of a tree of JSON, or take the place away. stay_within: how deep to go at most."""
    place = value
    for _ in range(stay_within):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.3:
            break
        place = inner
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = chance.choice(keys)
    what = chance.random()
    if what < 0.2 and isinstance(place, dict):
        del place[key]
    elif what < 0.3 and isinstance(place, dict):
        place[chance.choice([*NAMES, "params", "new", "!"])] = chance.choice(ODD)
    elif what < 0.4 and type(place[key]) is int:
        place[key] += chance.choice([-64, -8, -4, -1, 1, 4, 8, 64, 1 << 33])
    else:
        place[key] = chance.choice(ODD)


def _forge_manifest(checkpoint: Path, older: Path, chance: random.Random) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for _ in range(chance.randint(1, 2)):
        _change(chance, manifest, 5)
    sealed(checkpoint, manifest)


def _forge_name(checkpoint: Path, older: Path, chance: random.Random) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    name = chance.choice([name for name in NAMES if "/dev" not in name or chance.random() < 0.5])
    row = chance.choice(manifest["ranks"])
    kind = chance.randrange(4)
    if kind == 0:
        manifest["frozen"]["kept"] = name
    elif kind == 1:
        manifest["made"]["name"] = name
    else:
        row["index" if kind == 2 else "tensors"] = name
    sealed(checkpoint, manifest)


def _index_of(checkpoint: Path, chance: random.Random) -> tuple[Path, dict[str, Any]]:
    path = chance.choice(sorted(checkpoint.glob("rank-*.json")))
    return path, json.loads(path.read_text())


def _seal_index(checkpoint: Path, path: Path, index: Any) -> None:
    path.write_text(json.dumps(index))
    sealed(checkpoint, json.loads((checkpoint / MANIFEST).read_text()))


def _forge_part(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path, index = _index_of(checkpoint, chance)
    row = index["tensors"][chance.choice(list(index["tensors"]))]
    other = index["tensors"][chance.choice(list(index["tensors"]))]
    kind = chance.randrange(8)
    if kind == 0:
        row["offset"] = chance.choice([other["offset"], row["offset"] + 4, row["offset"] - 4, 1 << 40, -8])
    elif kind == 1:
        row["begin"] += chance.choice([-1, 1, 64, -64])
    elif kind == 2:
        row["numel"] = chance.choice([0, row["numel"] * 2, row["numel"] - 1, 1 << 50])
    elif kind == 3:
        row["nbytes"] = chance.choice([0, row["nbytes"] * 2, row["nbytes"] - 4, 1 << 50])
    elif kind == 4:
        row["dtype"] = chance.choice(["F64", "I32", "U8", "BOOL", "F4", "x", "C64", "BF16", "U32"])
    elif kind == 5:
        row["shape"] = chance.choice(
            [[], [0], [-1], [1 << 50], [1 << 62] * 100_000, [*row["shape"], 2], [True], [2.0], [*row["shape"][::-1], 1]]
        )
    elif kind == 6:
        row["blocks"] = chance.choice([[], [0], row["blocks"] * 2, [1 << 40], ["x"], [-1]])
    else:
        _change(chance, row, 1)
    _seal_index(checkpoint, path, index)


def _forge_address(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path, index = _index_of(checkpoint, chance)
    address = chance.choice(list(index["tensors"]))
    row = index["tensors"][address] if chance.random() < 0.3 else index["tensors"].pop(address)
    index["tensors"][
        chance.choice([*NAMES, f"{address}x", f"../{address}", "optimizer0/", "model0", "model0/trained"])
    ] = row
    _seal_index(checkpoint, path, index)


def _forge_state(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path, index = _index_of(checkpoint, chance)
    for _ in range(chance.randint(1, 2)):
        _change(chance, index["state"], 8)
    _seal_index(checkpoint, path, index)


def _forge_nesting(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path, index = _index_of(checkpoint, chance)
    deep: Any = 1
    for _ in range(chance.choice([60, 150, 400])):
        deep = [deep] if chance.random() < 0.5 else {"a": deep}
    index["state"][chance.choice([*index["state"], "more"])] = deep
    _seal_index(checkpoint, path, index)


def _forge_references(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path, index = _index_of(checkpoint, chance)
    one = index["state"]["generators"]["torch"]
    index["state"][chance.choice(["buffers", "more", "optimizers"])] = [one] * chance.choice([2, 200_000])
    _seal_index(checkpoint, path, index)


def _forge_index(checkpoint: Path, older: Path, chance: random.Random) -> None:
    path, index = _index_of(checkpoint, chance)
    if chance.random() < 0.5:
        index[chance.choice(["tensors", "state"])] = chance.choice(ODD)
    else:
        index = chance.choice(ODD)
    _seal_index(checkpoint, path, index)


# Other people's.


def _of_others(what: str, mode: int) -> Callable[[Path, Path, random.Random], None]:
    def apply(checkpoint: Path, older: Path, chance: random.Random) -> None:
        place = {"it": checkpoint, "manifest": checkpoint / MANIFEST, "file": _any_file(checkpoint, chance)}[what]
        place.chmod(mode)

    return apply


KINDS: list[tuple[str, int, Callable[[Path, Path, random.Random], None]]] = [
    ("cut off", 6, _truncate),
    ("flipped", 8, _flip),
    ("longer", 2, _append),
    ("deleted", 2, _delete),
    *((f"a file is {name}", 1, _thing(name)) for name in THINGS),
    *((f"it is {name}", 1, _thing_for_all(name)) for name in THINGS if name not in ("a directory", "eight gigabytes")),
    *((f"its text is {name}", 1, _text(name)) for name in TEXTS),
    ("a file of the older one", 2, _swap),
    ("files of other ranks", 1, _swap_ranks),
    ("forged manifest", 16, _forge_manifest),
    ("forged name", 6, _forge_name),
    ("forged part", 12, _forge_part),
    ("forged address", 4, _forge_address),
    ("forged state", 16, _forge_state),
    ("forged nesting", 2, _forge_nesting),
    ("forged index", 2, _forge_index),
    ("forged references", 2, _forge_references),
]
OTHERS = [
    ("others' directory", 2, _of_others("it", 0o700)),
    ("others' manifest", 1, _of_others("manifest", 0o600)),
    ("others' file", 2, _of_others("file", 0o600)),
]


def drawn(seed: int) -> Spoiling:
    """One way to spoil a checkpoint; the same for the same seed."""
    chance = random.Random(seed)
    every = [*KINDS, *OTHERS]
    name, _, apply = chance.choices(every, [weight for _, weight, _ in every])[0]
    return Spoiling(f"{name} (seed {seed})", seed, apply, by_others=apply in [row[2] for row in OTHERS])


def one_of_each(seed: int) -> list[Spoiling]:
    """Every kind once."""
    return [
        Spoiling(f"{name} (seed {seed})", seed, apply, by_others=number >= len(KINDS))
        for number, (name, _, apply) in enumerate([*KINDS, *OTHERS])
    ]
