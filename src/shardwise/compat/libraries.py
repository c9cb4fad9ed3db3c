"""What transformers and accelerate do by themselves where they find DeepSpeed, and should leave to shardwise: wrapped when they
are imported, before or after this.

    transformers.modeling_utils   from_pretrained and from_config under stage 3: by the loading of shardwise, in which each rank
                                  reads its own bytes, in place of transformers' own branch, which reads all on rank 0
    accelerate.state              the backend on a machine without GPUs, for which accelerate finds none and counts one process

The two private names of theirs that this needs, `_hf_deepspeed_config_weak_ref` and `_prepare_backend`, are looked for; where
a version has none, its own way stays: whole models on each rank, and GPUs alone.
"""

from __future__ import annotations

import functools
import logging
import sys
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
    "accelerate.state": _wrap_accelerate,
}
