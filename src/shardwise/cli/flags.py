"""The flags of `config`, `launch` and `estimate`, made of the schema: which keys have one, and what each says of itself.

A flag is named as its YAML key; `main.py` takes dashes for underscores. Every value stays the text that was typed: the
schema checks it, so that a wrong flag and a wrong file are told in the same words. A flag that was not typed is None,
never a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from ..config.schema import every_setting
from ..config.setting import PANELS, Setting, metavar_of, setting_of


@dataclass(frozen=True)
class Flag:
    """One setting's flag. name: the YAML key, and with `--` the flag. said: what the schema says of it."""

    name: str
    said: Setting
    metavar: str


def _flags() -> tuple[Flag, ...]:
    """In the order of --help: by its parts, and in each as the schema has them or as they say themselves."""
    made = [Flag(key[-1], setting_of(info), metavar_of(info)) for key, info in every_setting() if setting_of(info).help]

    def following(name: str | None) -> Iterator[Flag]:
        for flag in made:
            if flag.said.after == name:
                yield flag
                yield from following(flag.name)

    return tuple(sorted(following(None), key=lambda flag: PANELS.index(flag.said.panel)))


FLAGS = _flags()


def _parameter(flag: Flag) -> inspect.Parameter:
    said = flag.said
    names = [f"--{name}/--no_{name}" if said.switch else f"--{name}" for name in (flag.name, *said.also)]
    metavar = None if said.switch else flag.metavar
    option = typer.Option(None, *names, help=said.help, rich_help_panel=said.panel, metavar=metavar)
    kind: Any = bool | None if said.switch else str | None
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command(settings, ...)` as a function whose signature has one parameter for each flag in place of `settings`.

    settings: {name: what was typed}, without the flags that were not given.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    names = [flag.name for flag in FLAGS]

    def typed(**values: Any) -> None:
        settings = {name: values.pop(name) for name in names}
        command(settings={name: value for name, value in settings.items() if value is not None}, **values)

    parameters = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        *(_parameter(flag) for flag in FLAGS),
    ]
    return as_command(typed, command, parameters)


def as_command(
    typed: Callable[..., None], command: Callable[..., None], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """`typed` as the parser is to see it: with the name and words of `command`, and these parameters."""
    typed.__doc__ = command.__doc__
    typed.__name__ = command.__name__
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return typed
