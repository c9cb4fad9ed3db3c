"""Ranks that are started from within a process: of a notebook, or for a test on a CPU.

    notebook_launcher(train, (model, data), num_processes=2)      the arguments need no file and no pickle: workers are forked

Workers are forked from this process, under torch's elastic agent, so they have everything that the notebook has made. For that
reason nothing may have been begun here that a fork cannot take over: CUDA, or a run that this process has joined. What a worker
raises is raised here with the worker's own traceback, and no worker outlives the call. One process runs in place.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..config.check import from_environment, merged
from ..config.machine import environment_value, export, exported, visible_gpus
from ..errors import ConfigError, LaunchError
from ..files.documents import read_json
from ..ranks.unfinished import settle
from .joined import Joined, leave_run

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
# What torch says in a worker that was forked from a process with CUDA.
_NOT_AFTER_FORK = "in forked subprocess"


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: dict[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Call `function(*args)` on every rank of a run, and return when all have ended. What it returns is dropped.

    function:        makes its Accelerator itself, and touches the GPU only inside.
    num_processes:   on this machine; None takes one for each GPU, or one. With one, on one machine, it is called in place.
    mixed_precision: "no", "fp16" or "bf16", for Accelerators that say nothing else.
    use_port:        where the ranks meet on `master_addr`, machine 0; 0 takes a free port, for one machine.
    node_rank:       which of the `num_nodes` machines this is, each of which calls this function.
    rdzv_...:        torch's rendezvous, "static" or "c10d" for instance.
    max_restarts:    how often all workers are started again. monitor_interval: seconds between two looks at them.
    log_line_prefix_template: torch's, of its logs.
    Raises ConfigError for arguments that cannot be; LaunchError if this process cannot be forked, or a worker failed, with its
    traceback; KeyboardInterrupt as usual, when the workers have ended.
    """
    gpus = visible_gpus()
    config = merged(from_environment(), mixed_precision=str(getattr(mixed_precision, "value", mixed_precision)).lower())
    count = num_processes if num_processes is not None else 1 if config.use_cpu else gpus or 1
    _check_counts(count, node_rank, num_nodes, None if config.use_cpu else gpus)
    if count == 1 and num_nodes == 1:
        with exported(config.to_environment()):
            function(*args)
        return
    if int(use_port) == 0 and num_nodes > 1:
        raise ConfigError("notebook_launcher: use_port is 0, a free port; several machines must all know it. Name one.")
    endpoint = rdzv_endpoint or f"{master_addr}:{int(use_port) or _free_port(master_addr)}"
    place = {"rank": node_rank} if rdzv_backend == "static" else {"is_host": node_rank == 0}
    _launch(
        "notebook_launcher",
        _Worker(function, tuple(args), config.to_environment()),
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=count,
        run_id=rdzv_id,
        rdzv_backend=rdzv_backend,
        rdzv_endpoint=endpoint,
        rdzv_configs={**place, **(rdzv_conf or {})},
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        log_line_prefix_template=log_line_prefix_template,
        local_addr=master_addr if node_rank == 0 else None,
    )


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Call `function(*args)` on `num_processes` ranks of this machine's CPU, for tests. Errors: as of `notebook_launcher`."""
    _check_counts(num_processes, 0, 1, None)
    variables = merged(from_environment(), cpu=True, mixed_precision="no").to_environment()
    if sys.platform == "linux" and environment_value("GLOO_SOCKET_IFNAME") is None:
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may resolve to nothing that can be reached
    _launch(
        "debug_launcher",
        _Worker(function, tuple(args), variables),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="debug_launcher",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{_free_port('127.0.0.1')}",
        rdzv_configs={"rank": 0},
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )


def _check_counts(count: Any, node_rank: int, num_nodes: int, gpus: int | None) -> None:
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"num_processes is {count!r}; it is a whole number from 1 on.")
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(f"node_rank is {node_rank}; with num_nodes {num_nodes} it is between 0 and {num_nodes - 1}.")
    if gpus and count > gpus:
        raise ConfigError(
            f"num_processes is {count}, but this process sees {gpus} GPU(s). Start at most one process for each, or use "
            "debug_launcher, which takes the CPU."
        )


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


# In the process that starts them.


def _launch(verb: str, worker: _Worker, **settings: Any) -> None:
    """Run the workers to their end, leaving this process's environment, signals and loggers as they were."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_forkable(verb)
    worker.directory = tempfile.mkdtemp(prefix="shardwise-")
    known = {entry.name for entry in fields(LaunchConfig)}
    given = {name: value for name, value in settings.items() if name in known or value is not None}
    problem: BaseException | None = None
    stopped: int | None = None
    try:
        with ExitStack() as stack:
            for kept in (exported({}), _own_signals(), _quiet_agent()):
                stack.enter_context(kept)
            logs = DefaultLogsSpecs(log_dir=str(Path(worker.directory) / "agent"))
            elastic_launch(LaunchConfig(start_method="fork", logs_specs=logs, **given), worker.run)()
    except ChildFailedError as error:
        problem = _failure(verb, worker.directory, error.failures)
        if problem is None:
            stopped = signal.SIGINT
    except SignalException as error:
        stopped = error.sigval
    except (OSError, RuntimeError) as error:
        problem = LaunchError(f"{verb}: the processes could not be started: {' '.join(str(error).split())[:300]}")
        problem.__cause__ = error
    finally:
        shutil.rmtree(worker.directory, ignore_errors=True)
    if stopped is not None:
        signal.raise_signal(stopped)
        raise KeyboardInterrupt  # where this process ignores the signal
    if problem is not None:
        raise problem


def _check_forkable(verb: str) -> None:
    """LaunchError for what a forked worker could not use."""
    if sys.platform == "win32":
        raise LaunchError(
            f"{verb} forks its workers, which Windows cannot. Write the script and use `shardwise launch`."
        )
    if Joined.ranks is not None:
        raise LaunchError(
            f"{verb}: this process has an Accelerator, or a PartialState, and its workers cannot take that over. Make it "
            "inside of the function; restart the kernel, or call its end_training() before."
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found = _on_cuda(vars(sys.modules["__main__"]))
        who = f" (by {', '.join(found)})" if found else ""
        raise LaunchError(
            f"{verb}: CUDA is initialised in this process{who}, and cannot be used in workers that are forked from it. Restart "
            "the kernel, and touch the GPU only inside of the function."
        )


def _on_cuda(names: Mapping[str, Any]) -> list[str]:
    """Those of a notebook's own names that are on a GPU, and libraries that initialise it when they are imported."""
    found = []
    for name, value in list(names.items()):
        if name.startswith("_"):
            continue
        tensors = [value] if isinstance(value, torch.Tensor) else []
        if isinstance(value, torch.nn.Module):
            tensors = [*value.parameters(), *value.buffers()]
        if any(tensor.is_cuda for tensor in tensors):
            found.append(name)
    return [*found, *(f"the import of {name}" for name in ("bitsandbytes",) if name in sys.modules)]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Inside, the agent may install handlers, which it leaves behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {
        number: signal.getsignal(number) for name in _SIGNALS if (number := getattr(signal, name, None)) is not None
    }
    try:
        yield
    finally:
        for number, handler in held.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Inside, the agent's own log lines stay off, unless the user asked torch for logs: what failed is raised."""
    if environment_value("TORCH_LOGS") is not None or environment_value("LOGLEVEL") is not None:
        yield
        return
    found = [
        logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch.distr")
    ]
    held = [(logger, logger.level) for logger in found]
    try:
        for logger in found:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in held:
            logger.setLevel(level)


def _failure(verb: str, directory: str, failures: Mapping[int, Any]) -> LaunchError | None:
    """What the workers' failures come to, the cause first; None if they have only been interrupted."""
    records = []
    for path in Path(directory).glob("failure-*"):
        with suppress(LaunchError):
            records.append(read_json(path, LaunchError))
    if records:
        # A rank that says that another one failed is an echo of it.
        cause = min(records, key=lambda said: (said["kind"] == "RankError", said["time_ns"]))
        hint = ""
        if _NOT_AFTER_FORK in cause["traceback"]:
            hint = (
                "\nSomething had called CUDA in this process before the workers were forked. Restart the kernel, and touch the "
                "GPU only inside of the function."
            )
        return LaunchError(f"{verb}: rank {cause['rank']} failed:\n{cause['traceback'].rstrip()}{hint}")
    ended = {rank: failure.exitcode for rank, failure in failures.items()}
    if all(code == -signal.SIGINT for code in ended.values()):
        return None
    said = []
    for rank, code in sorted(ended.items()):
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said.append(f"rank {rank} {how}, without a Python exception")
    killed = any(code == -signal.SIGKILL for code in ended.values())
    why = " SIGKILL comes from a person, or from the kernel when host memory runs out." if killed else ""
    return LaunchError(f"{verb}: {'; '.join(said)}.{why}")


# In a worker.


@dataclass
class _Worker:
    """What each worker calls. variables: the environment that it has besides its rank. directory: for records of failures."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    variables: dict[str, str]
    directory: str = ""

    def run(self) -> None:
        # The agent's handlers are for the process that starts workers; a worker whose parent is gone gets a SIGINT.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # The parent's threads are not here: libgomp would wait for them in the first parallel region.
        torch.set_num_threads(1)
        export(self.variables)
        try:
            try:
                self.function(*self.args)
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
            settle()  # what a process does at its end, a forked worker does not
            leave_run()
        except BaseException as error:
            self._record(error)
            raise

    def _record(self, error: BaseException) -> None:
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        rank = int(environment_value("RANK") or 0)
        said = {
            "rank": rank,
            "kind": type(error).__name__,
            "time_ns": time.time_ns(),
            "traceback": "".join(traceback.format_exception(type(error), error, trace)),
        }
        with suppress(OSError):
            (Path(self.directory) / f"failure-{rank}").write_text(json.dumps(said), encoding="utf-8")
