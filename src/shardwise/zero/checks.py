"""What this rank can find wrong by itself with a model and its plan, before any collective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import PrepareError, StoreError
from ..plan.plan import Plan, Tier
from .engine import Kind
from .quantised import refuse_other_kinds
from .sources import Sources


def paths_of(plan: Plan, given: Mapping[Kind, str]) -> dict[Kind, str]:
    """The directories that the plan needs. Raises StoreError if one is missing."""
    found: dict[Kind, str] = {}
    needs: dict[Kind, bool] = {
        "param": Tier.NVME in (plan.frozen.tier, plan.parameter.tier),
        "optimizer": plan.optimizer.tier is Tier.NVME,
    }
    for kind, needed in needs.items():
        if needed and kind not in given:
            raise StoreError(f"{kind} rests on nvme, but no directory is given. Set offload_{kind}_nvme_path.")
        if needed:
            found[kind] = given[kind]
    return found


def check_model(model: nn.Module, prepared: Iterable[nn.Module], sources: Sources) -> None:
    """Raise PrepareError for a model that cannot be sharded. prepared: the models that are."""
    if not isinstance(model, nn.Module):
        raise PrepareError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    for other in prepared:
        if other is model or any(m is model for m in other.modules()) or any(m is other for m in model.modules()):
            which = "this model" if other is model else f"a part of it, or a model around it ({type(other).__name__}),"
            raise PrepareError(f"{type(model).__name__}: {which} has been prepared already. Prepare each model once.")
    refuse_other_kinds(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and id(parameter) not in sources:
            raise PrepareError(
                f"{name} is on the meta device: it has no values. Load or initialise the model before prepare."
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise PrepareError(
                f"{name} is trainable but its dtype is {parameter.dtype}. Freeze it: requires_grad_(False)."
            )
