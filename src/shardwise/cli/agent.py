"""The ranks of this machine under torch's elastic agent: start, watch, stop, and say why it ended.

The agent is torch's own; this file gives it the plan, keeps its log lines quiet, and turns what it reports into what a
user needs: the first failing rank's own traceback, the others in one line each, the script's exit code. Whatever ends
the launcher, no process of a rank stays behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config.check import checked
from ..config.machine import environment_value, export, oom_kills, process_fields
from ..config.resolve import Resolution
from ..errors import LaunchError
from . import worker
from .failures import explain, failures_of
from .launch_plan import LaunchPlan, check_devices, free_port, make_plan

GRACE_S = 30
# What runs in the worker's place where `import deepspeed` is to find shardwise: by its path, as the worker.
_AS_DEEPSPEED = str(Path(worker.__file__).parents[1] / "compat" / "worker.py")
CONNECT_WITHIN_S = 120  # the launchers have met before


def start(plan: LaunchPlan, run: Callable[[LaunchPlan, Path, int | None], int] | None = None) -> int:
    """Run the plan to its end and give the exit code: the script's own, 128 + n for a signal n.

    run: what runs it, in a directory for records; None for one machine. Raises LaunchError if no process could start.
    """
    import torch

    if plan.check_devices:
        plan = _with_devices(plan, torch.cuda.device_count())
    directory = Path(tempfile.mkdtemp(prefix="shardwise-"))
    kills_before = oom_kills()
    _watch_signals(directory)
    over = _continue_stopped(directory)
    try:
        return (run or _run)(plan, directory, kills_before)
    finally:
        over.set()
        end_sessions(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _with_devices(plan: LaunchPlan, devices: int) -> LaunchPlan:
    origins = dict(plan.origins)
    config = plan.config
    if origins.get(("num_processes",)) == "one for each GPU":
        del origins[("num_processes",)]
        config = checked({**config.to_values(), "num_processes": None})
    check_devices(config, origins, devices)
    made = make_plan(
        Resolution(config, origins, []),
        script=plan.script,
        how=plan.how,
        arguments=plan.arguments,
        as_deepspeed=plan.as_deepspeed,
        beside=plan.beside,
        watching=plan.watching,
        devices=devices,
    )
    return replace(made, notes=plan.notes)


def _for_restart(plan: LaunchPlan) -> LaunchPlan:
    """The plan with as many processes as are asked for after a failure, or as there are GPUs now."""
    wanted = plan.config.engine.restart_processes or plan.local_processes
    if not plan.config.use_cpu:
        # In a process of its own: this one may have counted them before one was lost.
        code = "import torch; print(torch.cuda.device_count())"
        environment = {**os.environ, **plan.environment}
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        devices = int(found.stdout) if found.returncode == 0 else wanted
        wanted = min(wanted, max(1, devices))
    if wanted == plan.local_processes:
        return plan
    engine = {**plan.config.to_values().get("shardwise_config", {}), "restart_processes": None}
    config = checked({**plan.config.to_values(), "num_processes": wanted, "shardwise_config": engine})
    made = make_plan(
        Resolution(config, plan.origins, []),
        script=plan.script,
        how=plan.how,
        arguments=plan.arguments,
        as_deepspeed=plan.as_deepspeed,
        beside=plan.beside,
        watching=plan.watching,
        devices_known=False,
    )
    return replace(made, check_devices=False)


def _run(plan: LaunchPlan, directory: Path, kills_before: int | None) -> int:
    """Run to the end on one machine, with restarts. They are made here, for the number of processes may change."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for restart in range(plan.max_restarts + 1):
        try:
            return launch_once(plan, directory, restart)
        except ChildFailedError as error:
            code = explain(failures_of(error, directory, restart), plan, kills_before)
        left = plan.max_restarts - restart
        if left == 0:
            return code
        clear(directory)
        plan = _for_restart(plan)
        count = f"{plan.local_processes} process{'es' if plan.local_processes > 1 else ''}"
        print(f"shardwise launch: all ranks start again, {count}; {left - 1} restart(s) left", file=sys.stderr)
    raise AssertionError("unreachable")


def clear(directory: Path) -> None:
    """End what is left of an attempt, and forget it."""
    end_sessions(directory)
    for record in [*directory.glob("failure-*"), *directory.glob("pid-*")]:
        record.unlink()


def launch_once(plan: LaunchPlan, directory: Path, attempt: int) -> int:
    """One start of this machine's ranks, the first or a restart; 0, or 128 + n if a signal stopped them.

    Raises ChildFailedError if a rank failed, and LaunchError if they could not be started.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _quieten()
    ours = {worker.REPORTS: str(directory), worker.LAUNCHER: str(os.getpid()), worker.RESTART: str(attempt)}
    export({**plan.environment, **ours})
    started = _AS_DEEPSPEED if plan.as_deepspeed else worker.__file__
    command = [started, *(["-m"] if plan.how.is_module else []), plan.script, *plan.arguments]
    program = sys.executable
    if plan.how.without_python:
        program, command = str(shutil.which(plan.script)), list(plan.arguments)
    # The agent takes "$$" and "${local_rank}" in arguments as macros; the script's are to arrive as they are.
    command = [part.replace("$", "$$") for part in command]
    for trial in range(3):
        try:
            elastic_launch(_launch_config(plan, directory, attempt), program)(*command)
            return 0
        except ChildFailedError:
            raise
        except (SignalException, KeyboardInterrupt) as error:
            number = int(getattr(error, "sigval", signal.SIGINT))
            print(f"shardwise launch: stopped by {signal.Signals(number).name}", file=sys.stderr)
            return 128 + number
        except Exception as error:
            text = " ".join(str(error).split())
            # Another process may take the free port between finding it and using it.
            busy = "EADDRINUSE" in text or "already in use" in text
            if busy and plan.config.num_machines == 1 and plan.port == 0 and trial < 2:
                continue
            where = f"{plan.address}:{plan.port}"
            raise LaunchError(f"the processes could not be started ({where}): {text[:300]}") from error
    raise AssertionError("unreachable")


def _watch_signals(directory: Path) -> None:
    """Say that a first Ctrl-C (or SIGTERM) was heard; at a second one kill the ranks, whatever the agent waits for.

    The agent installs its own handlers, so the signals are seen through Python's wake-up descriptor, beside them.
    SIGUSR1, the warning before the end of a job, and SIGUSR2, which asks who waits where, are passed on to the ranks.
    """

    def pass_on(number: int, frame: object) -> None:
        for path in directory.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name[4:]), number)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        heard = 0
        while True:
            number = os.read(reader, 1)[0]
            if number in (signal.SIGINT, signal.SIGTERM):
                heard += 1
                name = signal.Signals(number).name
                if heard == 1:
                    print(f"\nshardwise launch: {name}: the ranks are asked to stop; again kills them", file=sys.stderr)
                else:
                    end_sessions(directory)

    threading.Thread(target=watch, name="shardwise-signals", daemon=True).start()


def _quieten() -> None:
    """Keep the agent's own log lines off the terminal, unless the user asked torch for logs."""
    if environment_value("TORCH_LOGS") is None and environment_value("LOGLEVEL") is None:
        for name in logging.root.manager.loggerDict:
            if name.startswith("torch.distributed."):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _launch_config(plan: LaunchPlan, directory: Path, attempt: int) -> Any:
    """torch's own description of a launch."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    config = plan.config
    port = plan.port or free_port(plan.address)
    rendezvous: dict[str, Any] = {"timeout": CONNECT_WITHIN_S}
    if config.rdzv_backend == "static":
        rendezvous["rank"] = config.machine_rank
    else:
        rendezvous.update(is_host=config.machine_rank == 0, join_timeout=CONNECT_WITHIN_S)
    host = f"[{plan.address}]" if ":" in plan.address else plan.address
    # nohup ignores SIGHUP, and so must this run.
    handled = [
        name
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN or name == "SIGTERM"
    ]
    logs = str(directory / "agent")
    if plan.watching.tee != "0":
        logs = plan.watching.log_dir or tempfile.mkdtemp(prefix="shardwise-logs-")
        print(f"shardwise launch: what the ranks print is in {logs} too", file=sys.stderr)
    arguments: dict[str, Any] = {}
    known = {entry.name for entry in fields(LaunchConfig)}
    if "signals_to_handle" in known:  # newer than torch 2.9
        arguments["signals_to_handle"] = ",".join(handled)
    if "shutdown_timeout" in known:
        arguments["shutdown_timeout"] = GRACE_S
    return LaunchConfig(
        min_nodes=config.num_machines,
        max_nodes=config.num_machines,
        nproc_per_node=plan.local_processes,
        run_id=f"shardwise-{plan.port}-{attempt}",
        role="rank",
        rdzv_backend=config.rdzv_backend,
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs=rendezvous,
        max_restarts=0,  # restarts are made by the launchers, which know of all machines
        monitor_interval=plan.watching.interval_s,
        # Machine 0 says how it is reached; its own idea of its name may mean nothing to the others.
        local_addr=plan.address if config.machine_rank == 0 else None,
        logs_specs=DefaultLogsSpecs(log_dir=logs, tee=Std.from_str(plan.watching.tee)),
        **arguments,
    )


def _continue_stopped(directory: Path) -> threading.Event:
    """Once a rank has failed, let stopped ones go on, which would hear no SIGTERM; until the event that it gives is set."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if not any(directory.glob("failure-*")):
                continue
            for path in directory.glob("pid-*"):
                found = process_fields(path.name[4:])
                if found is not None and found[0] == "T":
                    with contextlib.suppress(OSError):
                        os.kill(int(path.name[4:]), signal.SIGCONT)

    threading.Thread(target=watch, name="shardwise-stopped", daemon=True).start()
    return over


def end_sessions(directory: Path) -> None:
    """End what is left of the ranks and of the processes that they started (each rank leads a session of its own)."""
    leaders = {int(path.name[4:]) for path in directory.glob("pid-*")}
    deadline = time.monotonic() + 5
    while leaders and time.monotonic() < deadline:
        left = [pid for pid, session in _sessions() if session in leaders and pid != os.getpid()]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def _sessions() -> list[tuple[int, int]]:
    """(process id, session id) of every running process; [] where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        fields = process_fields(path.name)
        if fields is not None and fields[0] != "Z":
            found.append((int(path.name), int(fields[3])))
    return found
