"""What `prepare` can know to be wrong before the ranks wait for each other. What they must share: `front/object_facts.py`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..data.prepare import PreparedLoader
from ..errors import OptimizerError, PrepareError


def check_model(model: nn.Module) -> None:
    for module in model.modules():
        spread = getattr(module, "hf_device_map", None)
        if spread and len({str(device) for device in spread.values()}) > 1:
            raise PrepareError(
                f"this {type(model).__name__} was loaded with a device_map over {sorted(map(str, spread.values()))}. "
                "Load it without device_map: zero_stage 3 divides it over the ranks."
            )

    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise PrepareError(
            f"{lazy} of this {type(model).__name__} has no shape yet: its module is lazy. Run one batch through the model "
            "before `prepare`, and make the optimizer after that."
        )


def check_other(item: Any) -> None:
    """Raise OptimizerError for what looks like an optimizer and is none of torch's: it would pass through, and step nothing."""
    groups = getattr(item, "param_groups", None)
    if isinstance(item, (Optimizer, nn.Module, type)) or not isinstance(groups, (list, tuple)):
        return
    if any(isinstance(group, dict) and "params" in group for group in groups):
        name = type(item).__name__
        held = getattr(item, "__dict__", {}).items()
        inside = [f"its .{n}, a {type(v).__name__}" for n, v in held if isinstance(v, Optimizer)]
        raise OptimizerError(
            f"this {name} has parameter groups, but is no torch.optim.Optimizer: shardwise cannot step it. Give prepare the "
            f"optimizer that it wraps{f' ({inside[0]})' if inside else ''}, or make {name} a subclass of torch.optim.Optimizer."
        )


def check_optimizer(optimizer: Optimizer, known: set[int], any_model: bool) -> None:
    if not any_model:
        raise PrepareError(
            f"the {type(optimizer).__name__} is prepared before any model. Prepare its model first, or "
            "together with it."
        )
    for number, group in enumerate(optimizer.param_groups):
        strangers = sum(id(parameter) not in known for parameter in group["params"])
        if strangers:
            raise OptimizerError(
                f"{strangers} of the {len(group['params'])} parameters in group {number} of the "
                f"{type(optimizer).__name__} belong to no prepared model. Build the optimizer from the "
                "parameters of the model that is prepared (after get_peft_model, not before)."
            )


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    if isinstance(loader, PreparedLoader):
        return None
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None
