"""`shardwise env`: what a bug report needs, without importing any of the packages that it reports on."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from ..config.machine import (
    environment_value,
    gpu_names,
    host_memory_bytes,
    memory_limit_bytes,
    physical_gpus,
    usable_cores,
    visible_gpus,
)
from ..config.yaml_file import default_file
from ..errors import ConfigError
from ..files.documents import SETTINGS_NBYTES, read_text
from ..version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "numpy", "pydantic", "typer")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def run_env(config_file: str | None = None) -> None:
    """Print it, with the YAML file (the user's default one if None). ConfigError if a named file is missing."""
    text: str | None = None
    path = Path(config_file) if config_file is not None else default_file()
    if config_file is not None or path.is_file():
        text = read_text(path, ConfigError, SETTINGS_NBYTES)
    print("\n".join(describe_environment()))
    print(f"\nconfiguration: {path}" + ("" if text is not None else " (there is none)"))
    if text is not None:
        print("\n".join(f"  {line}" for line in text.rstrip("\n").splitlines()))


def describe_environment() -> list[str]:
    """One `name: value` a line."""
    rows = {
        "shardwise": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "cpu cores": f"{usable_cores()} usable of {os.cpu_count()}",
        "memory": _memory(),
        "gpus": _gpus(),
        **{name: value for name in VARIABLES if (value := environment_value(name)) is not None},
    }
    width = max(len(name) for name in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    total, limit = host_memory_bytes(), memory_limit_bytes()
    text = "unknown" if total is None else f"{total / 2**30:.1f} GiB"
    return text if limit is None else f"{text}, of which this container may use {limit / 2**30:.1f} GiB"


def _gpus() -> str:
    present = physical_gpus()
    if not present:
        return "none" if present == 0 else "unknown without torch"
    names = "; ".join(name.split(" (UUID")[0] for name in gpu_names())
    return f"{present}, {visible_gpus()} visible" + (f": {names}" if names else "")
