"""`shardwise config` and what stands below it, as the parser sees them; what they do is in `config.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from .flags import with_setting_flags
from .helping import Command, Group

config_app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None, pretty_exceptions_enable=False)

ConfigFile = Annotated[
    str | None,
    typer.Option("--config_file", metavar="FILE", help="The YAML file. Default: in the user's cache."),
]


@config_app.callback()
@with_setting_flags
def config_command(
    settings: dict[str, str | bool],
    context: typer.Context,
    config_file: ConfigFile = None,
    default: Annotated[
        bool, typer.Option("--default", help="Ask nothing, begin anew: flags, and defaults for what they do not say.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Ask nothing: put the flags into the file, and keep all else that it says.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Take the fastest plan of it that fits this machine."),
    ] = None,
    lora_r: Annotated[
        str | None, typer.Option("--lora_r", metavar="N", help="With --model: LoRA of this rank is trained.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="8bit|4bit", help="With --model: its frozen weights as codes.")
    ] = None,
    sequence_length: Annotated[
        str | None, typer.Option("--sequence_length", metavar="N", help="With --model: tokens of one sequence.")
    ] = None,
) -> None:
    """Ask a few questions and write the answers to a YAML file for `launch`."""
    if context.invoked_subcommand is not None:
        return
    from .config import run_config
    from .questions import Typed

    typed = Typed(model, lora_r, quantize, sequence_length)
    run_config(settings, config_file=config_file, take_defaults=default, update=update, typed=typed)


@config_app.command(name="show", cls=Command)
def show_command(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="Default: the one in the user's cache.")] = None,
) -> None:
    """Print what a YAML file sets, key by key, and what it leaves to the defaults; ends with 2 if it is wrong."""
    from .config import show

    show(file)
