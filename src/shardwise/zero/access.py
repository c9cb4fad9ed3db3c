"""Reading and writing weights and gradients of prepared models, for scripts: `shardwise.gathered`, `shardwise.gradient`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import PrepareError
from ..ranks.ranks import Ranks
from .guard import unasked
from .hooks import in_backward
from .sharded import ShardedModel, find_sharded
from .shown import ShownGradient


@contextmanager
def gathered(
    what: nn.Module | Parameter | Sequence[Parameter],
    parameters: Sequence[Parameter] | None = None,
    *,
    modify: bool = False,
) -> Iterator[None]:
    """`ShardedModel.gathered` for what belongs to prepared models; does nothing for anything else.

    what: a prepared model, a module inside one, a parameter, or several. parameters: only these of a model.
    Raises PrepareError for weights that have no memory yet.
    """
    if isinstance(what, nn.Module):
        sharded = find_sharded(what)
        wanted = parameters if sharded is not None or parameters is not None else list(what.parameters())
    else:
        sharded, wanted = None, [what] if isinstance(what, Tensor) else list(what)
    without = [parameter for parameter in wanted or () if parameter.is_meta]
    if without:
        raise PrepareError(
            f"gathered: {len(without)} of these parameters, the first of shape {tuple(without[0].shape)}, have no memory yet. "
            "Prepare their model first."
        )
    with ExitStack() as stack:
        if sharded is not None:
            stack.enter_context(sharded.gathered(wanted, modify=modify))
        else:
            ids = {id(parameter) for parameter in wanted or ()}
            for owner in ShardedModel.all():
                own = [parameter for parameter in owner.model.parameters() if id(parameter) in ids]
                if own:
                    stack.enter_context(owner.gathered(own, modify=modify))
        yield


def gradient(parameter: Parameter, *, part: bool = False) -> Tensor | None:
    """The gradient of a prepared parameter since it was last dropped, as a plain tensor; None if it has none.

    part: this rank's part of it, flat and perhaps empty, without communication. False: all of it, in the parameter's shape,
          which is collective where gradients are sharded (zero_stage 1 to 3): call it on every rank.
    It is averaged over the ranks (while micro-batches are accumulated at zero_stage 0 and 1: this rank's own sum), in fp32, and
    carries fp16's loss scale until `accelerator.unscale_gradients()`. What is written into it is what the step uses. Of a
    parameter that is not prepared, it is `parameter.grad`.
    """
    grad = _gradient_of(parameter)
    if part and grad is not None and not isinstance(grad, ShownGradient) and not in_backward():
        for owner in ShardedModel.all():  # a tensor that the script has assigned, the same on all ranks, becomes parts
            if any(parameter is member for trained in owner.trained() for member in trained.parameters):
                owner.look_at_gradients()
                grad = _gradient_of(parameter)
    if not isinstance(grad, ShownGradient):
        return grad if grad is None or not part else grad.view(-1)
    return grad.part() if part else grad.whole()


def _gradient_of(parameter: Parameter) -> Tensor | None:
    with unasked():
        return parameter.grad


def prepared_as(model: nn.Module, verb: str, ranks: Ranks) -> ShardedModel:
    """The ShardedModel that `verb` needs; PrepareError where there is none, an error of one rank on every rank. Collective."""

    def found() -> ShardedModel:
        sharded = find_sharded(model)
        if sharded is None:
            raise PrepareError(f"{verb}: this {type(model).__name__} is not prepared. Pass it to `prepare` first.")
        return sharded

    return ranks.together(found)
