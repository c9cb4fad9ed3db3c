"""The reference pages' made parts: every setting of the schema, every command of the parsers, every public docstring.

    python tools/site/reference.py                    write build/reference/{settings,commands,api}.md
    python tools/site/reference.py settings           print one of them

Nothing here names a setting, a flag or a class: what the code has is what the pages have.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from shardwise.config.fields import Kind
from shardwise.config.schema import SECTIONS, Key, every_setting
from shardwise.config.setting import metavar_of, setting_of

OUT = Path(__file__).resolve().parents[2] / "build" / "reference"


# Settings.


def settings() -> str:
    """A table for each section, in the schema's order, and the keys that other libraries' files have."""
    parts: list[str] = []
    empty: list[tuple[Key, FieldInfo]] = []
    for section in SECTIONS:
        parts += [f"## {_title(section)}", "", _first_line(SECTIONS[section].__doc__), ""]
        parts += ["| key | values | default | what it says |", "|---|---|---|---|"]
        for key, info in every_setting():
            if key[:-1] == section:
                if any(isinstance(item, Kind) and item.empty for item in info.metadata):
                    empty.append((key, info))
                else:
                    parts.append(_setting(key, info))
        parts.append("")
    parts += ["## Keys that have no value here", ""]
    parts += ["Files of accelerate have them. Empty they are taken; with a value they are refused with the reason.", ""]
    parts += [", ".join(f"`{'.'.join(key)}`" for key, _ in empty) + ".", ""]
    return "\n".join(parts)


def _title(section: Key) -> str:
    return ".".join(section) or "The file itself"


def _setting(key: Key, info: FieldInfo) -> str:
    said = setting_of(info)
    values = "true, false" if said.switch else metavar_of(info).replace("|", ", ")
    words = said.help or (said.comment or "")
    if words and not words.endswith("."):
        words += "."
    if said.own:
        words += f" Ranks may differ: {said.own}."
    if said.also:
        words += f" Also {', '.join(f'`--{name}`' for name in said.also)}."
    if not said.help:
        words += " No flag."
    return f"| `{key[-1]}` | {_cell(values)} | `{_default(info)}` | {_cell(words.strip())} |"


def _default(info: FieldInfo) -> str:
    """As a YAML file would have it."""
    value = info.get_default(call_default_factory=True)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# Commands.


def commands() -> str:
    """Usage, words, arguments and flags of each command, as the parser has them; flags of settings once, at the end."""
    import typer.main

    from shardwise.cli.flags import FLAGS
    from shardwise.cli.main import app

    settings = {flag.name for flag in FLAGS}
    every: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = ["```", *(f"shardwise {name}" for name in every), "shardwise --version", "```", ""]
    panels: dict[str, list[Any]] = {}
    for name, command in every.items():
        own = [one for one in command.params if one.name not in settings]
        arguments = [_argument(one) for one in own if one.param_type_name == "argument"]
        usage = " ".join([f"shardwise {name}", "[FLAGS]", *arguments])
        parts += [f"## {name}", "", inspect.cleandoc(command.help or ""), "", "```", usage, "```", ""]
        parts += _table(own)
        if len(own) < len(command.params):
            parts += ["Every [setting](#flags-of-settings) is a flag, too.", ""]
            panels = {}
            for one in command.params:
                if one.name in settings:
                    panels.setdefault(one.rich_help_panel, []).append(one)
    parts += ["## Flags of settings", ""]
    parts += ["`config`, `launch` and `estimate` have them. Dashes may stand for underscores.", ""]
    for panel, rows in panels.items():
        parts += [f"### {panel}", "", *_table(rows)]
    return "\n".join(parts)


def _table(rows: Sequence[Any]) -> list[str]:
    return ["| | value | what it says |", "|---|---|---|", *(_row(one) for one in rows), ""] if rows else []


def _argument(one: Any) -> str:
    name = one.metavar or one.name.upper()
    return name if one.required or name.startswith("[") else f"[{name}]"


def _row(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"| `{one.metavar or one.name.upper()}` | | {_cell(getattr(one, 'help', '') or '')} |"
    names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    value = "" if one.is_flag else _cell((one.metavar or "TEXT").replace("|", ", "))
    words = _cell(one.help or "")
    if not one.is_flag and isinstance(one.default, str | int) and not isinstance(one.default, bool):
        words += f" Default: `{one.default}`."
    return f"| {names} | {value} | {words.strip()} |"


# Python.

# What is shown of `shardwise` first, and the modules with a path of their own.
FIRST = "Accelerator"
MODULES = ("shardwise.memory", "shardwise.losses", "shardwise.logging", "shardwise.compat", "shardwise.errors")
NAMES = {
    "shardwise.memory": ("MemoryTracker",),
    "shardwise.losses": ("cross_entropy", "head_cross_entropy"),
    "shardwise.logging": ("get_logger",),
    "shardwise.compat": ("as_deepspeed",),
}


def api() -> str:
    """Signatures and docstrings of what users import; names that only stand for accelerate's are listed."""
    import shardwise
    from shardwise.names.table import ROWS

    parts = ["## shardwise", ""]
    own = [name for name in shardwise.__all__ if not name.startswith("__") and name in shardwise._HOME_OF]
    for name in sorted(own, key=lambda name: (name != FIRST, name.lower())):
        parts += _item(f"shardwise.{name}", getattr(shardwise, name), 3)
    for path in MODULES:
        module = importlib.import_module(path)
        names = NAMES.get(path) or [n for n, v in vars(module).items() if getattr(v, "__module__", "") == path]
        parts += [f"## {path}", "", _markdown(inspect.getdoc(module) or ""), ""]
        for name in names:
            parts += _item(f"{path}.{name}", getattr(module, name), 3, brief=path.endswith("errors"))
    refused = sorted(name for name in shardwise.__all__ if name in ROWS and ROWS[name].home is None)
    parts += ["## Names that are refused when they are used", ""]
    parts += ["They can be imported, because scripts written for accelerate do.", ""]
    parts += ["| name | why |", "|---|---|"]
    parts += [f"| `{name}` | {_cell(ROWS[name].why)} |" for name in refused]
    return "\n".join([*parts, ""])


def _item(path: str, item: Any, level: int, *, brief: bool = False) -> list[str]:
    """A heading, the signature, the docstring, and of a class its public members."""
    name = path.rpartition(".")[2]
    mark = "#" * level
    parts = [f"{mark} `{name}`", ""]
    if not brief:
        parts += ["```python", f"{path}{_signature(item)}", "```", ""]
    parts += [_markdown(_docstring(item)), ""]
    if inspect.isclass(item) and not brief:
        for inner, value in _members(item):
            kind = "" if callable(value) else " *(property)*"
            parts += [f"{mark}# `{name}.{inner}`{kind}", ""]
            if callable(value):
                parts += ["```python", f"{inner}{_signature(value)}", "```", ""]
            parts += [_markdown(_docstring(value)), ""]
    return parts


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public ones that say what they do, the class's own before those of the classes above it."""
    seen: set[str] = set()
    for owner in kind.__mro__:
        if not owner.__module__.startswith("shardwise"):
            continue
        for name, found in vars(owner).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            value = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            if (isinstance(value, property) or callable(value)) and _docstring(value):
                yield name, value


def _signature(item: Any) -> str:
    """On one line, or, where that is long, with a line for each parameter."""
    try:
        found = inspect.signature(item)
    except (TypeError, ValueError):
        return ""
    parameters = [one for name, one in found.parameters.items() if name not in ("self", "cls")]
    found = found.replace(parameters=parameters)
    line = str(found).replace("'", "")
    if len(line) <= 90:
        return line
    rows: list[str] = []
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not any(row.lstrip().startswith("*") for row in rows):
            rows.append("    *,")
        rows.append(f"    {str(one).replace(chr(39), '')},")
    returned = str(found.replace(parameters=[])).removeprefix("()").replace("'", "")
    return "\n".join(["(", *rows, f"){returned}"])


def _docstring(item: Any) -> str:
    text = inspect.getdoc(item) or ""
    # A dataclass without a docstring has its signature as one.
    return "" if inspect.isclass(item) and text.startswith(f"{item.__name__}(") else text


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


_TERM = re.compile(r"^(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*):\s+(\S.*)$")


def _markdown(text: str) -> str:
    """A docstring: paragraphs, `name: what it is` as a list, what is indented as code."""
    return "\n\n".join(_paragraph(lines.splitlines()) for lines in re.split(r"\n\s*\n", text.strip()))


def _paragraph(lines: list[str]) -> str:
    if all(line.startswith("    ") for line in lines):
        return "\n".join(["```text", *(line[4:] for line in lines), "```"])
    shown: list[str] = []
    listing = coding = False
    for line in lines:
        term = _TERM.match(line)
        code = line.startswith("    ") and not listing
        if coding != code:
            shown += ["", "```text"] if code else ["```", ""]
        if term and not listing:
            shown.append("")
        if listing and line.startswith("Raises "):
            listing = False
            shown.append("")
        listing, coding = listing or bool(term), code
        indent = "" if not listing else "    "
        shown.append(
            f"- `{term[1]}`: {_prose(term[2])}" if term else line[4:] if code else indent + _prose(line.strip())
        )
    return "\n".join([*shown, "```"] if coding else shown).strip("\n")


def _prose(text: str) -> str:
    return re.sub(r"<(?=[a-zA-Z/])", "&lt;", text) if "`" not in text else text


PARTS: dict[str, Callable[[], str]] = {"settings": settings, "commands": commands, "api": api}


def main() -> None:
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(PARTS[name]())
        return
    OUT.mkdir(parents=True, exist_ok=True)
    for name, make in PARTS.items():
        (OUT / f"{name}.md").write_text(make() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
