"""`--help` of the commands: plain text of at most 80 columns, in which the name of every flag stands whole.

rich, which typer would print it with, makes tables of fixed columns, and cuts a name that is wider than its own. Here a wide
name has a line to itself, and what it does stands on the next one. The parts are those that the flags say (`setting.py`).
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

GENERAL = "Options"


class Command(TyperCommand):
    """A command whose help has a part for each panel of its flags."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parts(self, ctx, formatter)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        _write_usage(self, ctx, formatter)


class Group(TyperGroup):
    """The same for a command that has commands of its own."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Those that have commands of their own first: typer adds `config` last, which is where one begins."""
        return sorted(super().list_commands(ctx), key=lambda name: not hasattr(self.commands[name], "commands"))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parts(self, ctx, formatter)
        rows = [(name, _first_sentence(self.get_command(ctx, name))) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        _write_usage(self, ctx, formatter)


def _write_parts(command: Any, ctx: Any, formatter: Any) -> None:
    """The arguments, the command's own flags, and those of the schema by their panels."""
    parts: dict[str, list[tuple[str, str]]] = {"Arguments": [], GENERAL: []}
    for parameter in command.get_params(ctx):
        if getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or GENERAL
        names = display_name(parameter) if argument else _flag_names(parameter)
        parts.setdefault(title, []).append((names, _said(parameter)))
    for title, rows in parts.items():
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


def _first_sentence(command: Any) -> str:
    return str(command.help or "").split("\n\n", maxsplit=1)[0].replace("\n", " ")


def _write_usage(command: Any, ctx: Any, formatter: Any) -> None:
    arguments = [p for p in command.get_params(ctx) if p.param_type_name == "argument"]
    words = ["[FLAGS]", *(display_name(p) if p.required else f"[{display_name(p)}]" for p in arguments)]
    words += ["[COMMAND ...]"] if hasattr(command, "commands") else []
    formatter.write_usage(ctx.command_path, " ".join(words))


def display_name(argument: Any) -> str:
    """What an argument is called: SCRIPT, or ARGS... where there may be several."""
    name = re.sub(r"[\[\].]", "", argument.metavar or argument.name.upper())
    return name if argument.nargs == 1 else f"{name}..."


def _flag_names(flag: Any) -> str:
    """`-q, --quiet`; `--lora_r N`; `--debug, --no_debug`."""
    names = sorted([*flag.opts, *flag.secondary_opts], key=lambda name: name.startswith("--"))
    return ", ".join(names) + ("" if takes_no_value(flag) else f" {flag.metavar or 'TEXT'}")


def takes_no_value(flag: Any) -> bool:
    """Whether the flag is all there is to type."""
    return bool(flag.is_flag or flag.param_type_name == "argument")


def _said(parameter: Any) -> str:
    extra = []
    default = parameter.default
    if isinstance(default, (str, int)) and not isinstance(default, bool):
        extra.append(f"default: {default}")
    if getattr(parameter, "envvar", None):
        extra.append(f"or ${parameter.envvar}")
    text = parameter.help or ""
    return f"{text} [{'; '.join(extra)}]".strip() if extra else text
