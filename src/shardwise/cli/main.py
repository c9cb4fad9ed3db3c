"""The `shardwise` command: its subcommands, and how a mistake ends.

A wrong setting, flag or file ends in one line for each thing that is wrong and exit code 2, without a traceback. Each
subcommand's own imports happen when it is called, so that `shardwise --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from ..errors import ConfigError, ShardwiseError
from ..version import __version__
from .config_command import ConfigFile, config_app
from .flags import with_setting_flags
from .foreign_flags import usage_error
from .helping import Command, Group
from .model_flags import (
    Asked,
    DriveRate,
    DriveSize,
    GpuMemory,
    GpuName,
    Gpus,
    HostMemory,
    LinkRate,
    ModelName,
    NetworkRate,
    with_model_flags,
)

USAGE_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="shardwise",
    help="Train transformers that do not fit: ZeRO-1/2/3 and offload on torch.distributed.",
    no_args_is_help=True,
    cls=Group,
    rich_markup_mode=None,  # whole names in --help: helping.py
    add_completion=False,  # its scripts start Python at every TAB: completion.py
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --zero-stage is --zero_stage, for every flag.
        "token_normalize_func": lambda token: token.replace("-", "_"),
    },
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"shardwise {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.add_typer(config_app, name="config")


Tee = Annotated[
    str,
    typer.Option("--tee", "-t", metavar="STREAMS", help="Write what ranks print to files too: 1, 2, 3, or 0:3,1:1."),
]
LogDirectory = Annotated[
    str | None, typer.Option("--log_dir", metavar="DIR", help="Where --tee writes. Default: a new directory.")
]
HostFile = Annotated[
    str | None,
    typer.Option("--hostfile", metavar="FILE", help="Start it on the hosts of FILE (`HOST slots=N`) by ssh."),
]
Ssh = Annotated[
    str | None,
    typer.Option(
        "--ssh", metavar="COMMAND", envvar="SHARDWISE_SSH", help="What starts it on a host of --hostfile; default: ssh."
    ),
]
EnvironmentFile = Annotated[
    str | None,
    typer.Option("--env_file", metavar="FILE", help="NAME=VALUE lines for the hosts. Default: .deepspeed_env."),
]
SlurmScript = Annotated[
    str | None,
    typer.Option("--slurm_script", metavar="FILE", help="Write a batch script for Slurm (-: print it); start nothing."),
]


@app.command(
    name="launch", cls=Command, context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False}
)
@with_setting_flags
def launch_command(
    settings: dict[str, str | bool],
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="The training script (with -m: a module).")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]...", help="Everything after SCRIPT belongs to it.")
    ] = None,
    config_file: ConfigFile = None,
    use_deepspeed: Annotated[
        bool, typer.Option("--use_deepspeed", help="A ZeRO run; any ZeRO flag says so too.")
    ] = False,
    multi_gpu: Annotated[bool, typer.Option("--multi_gpu", help="Whole copies on every GPU, nothing sharded.")] = False,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as in python -m.")] = False,
    no_python: Annotated[
        bool, typer.Option("--no_python", help="SCRIPT is a program, which is run as it is, without Python.")
    ] = False,
    tee: Tee = "0",
    log_dir: LogDirectory = None,
    monitor_interval: Annotated[
        str, typer.Option("--monitor_interval", metavar="SECONDS", help="How often the ranks are looked after.")
    ] = "0.1",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no notes, and of a failure only the first rank's.")
    ] = False,
    as_deepspeed: Annotated[
        bool, typer.Option("--as_deepspeed", help="In SCRIPT, `import deepspeed` finds shardwise.")
    ] = False,
    hostfile: HostFile = None,
    ssh: Ssh = None,
    env_file: EnvironmentFile = None,
    slurm_script: SlurmScript = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print settings, environment and processes; start nothing.")
    ] = False,
) -> None:
    """Start a training script, one process for each GPU (or on the CPU), on one machine or several."""
    from .elsewhere import Elsewhere
    from .launch import run_launch

    run_launch(
        settings,
        script=script,
        arguments=list(arguments or ()),
        config_file=config_file,
        use_zero=use_deepspeed,
        multi_gpu=multi_gpu,
        is_module=module,
        no_python=no_python,
        watching=(tee, log_dir, monitor_interval, quiet),
        dry_run=dry_run,
        as_deepspeed=as_deepspeed,
        elsewhere=Elsewhere(hostfile, ssh, env_file, slurm_script),
    )


@app.command(name="estimate", cls=Command)
@with_setting_flags
@with_model_flags
def estimate_command(
    settings: dict[str, str | bool],
    model: Annotated[str, ModelName],
    config_file: ConfigFile = None,
    *,
    asked: Asked,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the bytes that a model needs under each plan, by role and tier, before anything is loaded."""
    from .estimate import run_estimate

    run_estimate(model, settings, asked, config_file=config_file, as_json=as_json)


@app.command(name="plan", cls=Command)
@with_setting_flags
@with_model_flags
def plan_command(
    settings: dict[str, str | bool],
    model: Annotated[str | None, ModelName] = None,
    config_file: ConfigFile = None,
    gpus: Gpus = None,
    gpu: GpuName = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    link: LinkRate = None,
    network: NetworkRate = None,
    nvme: DriveSize = None,
    drive: DriveRate = None,
    tokens: Annotated[str | None, typer.Option("--tokens", metavar="N", help="Of the whole run, as 1B: hours.")] = None,
    write: Annotated[
        str | None, typer.Option("--write", metavar="FILE", help="Write the YAML of the fastest plan that fits.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's rates, and keep them.")] = False,
    *,
    asked: Asked,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every plan of a model on a machine: bytes, time of a step, what bounds it; the fastest one's YAML on request."""
    from .plan import Wanted, run_measure, run_plan
    from .plan_machine import MachineAsked

    on = MachineAsked(gpus, gpu, gpu_memory, host_memory, link, network, nvme, drive)
    if measure:
        run_measure(settings, config_file, on)
    if model is None:
        if measure:
            return
        raise ConfigError("MODEL is missing: a hub id, a directory with a config.json, or such a file")
    run_plan(model, settings, asked, on, Wanted(tokens, write, as_json), config_file)


@app.command(name="env", cls=Command)
def env_command(config_file: ConfigFile = None) -> None:
    """Print what a bug report needs: versions, machine, configuration."""
    from .env import run_env

    run_env(config_file)


Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="float32|bfloat16|float16", help="Number format of the files. Default: as it is."),
]
ShardSize = Annotated[str, typer.Option("--max_shard_size", metavar="SIZE", help="Largest size of one file.")]


@app.command(name="merge", cls=Command)
def merge_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Directory of the base model.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Directory of the adapter, as PEFT writes it.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where the merged model is written.")],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Merge a LoRA adapter into its base model, file by file; the model is never in memory."""
    from .weights import run_merge

    run_merge(base, adapter, output, dtype=dtype, max_shard_size=max_shard_size)


@app.command(name="export", cls=Command)
def export_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A directory that save_state has written.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where the files are written.")],
    model: Annotated[int, typer.Option("--model", metavar="N", help="Which of the prepared models.")] = 0,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write the adapter or the model of a checkpoint as PEFT and transformers read it; no GPU needed."""
    from .weights import run_export

    run_export(checkpoint, output, model=model, dtype=dtype, max_shard_size=max_shard_size)


@app.command(name="import", cls=Command)
def import_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A DeepSpeed checkpoint, or a directory of accelerate's save_state.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The checkpoint to write, a new directory.")],
    names: Annotated[
        str | None,
        typer.Option(
            "--names",
            metavar="FILE",
            help="Names of what the optimizer trains, one a line, where a file has only numbers.",
        ),
    ] = None,
) -> None:
    """Turn a run that DeepSpeed or accelerate saved into a checkpoint of shardwise; nothing in it is executed."""
    from .weights import run_import

    run_import(source, output, names=names)


@app.command(name="report", cls=Command)
def report_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory with a run's metrics.jsonl, or that file.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The page. Default: report.html beside it.")
    ] = None,
) -> None:
    """Write a run's record as one HTML page: losses, speed, memory, and where the time went."""
    from .report import run_report

    run_report(run, output)


@app.command(name="completion", cls=Command)
def completion_command(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="Whose script.")],
) -> None:
    """Print a script for a shell, which then completes commands, flags and their values."""
    from .completion import script_of, words_of

    assert context.parent is not None
    print(script_of(shell, words_of(context.parent.command, context)), end="")


def complain(text: str) -> None:
    """Each line of `text` on stderr as an error of its own."""
    for line in text.splitlines() or ["unknown error"]:
        print(f"error: {line}", file=sys.stderr)


def run(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code."""
    try:
        code = app(args=arguments, prog_name="shardwise", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except ShardwiseError as error:
        complain(str(error))
        return USAGE_ERROR
    except (KeyboardInterrupt, typer.Abort):
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`): nothing is wrong, and nothing can be said.
        sys.stderr.close()
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        # Usage errors of the parser that typer brings, under whichever module name this version of it has.
        told = getattr(error, "format_message", None)
        if told is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(told())
            return USAGE_ERROR
        complain(usage_error(error, " ".join(str(told()).split())))
        return USAGE_ERROR


def main() -> None:
    """The entry point of the `shardwise` command."""
    code = run()
    # All is said: a Ctrl-C while the interpreter ends would only add a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
