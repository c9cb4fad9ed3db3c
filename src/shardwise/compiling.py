"""Regional compilation: torch.compile on each repeated block, under the engine's hooks.

A module's call runs its hooks around its `forward`. So it is `forward` that is compiled, and the engine's hooks, which gather
and release, stay outside of the compiled region: the graph holds arithmetic only, and takes the weights as inputs.

    block(x)  ->  hook: gather  ->  forward, compiled: the checkpointing of transformers, attention, MLP  ->  hook: release

Because the weights are inputs, blocks of one class and one structure share one compiled artefact: a model of 32 blocks is
compiled once. What a graph cannot hold stays eager: a forward that records no gradients (generation, whose shapes change at
every token; evaluation), and one that continues from keys and values in a cache (prefix tuning). An empty cache, which models
of transformers make in training too unless `use_cache` is off, is kept from the block, as their own checkpointing does.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from .config.compiling import CompileConfig
from .errors import PrepareError
from .zero.units import ROOT, find_units

logger = logging.getLogger("shardwise")

_CACHES = ("past_key_values", "past_key_value", "layer_past")


def blocks_to_compile(model: nn.Module, units: Sequence[str] | None = None) -> list[nn.Module]:
    """The repeated blocks of a model that is not sharded yet; units: as ShardedModel takes it.

    Raises PrepareError if there is none, or if one recomputes its activations re-entrantly: autograd would then run inside of
    a graph.
    """
    found = [spec.entries[0] for spec in find_units(model, units) if spec.name != ROOT and len(spec.entries) == 1]
    often = Counter(type(module) for module in found)
    blocks = [module for module in found if often[type(module)] > 1]
    if not blocks:
        raise PrepareError(
            f"dynamo_backend: {type(model).__name__} has no block that repeats, and nothing else is compiled. Name its "
            "blocks with units, or set dynamo_backend: no."
        )
    for block in blocks:
        if _recomputes_reentrantly(block):
            raise PrepareError(
                f"dynamo_backend: the {type(block).__name__} blocks recompute activations re-entrantly, which torch.compile "
                'cannot hold in a graph. Enable checkpointing with {"use_reentrant": False}, or set dynamo_backend: no.'
            )
    return blocks


class CompiledBlocks:
    """The blocks of one model with their `forward` compiled, until `undo`. None as settings compiles nothing."""

    def __init__(self, blocks: Sequence[nn.Module], settings: CompileConfig | None) -> None:
        self._before: list[tuple[nn.Module, Any]] = []
        if settings is None:
            return
        compile_ = functools.partial(
            torch.compile,
            backend=settings.dynamo_backend,
            # torch takes a mode for its own backend only.
            mode=settings.dynamo_mode if settings.dynamo_backend == "inductor" else None,
            fullgraph=settings.dynamo_use_fullgraph,
            # None: shapes are static until one changes.
            dynamic=True if settings.dynamo_use_dynamic else None,
        )
        of_class: dict[type, Callable[..., Any]] = {}
        for block in blocks:
            own = vars(block).get("forward")
            self._before.append((block, own))
            if own is not None:  # a script has put another function in its place
                block.forward = _dispatch(own, compile_(own))
                continue
            plain: Callable[..., Any] = type(block).forward
            if type(block) not in of_class:
                of_class[type(block)] = _dispatch(plain, compile_(plain))
            block.forward = MethodType(of_class[type(block)], block)

    def undo(self) -> None:
        """Give every block the `forward` back that it had."""
        for block, own in self._before:
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own
        self._before.clear()


def _dispatch(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` with its compiled form where gradients are recorded and no cache is filled."""

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        for name in _CACHES:
            if kwargs.get(name) is not None:
                if not _is_empty(kwargs[name]):
                    _say_cache()
                    return plain(*args, **kwargs)
                kwargs[name] = None
        return compiled(*args, **kwargs)

    return forward


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return callable(length) and int(length()) == 0


@functools.cache
def _say_cache() -> None:
    logger.warning(
        "dynamo_backend has no effect on forwards that continue from a cache of keys and values (prefix tuning): their blocks "
        "run eager."
    )


def _recomputes_reentrantly(block: nn.Module) -> bool:
    """Whether transformers' checkpointing is on for this block, in torch's older form."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
