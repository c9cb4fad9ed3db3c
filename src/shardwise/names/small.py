"""Small functions of accelerate's `utils.other`, `utils.tqdm` and `utils.launch` that have no better home."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import platform
import re
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ..config.check import checked
from ..config.yaml_file import default_file, write_yaml

logger = logging.getLogger("shardwise")

_OLDEST_KERNEL = (5, 5, 0)


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """A progress bar that only the first process of each machine shows. main_process_only: False shows one on each.

    Raises ImportError without the package tqdm, ValueError for a bool in the place of what is iterated.
    """
    from ..run.process import PartialState

    if args and isinstance(args[0], bool):
        raise ValueError(
            "tqdm: a bool was given first. Give what to iterate first, and main_process_only as a keyword."
        )
    if main_process_only and not kwargs.get("disable"):
        kwargs["disable"] = PartialState().local_process_index != 0
    return importlib.import_module("tqdm.auto").tqdm(*args, **kwargs)


def get_pretty_name(obj: Any) -> str:
    """The qualified name of a function or class, or of the class of anything else."""
    for item in (obj, type(obj)):
        name = getattr(item, "__qualname__", None) or getattr(item, "__name__", None)
        if name is not None:
            return str(name)
    return str(obj)


def merge_dicts(source: MutableMapping[Any, Any], destination: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    """Put `source` into `destination`, dictionaries within dictionaries too, and give that back."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def recursive_getattr(obj: Any, attr: str) -> Any:
    """`recursive_getattr(x, "a.b")` is x.a.b."""
    return functools.reduce(getattr, attr.split("."), obj)


def convert_bytes(size: float) -> str:
    """Bytes as a text, in the largest unit that gives 1 or more: "1.5 KB"."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024.0:
            return f"{round(size, 2)} {unit}"
        size /= 1024.0
    return f"{round(size, 2)} PB"


def is_port_in_use(port: int | str | None = None) -> bool:
    """Whether somebody listens on this port of this machine; without one, on 29500."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
        return asking.connect_ex(("localhost", int(29500 if port is None else port))) == 0


def get_free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
        asking.bind(("", 0))
        return int(asking.getsockname()[1])


def check_os_kernel() -> None:
    """Warn if this is a Linux older than 5.5, on which processes have been seen to hang."""
    info = platform.uname()
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", info.release)
    if info.system != "Linux" or found is None:
        return
    if tuple(int(part or 0) for part in found.groups()) < _OLDEST_KERNEL:
        # One text, for scripts that read the record's own message.
        logger.warning(f"This kernel is Linux {info.release}: before 5.5.0 processes may hang. Use a newer kernel.")


def convert_dict_to_env_variables(current_env: dict[str, str]) -> list[str]:
    """Lines "NAME=value\\n" for a file of variables, without those that are empty or hold `;<>`, a blank or a newline."""
    lines = []
    for name, value in current_env.items():
        if name and value and not set(name + value) & set(";<> \n"):
            lines.append(f"{name}={value}\n")
        else:
            logger.warning("%s=%s is left out: it is empty, or has a character that may not be there.", name, value)
    return lines


def get_current_device_type() -> tuple[str, str]:
    """("cuda", "MULTI_GPU") where torch sees a GPU, else ("cpu", "MULTI_CPU")."""
    import torch

    return ("cuda", "MULTI_GPU") if torch.cuda.is_available() else ("cpu", "MULTI_CPU")


def write_basic_config(mixed_precision: str = "no", save_location: str | os.PathLike[str] | None = None) -> Path | bool:
    """Write a configuration for all devices of this machine, for `shardwise launch --config_file`; gives its path.

    save_location: default: where `shardwise launch` looks by itself. A file that is there stays, and False is given back.
    Raises ConfigError for a mixed_precision that is not "no", "fp16" or "bf16".
    """
    import torch

    path = default_file() if save_location is None else Path(save_location)
    if path.exists():
        print(f"{path} is there already and is not changed. Run `shardwise config`, or give another save_location.")
        return False
    count = torch.cuda.device_count()
    values = {
        "compute_environment": "LOCAL_MACHINE",
        "mixed_precision": mixed_precision.lower(),
        "num_processes": count or 1,
        "use_cpu": not count,
        "distributed_type": "MULTI_GPU" if count > 1 else "NO",
    }
    write_yaml(checked(values), path)
    return path
