"""What transformers and accelerate do by themselves where they find DeepSpeed, and should leave to shardwise: wrapped when they
are imported, before or after this.

    transformers.modeling_utils   from_pretrained and from_config under stage 3: by the loading of shardwise, in which each rank
                                  reads its own bytes, in place of transformers' own branch, which reads all on rank 0
    transformers.trainer          an optimizer and a schedule that a script gives to its Trainer, and that transformers drops
                                  without a word where it finds DeepSpeed: they are kept, as without it
    accelerate.state              the backend on a machine without GPUs, for which accelerate finds none and counts one process

The names of theirs that this needs and that are not public, `_hf_deepspeed_config_weak_ref`, `_prepare_backend` and
`deepspeed_init`, are looked for; where a version has none, its own way stays: whole models on each rank, GPUs alone, and its
own optimizer.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..config.environment import RankEnvironment
from ..config.foreign import ModuleWatch

logger = logging.getLogger("shardwise")

_said: set[str] = set()


def is_first_rank() -> bool:
    return RankEnvironment.read().rank == 0


def say_once(text: str) -> None:
    """One line on rank 0, through the logger of shardwise."""
    if text not in _said:
        _said.add(text)
        if is_first_rank():
            logger.warning(text)


def watch() -> None:
    """Wrap the modules of `_WRAPPERS` that have been imported, and those to come."""
    ModuleWatch(_WRAPPERS).begin(1)


def _wrap_transformers(module: ModuleType) -> None:
    for name in ("from_pretrained", "_from_config"):
        kept = vars(module.PreTrainedModel).get(name)
        if isinstance(kept, classmethod):
            setattr(module.PreTrainedModel, name, classmethod(_built_by_shardwise(kept.__func__, module)))


def _built_by_shardwise(original: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        theirs: Any = sys.modules.get("transformers.integrations.deepspeed")
        if theirs is None or not theirs.is_deepspeed_zero3_enabled() or kwargs.get("quantization_config") is not None:
            return original(cls, *args, **kwargs)
        from ..building.loading import building

        with _hidden(theirs, module), building():
            return original(cls, *args, **kwargs)

    return build


@contextmanager
def _hidden(theirs: Any, module: Any) -> Iterator[None]:
    """Inside, transformers does not know of stage 3: neither from its configuration, nor from the answer that programs give in
    the place of its own question in either module, as axolotl does."""
    kept = theirs._hf_deepspeed_config_weak_ref, theirs.is_deepspeed_zero3_enabled, module.is_deepspeed_zero3_enabled
    theirs._hf_deepspeed_config_weak_ref = None
    theirs.is_deepspeed_zero3_enabled = module.is_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        theirs._hf_deepspeed_config_weak_ref, theirs.is_deepspeed_zero3_enabled, module.is_deepspeed_zero3_enabled = (
            kept
        )


def _wrap_trainer(module: ModuleType) -> None:
    original = getattr(module, "deepspeed_init", None)
    if original is None:
        return
    begun: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(original)
    def deepspeed_init(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inference"):
            return original(trainer, *args, **kwargs)
        # A later `train` finds the optimizer that this one has left, prepared: it makes a new one, as transformers does.
        optimizer = None if trainer in begun else trainer.optimizer
        scheduler = trainer.lr_scheduler
        begun.add(trainer)
        made = original(trainer, *args, **kwargs)
        if optimizer is None:
            return made
        if type(made[0]).__name__ == "DummyOptim":
            say_once(
                "the Trainer was given an optimizer, and its DeepSpeed configuration describes another: that one is trained "
                "with. Take the `optimizer` section out of the configuration to train with the Trainer's."
            )
            return made
        return optimizer, made[1] if scheduler is None else scheduler

    module.deepspeed_init = deepspeed_init  # type: ignore[attr-defined]


def _wrap_accelerate(module: ModuleType) -> None:
    original = getattr(module.PartialState, "_prepare_backend", None)
    if original is None:
        return

    @functools.wraps(original)
    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        backend, kind = original(self, *args, **kwargs)
        place = RankEnvironment.read()
        if backend is None and place.launched and not torch.cuda.is_available():
            backend = "gloo"
        return backend, kind

    module.PartialState._prepare_backend = prepare_backend


_WRAPPERS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _wrap_transformers,
    "transformers.trainer": _wrap_trainer,
    "accelerate.state": _wrap_accelerate,
}
