"""What this rank can find wrong by itself with a model and its plan, before any collective."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import PrepareError
from .quantised import refuse_other_kinds
from .sources import Sources


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
        if parameter.is_inference():
            raise PrepareError(
                f"{name} was made inside torch.inference_mode(), and torch never trains or watches such a tensor. Build the "
                "model outside of it, or under torch.no_grad()."
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise PrepareError(
                f"{name} is trainable but its dtype is {parameter.dtype}. Freeze it: requires_grad_(False)."
            )
