"""The "optimizer" and "scheduler" sections of a DeepSpeed configuration, as objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import ConfigError
from . import deepspeed_schedules as schedules
from .deepspeed_optimizers import DeepSpeedCPUAdagrad, DeepSpeedCPUAdam, Lion

_OTHERS = {
    **dict.fromkeys(("lamb", "onebitlamb"), "it takes the norm of each whole weight"),
    **dict.fromkeys(("muon", "musgd", "muadam", "muadamw"), "it looks at whole matrices"),
    **dict.fromkeys(("onebitadam", "zerooneadam"), "it compresses what ranks send each other, with errors of its own"),
}


def make_optimizer(section: Mapping[str, Any], parameters: Any) -> Any:
    """The optimizer of a section {"type", "params"} over `parameters`, tensors or groups. Raises ConfigError."""
    name, settings = _read(section, "optimizer")
    if "max_grad_norm" in settings:
        raise ConfigError("optimizer.params.max_grad_norm: is not an optimizer's; write gradient_clipping.")
    if name.lower() in _OTHERS:
        raise ConfigError(
            f"optimizer.type: {name} cannot work on shards: {_OTHERS[name.lower()]}. Take AdamW, Adam, Lion, Adagrad, SGD or "
            "another elementwise one of torch.optim."
        )
    return _made(f"optimizer.params of {name}", lambda: _optimizer_class(name, settings)(parameters, **settings))


def _optimizer_class(name: str, settings: dict[str, Any]) -> Callable[..., Any]:
    kind = name.lower()
    if kind in ("adam", "adamw", "fusedadam", "cpuadam"):
        decoupled = settings.pop("adam_w_mode", True) or kind == "adamw"
        if settings.pop("torch_adam", False):
            return torch.optim.AdamW if decoupled else torch.optim.Adam
        settings["adamw_mode"] = decoupled
        return DeepSpeedCPUAdam
    if kind == "adagrad":
        return DeepSpeedCPUAdagrad
    if kind == "lion":
        return Lion
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(
            f"optimizer.type: {name} is unknown: take Adam, AdamW, Lion, Adagrad, or the name of a class of torch.optim."
        )
    return found


def make_scheduler(section: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """The schedule of a section {"type", "params"} over `optimizer`. Raises ConfigError."""
    name, settings = _read(section, "scheduler")
    if name in schedules.VALID_LR_SCHEDULES:
        kind = getattr(schedules, name)
    else:
        kind = getattr(torch.optim.lr_scheduler, name, None)
        if not isinstance(kind, type):
            raise ConfigError(
                f"scheduler.type: {name} is unknown: take {', '.join(schedules.VALID_LR_SCHEDULES)}, or the name of a class of "
                "torch.optim.lr_scheduler."
            )
    return _made(f"scheduler.params of {name}", lambda: kind(optimizer, **settings))


def _read(section: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    name, settings = section.get("type"), dict(section.get("params") or {})
    if not isinstance(name, str):
        raise ConfigError(f"{what}.type: is {name!r}, which is not a name.")
    for key, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if "auto" in [item for item in values if isinstance(item, str)]:
            raise ConfigError(
                f"{what}.params.{key}: is still 'auto'. Transformers' Trainer and accelerate fill it in, and a DummyOptim or "
                "DummyScheduler that has it; a script of its own writes a number."
            )
    return name, {k: tuple(v) if k == "betas" else v for k, v in settings.items()}


def _made(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
