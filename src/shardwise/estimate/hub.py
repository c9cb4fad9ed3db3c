"""Where a model's configuration may come from: a path of this machine, or the hub. Asked before torch is imported."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..config.machine import environment_value
from ..errors import ConfigError

_ANSWERS_WITHIN_S = 3.0


def check_path(name: str) -> None:
    """Raise ConfigError if `name` can only be a path, and nothing is there."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"{name}: there is no such file or directory")


def unreachable() -> str | None:
    """Why the hub gives no file, as the end of a sentence; None if it may.

    huggingface_hub would find out too, after five attempts in half a minute, with two lines for each of them. Where a proxy
    stands between, or it was told to be offline, it is left to it.
    """
    offline = [environment_value(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    if any(value not in (None, "", "0") for value in offline) or getproxies():
        return None
    address = urlsplit(environment_value("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), _ANSWERS_WITHIN_S).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached from here ({error.strerror or error})"
    return None
