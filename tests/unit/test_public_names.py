"""What users import stays: every public name, its signature, and for classes that of every public method and property.

    python -m pytest tests/unit/test_public_names.py --write-data

writes tests/data/public_names.json anew. MODULES are `shardwise` and the modules that README, examples and docs import from by
their own path; beside them stands all that answers for DeepSpeed. The engine's files (shardwise.zero and the like) are not
public: they may move.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardwise
from shardwise.compat import faces
from shardwise.names.table import NAMES, ROWS

DATA = Path(__file__).resolve().parents[1] / "data" / "public_names.json"
# None: what the module defines itself.
MODULES: dict[str, tuple[str, ...] | None] = {
    "shardwise": tuple(shardwise.__all__),
    "shardwise.errors": None,
    "shardwise.logging": ("get_logger",),
    "shardwise.losses": ("CHUNK_TOKENS", "cross_entropy", "head_cross_entropy"),
    "shardwise.memory": ("MemoryTracker",),
    "shardwise.plugins": ("ProjectConfiguration",),
    "shardwise.tracking": ("GeneralTracker",),
    "shardwise.compat": ("as_deepspeed",),
    # Of accelerate's names those that are written for them; the others are in `shardwise` or in test_names.py.
    "shardwise.data_loader": tuple(name for name in NAMES["data_loader"] if name != "skip_first_batches"),
    "shardwise.optimizer": ("AcceleratedOptimizer",),
    "shardwise.scheduler": ("AcceleratedScheduler",),
    "shardwise.utils": tuple(
        name
        for name in NAMES["utils"]
        if (ROWS[name].home or "").startswith(("names.", "config.kinds", "config.variables", "run.dynamo"))
        and not name.isupper()
    ),
}
Described = str | dict[str, str]


def described(item: Any) -> Described:
    """The signature of a function; a class's, and those of what it has in public, by name; the type of anything else.

    Of what is another library's, its name alone: it may differ from version to version.
    """
    home = getattr(item, "__module__", None)
    if home is not None and not home.startswith("shardwise"):
        return f"of {home.partition('.')[0]}"
    if inspect.isclass(item):
        return {"": signature(item), **dict(sorted(members(item).items()))}
    return signature(item) if callable(item) else type(item).__name__


def members(kind: type) -> dict[str, str]:
    """What classes of shardwise define in public, in this class or above it."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not owner.__module__.startswith("shardwise"):
            continue
        for name, value in vars(owner).items():
            if name.startswith("_") and name not in (
                "__call__",
                "__enter__",
                "__exit__",
                "__iter__",
                "__len__",
                "__getitem__",
            ):
                continue
            if isinstance(value, property):
                found[name] = "property, set too" if value.fset else "property"
            elif isinstance(value, classmethod | staticmethod):
                found[name] = f"{type(value).__name__} {signature(value.__func__)}"
            else:
                found[name] = signature(value) if callable(value) else type(value).__name__
    return found


def signature(item: Any) -> str:
    try:
        return str(inspect.signature(item)).replace("'", "")
    except ValueError:  # of an exception, or of C
        return "(...)"


def surface() -> dict[str, dict[str, Described]]:
    items: dict[str, dict[str, Any]] = {}
    for path, names in MODULES.items():
        module = importlib.import_module(path)
        items[path] = {name: getattr(module, name) for name in names or own_names(module)}
    for path, row in faces.MODULES.items():
        items[path] = {}
        for name, answer in row.items():
            file, _, attribute = answer.partition(":")
            items[path][name] = getattr(importlib.import_module(file, faces.HOME), attribute)
    return {path: {name: described(item) for name, item in sorted(row.items())} for path, row in sorted(items.items())}


def own_names(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]


def test_public_names_and_their_signatures_stay(request):
    found = surface()
    if request.config.getoption("--write-data"):
        DATA.write_text(json.dumps(found, indent=1) + "\n")
    wanted = json.loads(DATA.read_text())
    assert list(found) == list(wanted)
    for path, names in wanted.items():
        assert list(found[path]) == list(names), path
        for name, expected in names.items():
            assert found[path][name] == expected, f"{path}.{name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path != "shardwise"])
def test_modules_that_are_named_in_public_are_imported_by_their_path(path):
    module = importlib.import_module(path)
    assert module.__name__ == path or module in vars(shardwise).values()
