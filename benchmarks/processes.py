"""A benchmark's run as processes of its own: started, kept within a limit, and what it said where it failed. No torch."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent


def start(
    command: list[str],
    log: Path,
    seconds: float,
    *,
    use_cpu: bool,
    extensions: Path,
    more: Mapping[str, str] | None = None,
) -> str | None:
    """Run a command to its end or its limit, with its output in `log`. None, or what went wrong.

    seconds: the limit. extensions: where DeepSpeed keeps what it compiles. more: variables beside those that all runs have;
    `BENCHMARK_STARTED` is the time at which the command started.
    """
    path = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "BENCHMARK_STARTED": str(time.time()),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(more or {}),
    }
    if use_cpu:
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.setdefault("DS_ACCELERATOR", "cpu")
    seconds = max(1.0, seconds)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if code == 0:
        return None
    reason = f"exit code {code}" if code is not None else f"stopped after {seconds:.0f} s"
    return f"{reason}: {last_words(log.read_text(errors='replace'))}"


def _end(process: subprocess.Popen[bytes]) -> None:
    # torchrun's workers are sessions of their own: ending torchrun alone could leave them on the GPUs.
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def last_words(text: str) -> str:
    """Of a program's output: its last error, or else its last lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if re.search(r"^(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b", line) and "ChildFailed" not in line
    ]
    return (errors or [" | ".join(lines[-3:])])[-1][:400]
