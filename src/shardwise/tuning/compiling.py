"""Regional compilation: torch.compile on each repeated block, under the engine's hooks.

A module's call runs its hooks around its `forward`. So it is `forward` that is compiled, and the engine's hooks, which gather
and release, stay outside of the compiled region: the graph holds arithmetic only, and takes the weights as inputs.

    block(x)  ->  hook: gather  ->  forward, compiled: the checkpointing, attention, MLP  ->  hook: release

Activation checkpointing belongs inside of the graph: the compiler then recomputes what the backward reads and no more, where a
checkpoint around the graph runs all of it again, the last matrix product included. Newer transformers put theirs inside of
`forward`; where a version has it around the module's call, it is switched off and done here.

The loss of a causal model is compiled beside its blocks: `CompiledLoss`.

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
from torch import Tensor, nn

from ..config.compiling import CompileConfig
from ..errors import PrepareError
from ..plan.units import FoundUnits
from ..zero.sharded import ShardedModel
from .blocks import ReplacedForwards, forward_of, recomputed, repeated_blocks, without_cache
from .losses import ReplacedLoss, causal_models

_FILLED_CACHE = (
    "dynamo_backend has no effect on forwards that continue from a cache of keys and values (prefix tuning): their blocks run "
    "eager."
)


def blocks_to_compile(model: nn.Module, units: Sequence[str] | FoundUnits | None = None) -> list[nn.Module]:
    """The repeated blocks of a model that is not sharded yet; units: as `find_units` takes them.

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

    sharded:   the model that they are of, prepared. None leaves CUDA graphs to find the steps by themselves.
    recompute: their activations are recomputed in the backward, inside of the graphs.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        settings: CompileConfig | None,
        sharded: ShardedModel | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self._taken_over: list[nn.Module] = []
        self._after_step: list[Callable[[], None]] = []
        if settings is None:
            return
        if settings.records_graphs and sharded is not None:
            # What a graph made in one step may be overwritten in the next.
            self._after_step = sharded.after_step
            self._after_step.append(_begin_step)
        compile_ = functools.partial(
            torch.compile,
            backend=settings.dynamo_backend,
            # torch takes a mode for its own backend only.
            mode=settings.dynamo_mode if settings.dynamo_backend == "inductor" else None,
            fullgraph=settings.dynamo_use_fullgraph,
            # None: shapes are static until one changes.
            dynamic=True if settings.dynamo_use_dynamic else None,
        )
        # torch's "eager" backend runs a checkpoint that lies in the graph without putting any random generator back.
        outside = settings.dynamo_backend == "eager"
        of_class: dict[tuple[type, bool], Callable[..., Any]] = {}
        for block in blocks:
            plain = forward_of(block)
            again = recompute
            if _checkpoints_around_its_call(block) or (outside and _checkpoints(block)):
                vars(block)["gradient_checkpointing"] = False
                self._taken_over.append(block)
                again = True
            if "forward" in vars(block):  # a script has put another function in its place
                self.replace(block, _dispatch(plain, _compiled(plain, block, compile_, again=again, outside=outside)))
                continue
            key = type(block), again
            if key not in of_class:
                of_class[key] = _dispatch(plain, _compiled(plain, block, compile_, again=again, outside=outside))
            self.replace(block, of_class[key])

    def undo(self) -> None:
        super().undo()
        if _begin_step in self._after_step:
            self._after_step.remove(_begin_step)
        for block in self._taken_over:
            vars(block)["gradient_checkpointing"] = True
        self._taken_over.clear()


def _begin_step() -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


class CompiledLoss:
    """The causal loss of a transformers model, compiled where gradients are recorded, until `undo`.

    Of what is otherwise a copy of the logits in fp32, a softmax and its gradient, the compiler makes passes over the logits in
    their own dtype: fewer bytes, and no fp32 logits. Models with another loss are left as they are.
    """

    def __init__(self, model: nn.Module, settings: CompileConfig | None) -> None:
        self._replaced: ReplacedLoss | None = None
        found = next((m for m in causal_models(model) if _name(m.loss_function) == "ForCausalLMLoss"), None)
        if found is None or settings is None:
            return
        plain: Callable[..., Tensor] = found.loss_function
        dynamic = True if settings.dynamo_use_dynamic else None
        compiled = torch.compile(plain, backend=settings.dynamo_backend, dynamic=dynamic)

        @functools.wraps(plain)
        def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return (compiled if torch.is_grad_enabled() and logits.requires_grad else plain)(logits, *args, **kwargs)

        self._replaced = ReplacedLoss(found, loss)

    def undo(self) -> None:
        """Give the model its own loss back."""
        if self._replaced is not None:
            self._replaced.undo()
            self._replaced = None


def _name(function: Any) -> str:
    return getattr(function, "__name__", "")


def _checkpoints_around_its_call(block: nn.Module) -> bool:
    """Whether transformers recomputes this block, by a `__call__` of its own: its `forward` does not hold the checkpoint."""
    return _checkpoints(block) and type(block).__call__ is not nn.Module.__call__


def _checkpoints(block: nn.Module) -> bool:
    """Whether transformers recomputes this block."""
    return bool(getattr(block, "gradient_checkpointing", False))


def _compiled(
    plain: Callable[..., Any], block: nn.Module, compile_: Callable[..., Any], *, again: bool, outside: bool
) -> Callable[..., Any]:
    """`plain`, the forward of `block`, compiled. again: recomputed while it trains, by a checkpoint in the graph or outside."""
    inner: Callable[..., Any] = compile_(plain) if outside or not again else plain
    if not again:
        return inner
    recomputing = recomputed(inner, block)

    @functools.wraps(plain)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (recomputing if module.training else inner)(module, *args, **kwargs)

    found: Callable[..., Any] = forward if outside else compile_(forward)
    return found


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
