"""What does not change while a run trains: the contents of `run.json`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from ..version import __version__
from .memory import Ledger
from .work import Work, peak_of

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Of shardwise, Python and the installed packages that a run may depend on."""
    found = {"shardwise": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_for(device: torch.device, dtype: torch.dtype, given: float | None) -> tuple[float | None, str]:
    """Operations a second of the rank's device, and where that is from, or why it is None. given: by the script."""
    if given is not None:
        return given, "peak_flops="
    if device.type != "cuda":
        return None, f"the device is a {device.type.upper()}, whose peak is not known; give peak_flops="
    return peak_of(name_of(device), dtype, tf32=torch.backends.cuda.matmul.allow_tf32)


def facts(
    *,
    device: torch.device,
    ranks: int,
    work: Work,
    peak: tuple[float | None, str],
    ledger: Ledger,
    settings: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """What `run.json` holds.

    peak:     as `peak_for` gives it.
    settings: of the run, by name. more: what else whoever watches knows.
    """
    return {
        "command": sys.argv,
        "versions": versions(),
        "ranks": ranks,
        "device": name_of(device),
        "weights": work.weights,
        "multiplied_weights": {"trained": work.trained, "frozen": work.frozen},
        "at_rest_bytes": {f"{role}/{tier}": count for (role, tier), count in sorted(ledger.items())},
        "mfu": {"operations_per_token": work.formula(), "peak_flops": peak[0], "peak": peak[1]},
        "settings": dict(settings),
        **more,
    }
