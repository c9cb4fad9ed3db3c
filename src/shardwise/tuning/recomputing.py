"""Activation checkpointing: blocks keep their input alone and are recomputed in the backward, all of them or as few as needed.

    all     every block is recomputed
    auto    all at first; what a block would keep is counted in the second step, the peak is measured in the third, and then
            as many blocks as the memory budget holds are recomputed no more

The last blocks of the forward are the first to be kept: their activations are gone again before the earlier blocks are
recomputed, so that k kept blocks add at most their own bytes to the peak that was measured.

    forward     0 1 2 3 4 5     blocks 4 and 5 kept: at the loss there are 6 inputs and what 4 and 5 keep
    backward    5 4             frees that; then 3 2 1 0 are recomputed one at a time, as before

Recomputation runs the same kernels on the same numbers, so no bit of the losses depends on how many blocks are kept. Ranks
keep the same number, that of the rank with the least room; a rank's collectives do not depend on it. A batch larger than the
measured ones is recomputed whole: what it would keep is not known.

`forward` is what is replaced, so the engine's hooks around a block run once for a forward and once for a backward, and its
weights are there in both. Over compiled blocks `auto` lies outside of the graph, so that one artefact serves both kinds; `all`
is done inside of it, by `tuning/compiling.py`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import PrepareError
from ..plan.units import FoundUnits
from ..zero.budget import COUNTED_AFTER, FILLED_AFTER, KEPT_AFTER, Budget
from ..zero.sharded import ShardedModel
from ..zero.statistics import RunningBuffers, unchanged
from .blocks import ReplacedForwards, forward_of, recomputed, repeated_blocks, without_cache

logger = logging.getLogger("shardwise")

_GRANULE = 512  # bytes to which a GPU's allocator rounds

_FILLED_CACHE = (
    "activation_checkpointing has no effect on forwards that continue from a cache of keys and values (prefix tuning): their "
    "blocks are kept."
)


def blocks_to_recompute(
    model: nn.Module, mode: str, units: Sequence[str] | FoundUnits | None = None
) -> list[nn.Module]:
    """The blocks that `mode` ("all" or "auto") acts on, of a model that is not sharded yet; units: as `find_units` takes them.

    None of them where transformers' own checkpointing is on already and `mode` is "all": that is what it does.
    Raises PrepareError if there is no block that repeats, or if `mode` is "auto" and transformers' own is on.
    """
    blocks = repeated_blocks(model, units)
    if not blocks:
        raise PrepareError(
            f"activation_checkpointing: {type(model).__name__} has no block that repeats, and nothing else is recomputed. Name "
            "its blocks with units, or set activation_checkpointing: none."
        )
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return blocks
    if mode == "auto":
        raise PrepareError(
            f"activation_checkpointing: auto chooses which blocks are recomputed, but this {type(model).__name__} recomputes "
            "its blocks by itself. Leave gradient_checkpointing_enable() out, or set activation_checkpointing: none."
        )
    return []


class RecomputedBlocks(ReplacedForwards):
    """The blocks of a prepared model under checkpointing, until `undo`.

    blocks: in the order of the forward. budget: bytes of device memory for this process, or "auto" for all that there is;
    on a CPU the bytes that kept blocks may take. None recomputes every block for good.
    Collective once, after the third step, where there is a budget.
    """

    def __init__(self, blocks: Sequence[nn.Module], sharded: ShardedModel, budget: int | str | None) -> None:
        super().__init__()
        self._sharded = sharded
        self._budget = Budget(sharded.ranks.device, budget)
        self._steps = 0
        self._blocks = [_Block(module, self._weights, sharded.running_buffers) for module in blocks]
        for block in self._blocks:
            self.replace(block.module, block.forward)
        if budget is not None:
            sharded.after_step.append(self._after_step)

    def undo(self) -> None:
        super().undo()
        if self._after_step in self._sharded.after_step:
            self._sharded.after_step.remove(self._after_step)

    @property
    def kept(self) -> int:
        """How many blocks are not recomputed."""
        return sum(block.keeps is not None for block in self._blocks)

    def _weights(self) -> set[int]:
        """The storages of all weights, gathered or not."""
        return {_storage(buffer.whole) for unit in self._sharded.units for buffer in unit.buffers}

    def _after_step(self) -> None:
        self._steps += 1
        # The last block of each kind: at the loss, where a step may peak, it is what would be kept first.
        kinds = {block.kind: block for block in self._blocks}
        if self._steps == COUNTED_AFTER:
            for block in kinds.values():
                block.counts = _Counts()
        elif self._steps == FILLED_AFTER:
            for block in kinds.values():
                block.measured, block.counts = block.counts, None
            self._budget.reset_peak()
        elif self._steps == KEPT_AFTER:
            room = self._budget.beside(self._budget.peak(reserved=False))
            self._keep({kind: block.measured for kind, block in kinds.items()}, room)

    def _keep(self, measured: dict[_Kind, _Counts | None], room: int) -> None:
        """Collective: keep from the end what fits into `room` on every rank."""
        ranks = self._sharded.ranks
        left, mine = room, 0
        for block in reversed(self._blocks):
            counts = measured[block.kind]
            if counts is None or not counts.rows or counts.nbytes > left:  # without rows it never ran on this rank
                break
            left -= counts.nbytes
            mine += 1
        count = min(ranks.gather_numbers(mine))
        kept = self._blocks[len(self._blocks) - count :]
        for block in kept:
            block.keeps = measured[block.kind]
        if ranks.rank == 0:
            nbytes = sum(block.keeps.nbytes for block in kept if block.keeps is not None)
            logger.warning(
                "activation_checkpointing: %d of %d blocks are recomputed; the last %d keep %.2f GB of activations, of %.2f GB "
                "that were free at a step's peak.",
                len(self._blocks) - count,
                len(self._blocks),
                count,
                nbytes / 1e9,
                max(0, room) / 1e9,
            )


_Kind = tuple[type, tuple[torch.Size, ...]]


class _Counts:
    """What one kind of block saved for its backward in a forward, at most, and the largest input that it had then.

    nbytes: bytes. rows: elements of the hidden states. length: their size along the second to last dimension; attention may
    keep a square of it.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.rows = 0
        self.length = 0

    def note(self, nbytes: int, size: tuple[int, int]) -> None:
        self.nbytes = max(self.nbytes, nbytes)
        self.rows, self.length = max(self.rows, size[0]), max(self.length, size[1])

    def covers(self, size: tuple[int, int]) -> bool:
        return size[0] <= self.rows and size[1] <= self.length


class _Block:
    """One block: recomputed, or counted, or kept for inputs that `keeps` covers. weights: storages that the engine has.

    running: buffers that forwards change.
    """

    def __init__(self, module: nn.Module, weights: Callable[[], set[int]], running: RunningBuffers) -> None:
        self.module = module
        self._running = running
        self._weights = weights
        self.kind: _Kind = (type(module), tuple(parameter.shape for parameter in module.parameters()))
        self.counts: _Counts | None = None
        self.measured: _Counts | None = None
        self.keeps: _Counts | None = None
        plain = forward_of(module)
        again = recomputed(plain, module, self._contexts)

        @functools.wraps(plain)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or not without_cache(kwargs, _FILLED_CACHE):
                return plain(module, *args, **kwargs)
            if self.counts is not None:
                return self._count(self.counts, functools.partial(plain, module), args, kwargs)
            if self.keeps is not None and self.keeps.covers(_size(args, kwargs)):
                return plain(module, *args, **kwargs)
            return again(module, *args, **kwargs)

        self.forward = forward

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the forward and around its recomputation, in which statistics must not move on a second time."""
        again = self._running.change_in(self.module)
        return nullcontext(), unchanged(self.module) if again else nullcontext()

    def _count(self, counts: _Counts, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run without recomputation, counting the memory that autograd keeps and checkpointing would not."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[_storage(tensor)] = -(-tensor.untyped_storage().nbytes() // _GRANULE) * _GRANULE
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = plain(*args, **kwargs)
        # Inputs and outputs are kept by checkpointing too, and weights by the engine.
        held = {_storage(tensor) for tensor in _tensors((args, kwargs, output, list(self.module.buffers())))}
        held |= self._weights()
        counts.note(sum(nbytes for key, nbytes in saved.items() if key not in held), _size(args, kwargs))
        return output


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor lies in: the same number for every view, also while it is given back."""
    return int(tensor.untyped_storage()._cdata)


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Elements of the hidden states, the encoder's too, and the longest of them; of whatever comes first where there are none.

    Masks do not count: they are left out where nothing is masked.
    """
    given = list(_tensors((args, kwargs)))
    hidden = [tensor for tensor in given if tensor.ndim == 3 and tensor.is_floating_point()] or given[:1]
    return sum(t.numel() for t in hidden), max((t.shape[-2] for t in hidden if t.ndim > 1), default=0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
