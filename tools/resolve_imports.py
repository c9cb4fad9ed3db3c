"""Which scripts find all that they import once `accelerate` is `shardwise` in their imports, and nothing else is changed.

    python tools/resolve_imports.py CHECKOUT... [--list]

Reads the Python files below each folder that use an Accelerator, and asks the installed shardwise for each name that they
import from accelerate, or read as an attribute of it. Nothing of a script runs. A name that is there and refused counts as
unresolved, as it is printed; `accelerate.test_utils` is a rig and no API, so it is printed apart and does not count.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.names.refused import Refused

THEIRS, OURS, RIG = "accelerate", "shardwise", "test_utils"


@dataclass
class Script:
    """unresolved: dotted name -> why. rig: names of accelerate's own test rig."""

    path: Path
    unresolved: dict[str, str] = field(default_factory=dict)
    rig: set[str] = field(default_factory=set)

    def look_for(self, name: str) -> None:
        parts = name.split(".")[1:]
        if parts[:1] == [RIG]:
            self.rig.add(name)
            return
        why = problem(parts)
        if why is not None:
            self.unresolved[name] = why


def problem(parts: Sequence[str]) -> str | None:
    """Why `shardwise.a.b` does not resolve as an import would; None if it does."""
    found, path = importlib.import_module(OURS), OURS
    for part in parts:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except Exception:
            try:
                found = importlib.import_module(path)
            except ImportError as error:
                return f"{type(error).__name__}: {error}"
        if isinstance(found, Refused):
            return f"refused: {found.reason}"
    return None


def names_in(tree: ast.Module) -> Iterator[str]:
    """What a file imports from accelerate and reads of it, as dotted names that begin with `accelerate`."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == THEIRS:
                    modules[alias.asname or THEIRS] = alias.name if alias.asname else THEIRS
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == THEIRS:
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if alias.name != "*" else str(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            written = ast.unparse(node).split(".")
            if written[0] in modules and all(part.isidentifier() for part in written):
                yield from _read(modules[written[0]], written[1:])


def _read(module: str, attributes: Sequence[str]) -> Iterator[str]:
    """Of `accelerate.utils.set_seed.__doc__` the part that is a name of a module."""
    names = [module, *attributes]
    for end in range(2, len(names) + 1):
        if not names[end - 1][0].islower():  # a class or a constant: what follows is its own
            yield ".".join(names[:end])
            return
    yield ".".join(names[: min(len(names), 3)])


def scripts(folder: Path) -> Iterator[Script]:
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "Accelerator" not in text or THEIRS not in text:
            continue
        tree = ast.parse(text)
        uses = any(isinstance(node, ast.Name) and node.id == "Accelerator" for node in ast.walk(tree)) or any(
            isinstance(node, ast.Attribute) and node.attr == "Accelerator" for node in ast.walk(tree)
        )
        wanted = sorted(set(names_in(tree)))
        if not uses or not wanted:
            continue
        script = Script(path)
        for name in wanted:
            script.look_for(name)
        yield script


def report(folder: Path, *, every: bool) -> None:
    found = list(scripts(folder))
    whole = [script for script in found if not script.unresolved]
    print(f"{folder}: {len(whole)} of {len(found)} scripts resolve all that they import")
    names: Counter[tuple[str, str]] = Counter()
    for script in found:
        names.update(script.unresolved.items())
    for (name, why), count in names.most_common():
        print(f"  {name} in {count}: {why}")
    rig: Counter[str] = Counter(name for script in found for name in script.rig)
    if rig:
        print(f"  not counted, accelerate's test rig: {', '.join(f'{name} in {count}' for name, count in rig.items())}")
    for script in found if every else ():
        print(
            f"  {'ok ' if not script.unresolved else 'no '} {script.path.relative_to(folder)} {sorted(script.unresolved)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--list", action="store_true", help="print each file")
    options = parser.parse_args()
    for folder in options.checkouts:
        report(folder, every=options.list)


if __name__ == "__main__":
    main()
