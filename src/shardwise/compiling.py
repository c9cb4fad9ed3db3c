"""Regional compilation: torch.compile on each repeated block, under the engine's hooks.

A module's call runs its hooks around its `forward`. So it is `forward` that is compiled, and the engine's hooks, which gather
and release, stay outside of the compiled region: the graph holds arithmetic only, and takes the weights as inputs.

    block(x)  ->  hook: gather  ->  forward, compiled: the checkpointing, attention, MLP  ->  hook: release

Activation checkpointing belongs inside of the graph: the compiler then recomputes what the backward reads and no more, where a
checkpoint around the graph runs all of it again, the last matrix product included. Newer transformers put theirs inside of
`forward`; where a version has it around the module's call, it is switched off and done here.

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
from torch.utils.checkpoint import checkpoint

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
    """The blocks of one model with their `forward` compiled, until `undo`. None as settings compiles nothing.

    recompute: their activations are recomputed in the backward, inside of the graphs.
    """

    def __init__(self, blocks: Sequence[nn.Module], settings: CompileConfig | None, *, recompute: bool = False) -> None:
        super().__init__()
        self._taken_over: list[nn.Module] = []
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
        of_class: dict[tuple[type, bool], Callable[..., Any]] = {}
        for block in blocks:
            plain = forward_of(block)
            inside = recompute
            if _checkpoints_around_its_call(block):
                vars(block)["gradient_checkpointing"] = False
                self._taken_over.append(block)
                inside = True
            traced = _recomputing(plain) if inside else plain
            if "forward" in vars(block):  # a script has put another function in its place
                self.replace(block, _dispatch(plain, compile_(traced)))
                continue
            key = type(block), inside
            if key not in of_class:
                of_class[key] = _dispatch(plain, compile_(traced))
            self.replace(block, of_class[key])

    def undo(self) -> None:
        super().undo()
        for block in self._taken_over:
            vars(block)["gradient_checkpointing"] = True
        self._taken_over.clear()


def _checkpoints_around_its_call(block: nn.Module) -> bool:
    """Whether transformers recomputes this block, by a `__call__` of its own: its `forward` does not hold the checkpoint."""
    return bool(getattr(block, "gradient_checkpointing", False)) and type(block).__call__ is not nn.Module.__call__


def _recomputing(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` that keeps its inputs alone, while the module trains."""

    @functools.wraps(plain)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return plain(module, *args, **kwargs)
        return checkpoint(functools.partial(plain, module, **kwargs), *args, use_reentrant=False)

    return forward


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
