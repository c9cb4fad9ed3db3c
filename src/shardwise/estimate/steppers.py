"""Which optimizers step a model that is not there: made over its parameters' shapes, as a script would make them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .keeping import Stepper
from .meta_model import heads_of
from .named import Named, named


def steppers_of(model: nn.Module, wanted: Sequence[Named] | None = None) -> list[Stepper]:
    """The optimizers of what `model` trains; AdamW where none are named. Two: the first steps matrices, the second the rest.

    Matrices are those that Muon's users give it: of two dimensions, and neither of an embedding nor of the head.
    Raises ConfigError where one cannot be made, or has nothing to step.
    """
    wanted = named("AdamW") if wanted is None else wanted
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not own:
        return []
    if len(wanted) == 1:
        return [Stepper(wanted[0].made, own, wanted[0].name)]
    matrices, rest = _apart(model, own)
    first, second = wanted
    if not matrices:
        raise ConfigError(
            f"--optimizer: {first.name} has nothing to step: no matrix but embeddings and the head is trained"
        )
    found = [Stepper(first.made, matrices, first.name, f"{len(matrices):,} matrices")]
    return found + ([Stepper(second.made, rest, second.name, f"{len(rest):,} others")] if rest else [])


def uncompiled(wanted: Sequence[Named]) -> AbstractContextManager[Any]:
    """Inside, optimizers that compile their step (torchao's) run as they are written: a trial is a few steps.

    Not for torch's own, which do not: to ask takes seconds.
    """
    if all(one.module == "torch.optim" for one in wanted):
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def _apart(model: nn.Module, own: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding)] + heads_of(model)
    others = {id(parameter) for module in outer for parameter in module.parameters(recurse=False)}
    matrices = [p for p in own if p.ndim == 2 and id(p) not in others]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in own if id(p) not in chosen]
