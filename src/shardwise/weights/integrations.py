"""Where Hugging Face code must know that a model is sharded: saving, and generating.

Their methods stay theirs. When the first transformers or peft model is prepared, methods of the libraries' classes are
wrapped; for a model that is not sharded the wrapper does nothing but call on.

    PeftModel.save_pretrained        full tensors, written by rank 0 alone, also when every rank calls it: `save_pretrained.py`
    PreTrainedModel.save_pretrained  the same for a whole model; and push_to_hub of both
    GenerationMixin.generate         ranks may stop at different lengths
    PeftModel's generate             with virtual tokens the embeddings stay gathered meanwhile

Nothing of theirs is imported here unless the user's model has imported it already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..ranks.activity import activity
from ..zero.sharded import ShardedModel, find_sharded
from ..zero.stand_ins import is_standing_in
from .save_pretrained import push_to_hub, save_pretrained


def connect(model: nn.Module) -> None:
    """Wrap the methods of the libraries that `model` comes from. Once per process and class."""
    peft: Any = sys.modules.get("peft")
    adapted = [] if peft is None else [m for m in model.modules() if isinstance(m, peft.PeftModel)]
    if adapted:
        _wrap(peft.PeftModel, "save_pretrained", save_pretrained)
        _wrap(peft.PeftModel, "push_to_hub", push_to_hub)
    for cls in {type(module) for module in adapted if "generate" in vars(type(module))}:
        _wrap(cls, "generate", _generate_with_adapter)
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        _wrap(transformers.PreTrainedModel, "save_pretrained", save_pretrained)
        _wrap(transformers.PreTrainedModel, "push_to_hub", push_to_hub)
        _wrap(transformers.GenerationMixin, "generate", _generate)


def _wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(cls, name)
    if getattr(original, "_shardwise", False):
        return

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sharded = _holder(self)
        if sharded is None or is_standing_in(sharded.model):
            return original(self, *args, **kwargs)
        return around(sharded, functools.partial(original, self), self, args, kwargs)

    method._shardwise = True  # type: ignore[attr-defined]
    setattr(cls, name, method)


def _holder(model: nn.Module) -> ShardedModel | None:
    """The ShardedModel of `model`, or of the model around it: PEFT calls generate on the model inside."""
    found = find_sharded(model)
    if found is not None:
        return found
    # Its first weight tells quickly that a model has nothing to do with a prepared one: walking over modules takes 1 ms.
    first = next(model.parameters(), None)
    return next(
        (
            s
            for s in ShardedModel.all()
            if (first is None or s.holds(first)) and any(module is model for module in s.model.modules())
        ),
        None,
    )


def _generate(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if sharded.ranks.world_size == 1 and kwargs.get("synced_gpus"):
        # transformers would ask a process group that a run of one rank does not have.
        kwargs["synced_gpus"] = False
    with generation(sharded):
        return original(*args, **kwargs)


def _generate_with_adapter(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # Around what PEFT does before it calls the model's own generate.
    with generation(sharded):
        return original(*args, **kwargs)


def generation(sharded: ShardedModel) -> AbstractContextManager[None]:
    """`ShardedModel.generation`, with what PEFT reads outside of forwards kept gathered.

    With virtual tokens it embeds the prompt by itself, before and between the model's forwards, where no unit is asked for.
    """
    pinned: list[nn.Parameter] = []
    peft = sys.modules.get("peft")
    if peft is not None:
        for model in sharded.model.modules():
            if isinstance(model, peft.PeftModel) and any(c.is_prompt_learning for c in model.peft_config.values()):
                for part in (getattr(model, "prompt_encoder", None), getattr(model, "word_embeddings", None)):
                    pinned += [] if part is None else part.parameters()
    activity.evaluates()
    return sharded.generation(pinned)
