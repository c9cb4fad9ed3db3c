"""What an Accelerator's ranks say together: gathers, sums, exact metrics and a flag. The rules are in `ranks/batches.py`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..data.prepare import drop_repeats
from ..ranks import batches
from .run import Run

logger = logging.getLogger("shardwise")


def gather(run: Run, tensor: Any) -> Any:
    """Every rank's tensors joined along dimension 0, in rank order; a scalar gives one entry per rank.

    Raises DataError on every rank if the shapes differ.
    """
    return batches.gather(run.ranks, tensor)


def gather_for_metrics(run: Run, input_data: Any, use_gather_object: bool = False) -> Any:
    """As `gather`, but at a loader's last batch without the samples that padding repeated.

    Exact for every sampler and batch size, and for k rows per sample. Dimension 0 may differ over the ranks. Things
    that are no tensors are gathered as objects: lists are joined.
    """
    loader = run.gradient_state.active_dataloader
    shares = loader.last_round if loader is not None else None
    if loader is not None and loader.end_of_dataloader and shares is None and run.ranks.world_size > 1:
        _say_once(
            "gather_for_metrics: the last round of this iterable data set was completed inside the loader's "
            "workers, so repeated samples cannot be told. Use num_workers=0 or dispatch_batches=True."
        )
    if use_gather_object or not batches.only_tensors(input_data):
        values = run.ranks.gather_objects(input_data)
        if not all(isinstance(value, (list, tuple)) for value in values):
            return values
        return [entry for part in drop_repeats(values, shares) for entry in part]
    ragged = batches.gather_ragged(run.ranks, input_data)
    width = run.ranks.world_size
    return batches.map_leaves(
        lambda parts: torch.cat(drop_repeats(parts, shares)), ragged, lambda item: _is_parts(item, width)
    )


def reduce(run: Run, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    """The tensors combined over the ranks ("sum", "mean", "max" or "min" of each element), times `scale`."""
    return batches.reduce(run.ranks, tensor, reduction, scale)


def pad_across_processes(
    run: Run, tensor: Any, dim: int = 0, pad_index: int | float = 0, pad_first: bool = False
) -> Any:
    """The tensors padded along `dim` to the longest of any rank."""
    return batches.pad_across_processes(run.ranks, tensor, dim, pad_index, pad_first)


def set_trigger(run: Run) -> None:
    """Raise a flag that `check_trigger` sees on every rank."""
    run.trigger = True


def check_trigger(run: Run) -> bool:
    """Whether any rank raised the flag since the last check. Collective; lowers the flag."""
    raised = any(run.ranks.gather_objects(run.trigger))
    run.trigger = False
    return raised


def _is_parts(item: Any, width: int) -> bool:
    return isinstance(item, list) and len(item) == width and all(isinstance(part, Tensor) for part in item)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)
