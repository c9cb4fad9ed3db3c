"""Where Hugging Face code must know that a model is sharded: saving, and generating.

Their methods stay theirs. When the first transformers or peft model is prepared, methods of the libraries' classes are
wrapped; for a model that is not sharded the wrapper does nothing but call on.

    PeftModel.save_pretrained        full adapter tensors, written by rank 0 alone, also when every rank calls it
    PreTrainedModel.save_pretrained  the same for a whole model
    GenerationMixin.generate         ranks may stop at different lengths
    PeftModel's generate             with virtual tokens the embeddings stay gathered meanwhile

Nothing of theirs is imported here unless the user's model has imported it already.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .checkpoint.export import refuse_empty
from .checkpoint.stream import save_streamed
from .zero.sharded import ShardedModel, find_sharded

_READ_BY_PEFT = ("prompt_encoder.", ".modules_to_save.", ".token_adapter.")


def connect(model: nn.Module) -> None:
    """Wrap the methods of the libraries that `model` comes from. Once per process and class."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        _wrap(peft.PeftModel, "save_pretrained", _save_adapter)
        if "generate" in vars(type(model)):
            _wrap(type(model), "generate", _generate_with_adapter)
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        _wrap(transformers.PreTrainedModel, "save_pretrained", _save_model)
        _wrap(transformers.GenerationMixin, "generate", _generate)


def _wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(cls, name)
    if getattr(original, "_shardwise", False):
        return

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sharded = _holder(self)
        if sharded is None:
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


def _on_main(sharded: ShardedModel, kwargs: dict[str, Any], write: Callable[[], Any]) -> Any:
    """Run `write` on rank 0 (on every rank whose caller says it is a main process) and agree on how it went."""
    here = sharded.ranks.rank == 0 and kwargs.get("is_main_process", True)
    return sharded.ranks.together(lambda: write() if here else None)


def _save_adapter(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # PEFT reads some weights itself: a prompt encoder's output, the keys of modules that it saves whole.
    read_by_peft = [p for n, p in model.named_parameters() if any(part in n for part in _READ_BY_PEFT)]
    state = kwargs.pop("state_dict", None)
    with sharded.gathered(read_by_peft):
        if not isinstance(state, Mapping) or not state:
            # With the adapter PEFT may want the embeddings, which are frozen unless they were resized and trained.
            named = sharded.model.named_parameters(remove_duplicate=False)
            names = [n for n, _ in named if "embed" in n or "lm_head" in n]
            state = sharded.state_dict(trainable_only=True, names=names)

        def write() -> Any:
            refuse_empty(state)
            return original(*args, state_dict=state, **kwargs)

        return _on_main(sharded, kwargs, write)


def _save_model(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    state = kwargs.pop("state_dict", None)
    if not (isinstance(state, Mapping) and state) and _is_plain(model, args, kwargs):
        return _stream_model(sharded, model, **_named(("save_directory", "is_main_process"), args, kwargs))
    if not isinstance(state, Mapping) or not state:
        state = sharded.state_dict()
    if model is not sharded.model:
        prefix = next(name for name, module in sharded.model.named_modules() if module is model) + "."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return _on_main(sharded, kwargs, lambda: original(*args, state_dict=state, **kwargs))


def _is_plain(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether transformers would write the weights as they are: nothing quantized, converted, renamed or uploaded."""
    if len(args) > 2 or set(kwargs) - {"save_directory", "is_main_process", "max_shard_size", "safe_serialization"}:
        return False
    if not kwargs.get("safe_serialization", True) or getattr(model, "hf_quantizer", None) is not None:
        return False
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "_auto_class", None) is not None:
        return False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # before transformers 5 there are none
            return True
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return not conversions


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _stream_model(
    sharded: ShardedModel,
    model: Any,
    *,
    save_directory: Any,
    is_main_process: bool = True,
    max_shard_size: int | str = "50GB",
    safe_serialization: bool = True,
) -> None:
    """What `PreTrainedModel.save_pretrained` writes, with the weights unit by unit."""
    main = sharded.ranks.rank == 0 and is_main_process

    def write_configurations() -> None:
        os.makedirs(save_directory, exist_ok=True)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(save_directory)
        if model.can_generate():
            model.generation_config.save_pretrained(save_directory)

    sharded.ranks.together(lambda: write_configurations() if main else None)
    prefix = next(name for name, module in sharded.model.named_modules() if module is model)
    prefix = f"{prefix}." if prefix else ""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())

    def rename(name: str) -> str | None:
        short = name.removeprefix(prefix)
        return short if name.startswith(prefix) and short not in ignored else None

    save_streamed(sharded, save_directory, max_shard_size=max_shard_size, rename=rename, here=main)


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
    return sharded.generation(pinned)
