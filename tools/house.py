"""The numbers of the house: lines by folder, the largest class, function and file, circles of imports, fields that change.

    python tools/house.py            print them
    python tools/house.py --check    compare with LIMITS; what is over a limit today stands in house.json and may not grow
    python tools/house.py --shrink   lower house.json to today's numbers; it never raises one and adds none

An entry of house.json names a class or function without its file, so that it may be moved; a file by its path. Who splits or
renames one that is listed changes its entry by hand. Imports are read as tests/unit/test_imports.py reads them, those inside of
functions and for type checkers included.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

from test_imports import imports_of, modules, own_module, path_of, tree_of  # noqa: E402

ALLOWED = ROOT / "tools" / "house.json"
LIMITS = {"class": 300, "function": 60, "file": 400, "circle of files": 0, "circle of rooms": 0}
# Folders whose classes' changing fields are listed; those that the next layout brings are named already.
ENGINE = ("zero", "offload", "plan", "ranks", "step")
Sizes = dict[str, dict[str, int]]  # kind of LIMITS -> name -> size


@dataclass(frozen=True)
class Part:
    """A class or function: its name with the classes around it, its module, its lines, and the fields that change in it."""

    kind: str
    name: str
    module: str
    lines: int
    changing: tuple[str, ...] = ()


def parts(module: str, tree: ast.Module) -> Iterator[Part]:
    """Every class and function of a file, nested ones too."""

    def inside(node: ast.AST, around: str) -> Iterator[Part]:
        for child in ast.iter_child_nodes(node):
            name = around
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{around}.{child.name}" if around else child.name
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                if isinstance(child, ast.ClassDef):
                    yield Part("class", name, module, lines, changing_fields(child))
                else:
                    yield Part("function", name, module, lines)
            yield from inside(child, name)

    return inside(tree, "")


def changing_fields(kind: ast.ClassDef) -> tuple[str, ...]:
    """The attributes of `self` that methods other than __init__ and __post_init__ assign or delete."""
    found = set()
    for method in kind.body:
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) or not method.args.args:
            continue
        # What a function inside of __init__ assigns is assigned later.
        init = method.name in ("__init__", "__post_init__")
        roots = (
            [n for n in ast.walk(method) if isinstance(n, ast.FunctionDef) and n is not method] if init else [method]
        )
        for node in (node for root in roots for node in ast.walk(root)):
            if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
                continue
            if isinstance(node.value, ast.Name) and node.value.id == method.args.args[0].arg:
                found.add(node.attr)
    return tuple(sorted(found))


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Sets of names that reach each other along the arrows, largest first."""
    reached = {name: _reached(name, arrows) for name in arrows}
    found = {tuple(sorted(other for other in reached[name] if name in reached.get(other, ()))) for name in arrows}
    return sorted((list(names) for names in found if len(names) > 1), key=lambda names: (-len(names), names))


def _reached(name: str, arrows: Mapping[str, Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for other in arrows.get(waiting.pop(), ()):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def room_of(module: str) -> str:
    """The folder that a module's file lies in, below src/shardwise; a file beside the folders is a room of its own."""
    folder = str(path_of(module).parent.relative_to(path_of("").parent))
    return folder if folder != "." else module


def arrows_of_files() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module in modules():
        targets = {own_module(entry.name) for entry in imports_of(module)}
        found[module] = {target for target in targets if target is not None and target != module}
    return found


def arrows_of_rooms(files: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, targets in files.items():
        row = found.setdefault(room_of(module), set())
        row |= {room_of(target) for target in targets} - {room_of(module)}
    return found


def measured() -> tuple[list[Part], dict[str, int], list[list[str]], list[list[str]]]:
    """All classes and functions, the lines of each file by path, circles of files, and of rooms (see `room_of`)."""
    every = [part for module in modules() for part in parts(module, tree_of(module))]
    top = path_of("").parent
    lines = {str(path_of(m).relative_to(top)): len(path_of(m).read_text().splitlines()) for m in modules()}
    files = arrows_of_files()
    return every, lines, circles(files), circles(arrows_of_rooms(files))


def over_limits() -> Sizes:
    """What is larger than LIMITS, by kind and name. Circles are numbered by size: their names would not outlive a move."""
    every, lines, of_files, of_rooms = measured()
    found: Sizes = {kind: {} for kind in LIMITS}
    for part in every:
        if part.lines > LIMITS[part.kind]:
            # Of two of one name the larger counts.
            found[part.kind][part.name] = max(part.lines, found[part.kind].get(part.name, 0))
    found["file"] = {path: count for path, count in lines.items() if count > LIMITS["file"]}
    for kind, rows in (("circle of files", of_files), ("circle of rooms", of_rooms)):
        found[kind] = {str(number + 1): len(names) for number, names in enumerate(rows)}
    return found


def problems(today: Sizes, allowed: Sizes) -> list[str]:
    """A sentence for each thing that is over its limit and not allowed to be, or larger than it may be."""
    found = []
    for kind, sizes in today.items():
        for name, size in sizes.items():
            may = allowed.get(kind, {}).get(name)
            what = f"{kind} {name}: {size} {'names' if 'circle' in kind else 'lines'}"
            if may is None:
                found.append(f"{what}, over the limit of {LIMITS[kind]}.")
            elif size > may:
                found.append(f"{what}; house.json has {may}, and what it lists may only shrink.")
    return found


def shrunk(today: Sizes, allowed: Sizes) -> Sizes:
    """`allowed`, without what is within its limit now, and no number above today's."""
    return {
        kind: {name: min(may, today[kind][name]) for name, may in sizes.items() if name in today.get(kind, {})}
        for kind, sizes in allowed.items()
    }


def show() -> None:
    every, lines, of_files, of_rooms = measured()
    folders: dict[str, list[int]] = {}
    for path, count in lines.items():
        folders.setdefault(str(Path(path).parent), []).append(count)
    print(f"src/shardwise: {sum(lines.values()):,} lines in {len(lines)} files")
    for folder, counts in sorted(folders.items(), key=lambda row: -sum(row[1])):
        print(f"  {folder:<20} {len(counts):>4} files {sum(counts):>7,} lines, largest {max(counts):>4}")
    for kind in ("class", "function"):
        print(f"largest of each {kind}:")
        for part in sorted((p for p in every if p.kind == kind), key=lambda p: -p.lines)[:8]:
            print(f"  {part.lines:>4} lines  {part.name}  ({part.module})")
    large = sorted(((count, path) for path, count in lines.items() if count > LIMITS["file"]), reverse=True)
    print(f"files over {LIMITS['file']} lines: {len(large)}")
    for count, path in large:
        print(f"  {count:>4} lines  {path}")
    for what, rows in (("files", of_files), ("rooms", of_rooms)):
        print(f"circles of {what}: {len(rows)}")
        for names in rows:
            print(f"  {len(names):>4}  {', '.join(names)}")
    print("fields that change after __init__, of the engine's classes:")
    engine = [p for p in every if p.kind == "class" and p.changing and p.module.partition(".")[0] in ENGINE]
    print(f"  {sum(len(p.changing) for p in engine):>4}  in {len(engine)} classes")
    for part in sorted(engine, key=lambda p: (-len(p.changing), p.name)):
        print(f"  {len(part.changing):>4}  {part.name}: {', '.join(part.changing)}")


def check() -> int:
    today, allowed = over_limits(), json.loads(ALLOWED.read_text())
    found = problems(today, allowed)
    for text in found:
        print(f"house: {text}", file=sys.stderr)
    if not found and shrunk(today, allowed) != allowed:
        print("house: some of what house.json lists has become smaller; tools/house.py --shrink notes it.")
    return 1 if found else 0


def shrink() -> int:
    allowed = json.loads(ALLOWED.read_text())
    ALLOWED.write_text(json.dumps(shrunk(over_limits(), allowed), indent=1) + "\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true", help="compare with the limits")
    one.add_argument("--shrink", action="store_true", help="lower house.json to today's numbers")
    chosen = parser.parse_args(arguments)
    acts: tuple[tuple[bool, Callable[[], int]], ...] = ((chosen.check, check), (chosen.shrink, shrink))
    for wanted, act in acts:
        if wanted:
            return act()
    show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
