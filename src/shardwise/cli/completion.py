"""`shardwise completion SHELL`: a script that lets a shell complete commands, flags, and the values that a flag takes.

The script holds all words, so a TAB starts no Python: `typer`'s own completion and argcomplete run the program each time,
0.3 s of a processor. It is as old as the shardwise that printed it: `eval "$(shardwise completion bash)"` in a shell's own file
makes it anew with each shell.

Of a flag's value the script knows what its name in --help says: words with | between them are offered, a FILE or DIR is
completed as a path, anything else is left to the user. Flags are completed with underscores, as --help has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .helping import takes_no_value

SHELLS = ("bash", "zsh", "fish")
PATH = "path"
_PATHS = ("FILE", "DIR", "DIR[,DIR]")


@dataclass(frozen=True)
class Words:
    """One command. flags: name -> what it does. values: name -> what may follow it, PATH, or nothing that is known.

    commands: those below it, or what its argument may be.
    """

    name: str
    help: str
    flags: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple[str, ...] | str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()


def words_of(group: Any, context: Any) -> list[Words]:
    """What there is to complete: a row for each command of `group`, and for those that they have."""
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        flags: dict[str, str] = {}
        values: dict[str, tuple[str, ...] | str] = {}
        for parameter in command.get_params(context):
            if parameter.param_type_name == "argument" or getattr(parameter, "hidden", False):
                continue
            for typed in (*parameter.opts, *parameter.secondary_opts):
                flags[typed] = (parameter.help or "").rstrip(".")
                if not takes_no_value(parameter):
                    values[typed] = _values(parameter.metavar or "")
        found.append(Words(name, str(command.help or "").split("\n")[0].rstrip("."), flags, values, _below(command)))
    return found


def _below(command: Any) -> tuple[str, ...]:
    """The words that may come next: commands, or the values of an argument whose name lists them."""
    known = [_values(found.metavar or "") for found in command.params if found.param_type_name == "argument"]
    return (*getattr(command, "commands", ()), *(word for words in known if words != PATH for word in words))


def _values(metavar: str) -> tuple[str, ...] | str:
    if metavar in _PATHS:
        return PATH
    # A word in capitals stands for a value, as N in `world|machine|N`.
    return tuple(word for word in metavar.split("|") if "|" in metavar and not word.isupper())


def script_of(shell: str, commands: list[Words]) -> str:
    """The script. Raises ConfigError for a shell that it is not made for."""
    if shell not in SHELLS:
        raise ConfigError(f"{shell}: is not one of {', '.join(SHELLS)}")
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return makers[shell](commands)


def _act(allowed: tuple[str, ...] | str, *, path: str, words: str, else_: str) -> str:
    """What a shell is to do for a value. path: a path. words: known ones, which take {}. else_: any other."""
    if allowed == PATH:
        return path
    return words.format(" ".join(allowed)) if allowed else else_


_BASH = """\
# Completion of shardwise for bash:  eval "$(shardwise completion bash)"  in ~/.bashrc
_shardwise() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
    local flags="" below=""
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))
        return
    fi
    case "$command $before" in
{values}
    esac
    case "$command" in
{flags}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    else
        COMPREPLY=($(compgen -W "$below" -- "$word") $(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _shardwise shardwise
"""


def _bash(commands: list[Words]) -> str:
    values, flags = [], []
    for command in commands:
        for name, allowed in command.values.items():
            paths, words = 'COMPREPLY=($(compgen -f -- "$word")); ', 'COMPREPLY=($(compgen -W "{}" -- "$word")); '
            act = _act(allowed, path=paths, words=words, else_="") + "return"
            values.append(f'        "{command.name} {name}") {act} ;;')
        flags.append(
            f'        {command.name}) flags="{" ".join(command.flags)}" below="{" ".join(command.commands)}" ;;'
        )
    names = " ".join(command.name for command in commands)
    return _BASH.format(names=names, values="\n".join(values), flags="\n".join(flags))


_ZSH = """\
#compdef shardwise
# Completion of shardwise for zsh:  eval "$(shardwise completion zsh)"  in ~/.zshrc, after compinit
_shardwise() {{
    local -a commands flags
    commands=(
{names}
    )
    if (( CURRENT == 2 )); then
        _describe -t commands command commands
        return
    fi
    case "$words[2]" in
{flags}
    esac
}}
compdef _shardwise shardwise
"""


def _zsh(commands: list[Words]) -> str:
    def quoted(text: str) -> str:
        """Inside single quotes, where a colon and brackets mean something to _arguments."""
        for mark in "\\:[]":
            text = text.replace(mark, f"\\{mark}")
        return text.replace("'", "'\\''")

    names = [f"        '{command.name}:{quoted(command.help)}'" for command in commands]
    cases = []
    for command in commands:
        rows = []
        for name, said in command.flags.items():
            allowed = command.values.get(name)
            follows = ""
            if allowed is not None:
                follows = _act(allowed, path=":path:_files", words=":value:({})", else_=":value:")
            rows.append(f"'{name}[{quoted(said)}]{follows}'")
        first = f"'1:command:({' '.join(command.commands)})'" if command.commands else "'1:path:_files'"
        arguments = " \\\n                ".join([*rows, first, "'*:path:_files'"])
        cases.append(f"        {command.name})\n            shift words; (( CURRENT-- ))\n            _arguments -S \\")
        cases.append(f"                {arguments}\n            ;;")
    return _ZSH.format(names="\n".join(names), flags="\n".join(cases))


def _fish(commands: list[Words]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = [
        "# Completion of shardwise for fish:  shardwise completion fish > ~/.config/fish/completions/shardwise.fish"
    ]
    for command in commands:
        lines.append(f"complete -c shardwise -n __fish_use_subcommand -a {command.name} -d {quoted(command.help)}")
    for command in commands:
        here = f"complete -c shardwise -n '__fish_seen_subcommand_from {command.name}'"
        lines += [f"{here} -a {name}" for name in command.commands]
        for name, said in command.flags.items():
            typed = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            allowed = command.values.get(name)
            value = ""
            if allowed is not None:
                value = _act(allowed, path=" -r -F", words=f" -x -a {quoted('{}')}", else_=" -x")
            lines.append(f"{here} {typed}{value} -d {quoted(said)}")
    return "\n".join(lines) + "\n"
