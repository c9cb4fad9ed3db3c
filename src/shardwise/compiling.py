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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .blocks import ReplacedForwards, forward_of, repeated_blocks, without_cache
from .config.compiling import CompileConfig
from .errors import PrepareError

_FILLED_CACHE = (
    "dynamo_backend has no effect on forwards that continue from a cache of keys and values (prefix tuning): their blocks run "
    "eager."
)


def blocks_to_compile(model: nn.Module, units: Sequence[str] | None = None) -> list[nn.Module]:
    """The repeated blocks of a model that is not sharded yet; units: as ShardedModel takes it.

    Raises PrepareError if there is none, or if one recomputes its activations re-entrantly: autograd would then run inside of
    a graph.
    """
    blocks = repeated_blocks(model, units)
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


class CompiledBlocks(ReplacedForwards):
    """The blocks of one model with their `forward` compiled, until `undo`. None as settings compiles nothing."""

    def __init__(self, blocks: Sequence[nn.Module], settings: CompileConfig | None) -> None:
        super().__init__()
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
            plain = forward_of(block)
            if "forward" in vars(block):  # a script has put another function in its place
                self.replace(block, _dispatch(plain, compile_(plain)))
                continue
            if type(block) not in of_class:
                of_class[type(block)] = _dispatch(plain, compile_(plain))
            self.replace(block, of_class[type(block)])


def _dispatch(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` with its compiled form where gradients are recorded and no cache is filled."""

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not without_cache(kwargs, _FILLED_CACHE):
            return plain(*args, **kwargs)
        return compiled(*args, **kwargs)

    return forward


def _recomputes_reentrantly(block: nn.Module) -> bool:
    """Whether transformers' checkpointing is on for this block, in torch's older form."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
