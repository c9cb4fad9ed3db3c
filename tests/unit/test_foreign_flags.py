"""Every flag of `accelerate launch` works, or ends in one line that says what to use in its place."""

from __future__ import annotations

import pytest
import typer

from shardwise.cli.foreign_flags import instead_of
from shardwise.cli.launch_plan import Command, Watching, check_script
from shardwise.cli.main import USAGE_ERROR, app, run
from shardwise.errors import ConfigError, LaunchError


def test_every_flag_of_accelerates_launcher_is_known():
    launch = pytest.importorskip("accelerate.commands.launch")
    command = typer.main.get_command(app).commands["launch"]
    ours = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    ours |= {"-h", "--help"}
    theirs = {name.replace("-", "_").replace("__", "--", 1) for name in _names(launch.launch_command_parser())}
    ours = {name.replace("-", "_").replace("__", "--", 1) for name in ours}
    assert sorted(name for name in theirs - ours if instead_of(name) is None) == []
    assert sorted(name for name in ours if instead_of(name) is not None) == []


def _names(parser):
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--fp16", "--mixed_precision fp16"),
        ("--deepspeed_hostfile", "--hostfile"),
        ("--deepspeed-hostfile", "--hostfile"),
        ("--use_fsdp", "--zero_stage 3"),
        ("--fsdp_offload_params", "--zero_stage 3"),
        ("--dynamo_mode", "dynamo_config"),
    ],
)
def test_a_flag_that_is_not_here_says_what_is(capsys, flag, text):
    assert run(["launch", flag, "value", "train.py"]) == USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
    assert text in line


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (("4", None, "0.1", False), "--tee: '4' is not 0, 1"),
        (("0:4", None, "0.1", False), "--tee"),
        (("0", "logs", "0.1", False), "--log_dir: has no effect without --tee"),
        (("0", None, "never", False), "--monitor_interval: 'never' is not a number of seconds"),
        (("0", None, "0", False), "--monitor_interval"),
    ],
)
def test_what_cannot_be_watched_is_refused(typed, text):
    with pytest.raises(ConfigError, match=text):
        Watching.typed(*typed)
    assert Watching.typed("0:3,1:1", "logs", "2", True) == Watching("0:3,1:1", "logs", 2.0, True)


def test_a_program_must_be_there():
    check_script("sh", Command(without_python=True))
    with pytest.raises(LaunchError, match="no such program"):
        check_script("no-such-program", Command(without_python=True))
    with pytest.raises(LaunchError, match="contradict"):
        check_script("sh", Command(is_module=True, without_python=True))
