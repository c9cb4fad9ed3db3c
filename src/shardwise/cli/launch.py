"""`shardwise launch`: resolve the settings, check everything, show it or start it.

Nothing here imports torch until all checks have passed; a mistake is told within a fraction of a second.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping

from ..config.environment import RankEnvironment
from ..config.machine import environment_value, export, exported
from ..config.resolve import Resolution, resolve
from ..config.schema import ENVIRONMENT_KEY, SECTIONS, Config, Key
from ..config.yaml_file import default_file
from ..errors import ConfigError, LaunchError, ShardwiseError
from . import worker
from .elsewhere import Elsewhere, Typed
from .hosts import END_WITH_STDIN
from .launch_plan import Command, LaunchPlan, Watching, check_script, make_plan

_HERE = Elsewhere()


def run_launch(
    settings: Mapping[str, str | bool],
    *,
    script: str,
    arguments: list[str],
    config_file: str | None = None,
    use_zero: bool = False,
    multi_gpu: bool = False,
    is_module: bool = False,
    no_python: bool = False,
    watching: tuple[str, str | None, str, bool] = ("0", None, "0.1", False),
    dry_run: bool = False,
    as_deepspeed: bool = False,
    elsewhere: Elsewhere = _HERE,
) -> None:
    """Start `script`, and leave with its exit code. Raises ConfigError or LaunchError before anything is started.

    watching:  what was typed for --tee, --log_dir, --monitor_interval and --quiet.
    elsewhere: other machines, where it is to be started in this one's place.
    """
    if multi_gpu and use_zero:
        raise ConfigError("--multi_gpu and --use_deepspeed contradict each other")
    flags = {**({"distributed_type": "MULTI_GPU"} if multi_gpu else {}), **elsewhere.filled(settings)}
    problems: list[str] = []
    resolution: Resolution | None = None
    file = config_file or (str(default_file()) if default_file().is_file() else None)
    try:
        resolution = resolve(flags, file, use_zero=use_zero, as_deepspeed=as_deepspeed)
        if config_file is None and file is not None and not watching[-1]:
            print(f"shardwise launch: settings of {file}", file=sys.stderr)
    except ShardwiseError as error:
        problems.append(str(error))
    how = Command(is_module=is_module, without_python=no_python)
    if elsewhere.is_asked():
        if resolution is None:
            raise ConfigError("\n".join(problems))
        check_script(script, how)
        typed = Typed(_switches(config_file, use_zero, multi_gpu, how, watching, as_deepspeed), script, arguments)
        sys.exit(elsewhere.run(resolution.config, settings, typed, os.environ, dry_run=dry_run))
    plan: LaunchPlan | None = None
    try:
        # With wrong settings the plan is made of the defaults, to check the rest of the command too.
        base = resolution or Resolution(Config(use_cpu=True))
        plan = make_plan(
            base,
            script=script,
            how=how,
            arguments=arguments,
            as_deepspeed=as_deepspeed,
            beside=file,
            watching=Watching.typed(*watching),
        )
    except ShardwiseError as error:
        problems.append(str(error))
    if problems:
        if dry_run and resolution is not None:
            print("\n".join(describe_config(resolution.config, resolution.origins)))
        raise ConfigError("\n".join(problems))
    assert plan is not None
    _start(plan, dry_run=dry_run)


def _start(plan: LaunchPlan, *, dry_run: bool) -> None:
    """Run this machine's part, and leave with its exit code; or show it."""
    for note in [] if plan.watching.quiet else plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print("\n".join(describe(plan)))
        return
    if environment_value(END_WITH_STDIN) is not None:
        from .ssh import end_with_stdin

        end_with_stdin()
    if plan.as_rank:
        _become_rank(plan)
    from .agent import start

    if plan.config.num_machines == 1:
        sys.exit(start(plan))
    if environment_value("TORCH_CPP_LOG_LEVEL") is None:
        # Where addresses have no names, torch warns of every connection. It reads this when it is imported.
        with exported({"TORCH_CPP_LOG_LEVEL": "ERROR"}):
            import torch  # noqa: F401
    from . import many

    sys.exit(start(plan, many.run))


def _switches(
    config_file: str | None,
    use_zero: bool,
    multi_gpu: bool,
    how: Command,
    watching: tuple[str, str | None, str, bool],
    as_deepspeed: bool,
) -> list[str]:
    """What was typed beside settings and script, to be typed again on another machine."""
    tee, log_dir, interval, quiet = watching
    given = {
        "--use_deepspeed": use_zero,
        "--multi_gpu": multi_gpu,
        "--module": how.is_module,
        "--no_python": how.without_python,
        "--quiet": quiet,
        "--as_deepspeed": as_deepspeed,
    }
    words = [] if config_file is None else ["--config_file", os.path.abspath(config_file)]
    words += [] if tee == "0" else ["--tee", tee]
    words += [] if log_dir is None else ["--log_dir", log_dir]
    words += [] if interval == "0.1" else ["--monitor_interval", interval]
    return words + [name for name, was_given in given.items() if was_given]


def _become_rank(plan: LaunchPlan) -> None:
    """Run the script in this process's place, which a scheduler has started as one of the ranks."""
    if plan.how.without_python or plan.as_deepspeed or plan.watching.tee != "0":
        raise LaunchError(
            "srun starts a launcher for each rank: --no_python, --as_deepspeed and --tee need one for each machine; give srun "
            "--ntasks-per-node 1"
        )
    export(plan.environment)
    RankEnvironment.read().export()
    module = ["-m"] if plan.how.is_module else []
    os.execv(sys.executable, [sys.executable, str(worker.__file__), *module, plan.script, *plan.arguments])


def describe_config(config: Config, origins: Mapping[Key, str]) -> list[str]:
    """The settings that the run has, one a line, each with where it comes from."""
    rows: list[tuple[str, str, str]] = []
    full = config.model_dump(mode="json")
    full["deepspeed_config"] = config.zero.model_dump(mode="json")
    for name, value in sorted(full.items()):
        for key, inner in _rows((name,), value):
            origin = origins.get(key, "default")
            unused = "loss_scale" in key and config.mixed_precision != "fp16"
            # `fsdp_config: {}` and its like say nothing; a `gradient_clipping: none` that was given does.
            if not unused and (inner not in (None, {}, []) or (origin != "default" and len(key) > 1)):
                rows.append((".".join(key), _plain(inner), origin))
    width, middle = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return ["settings:", *(f"  {name:<{width}}  {value:<{middle}}  {origin}" for name, value, origin in rows)]


def _rows(key: Key, value: object) -> list[tuple[Key, object]]:
    if isinstance(value, dict) and value and key in SECTIONS:
        return [row for name, inner in value.items() for row in _rows((*key, name), inner)]
    return [(key, value)]


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict) and value:
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(str(part) for part in value)
    return "none" if value is None or value == {} else str(value)


def describe(plan: LaunchPlan) -> list[str]:
    """All that `--dry-run` shows: settings, environment, processes."""
    config = plan.config
    lines = describe_config(config, plan.origins)
    lines += ["", "environment of every process:"]
    lines += [f"  {name}={value}" for name, value in sorted(plan.environment.items()) if name != ENVIRONMENT_KEY]
    if "OMP_NUM_THREADS" not in plan.environment:
        lines.append(f"  OMP_NUM_THREADS={environment_value('OMP_NUM_THREADS')}  (as set outside)")
    lines.append(f"  {ENVIRONMENT_KEY}={plan.environment[ENVIRONMENT_KEY]}")
    first = config.machine_rank * plan.local_processes
    port = plan.port or "a free port"
    lines += ["", f"processes ({plan.local_processes} on this machine, {config.num_processes} in all):"]
    for local in range(plan.local_processes):
        device = "cpu" if config.use_cpu else f"cuda:{local}"
        lines.append(f"  rank {first + local}  {device}  MASTER_ADDR={plan.address} MASTER_PORT={port}")
    lines.append(f"  {shlex.join(plan.command)}")
    if plan.check_devices:
        lines.append("  (the number of GPUs is checked once torch is imported)")
    return lines
