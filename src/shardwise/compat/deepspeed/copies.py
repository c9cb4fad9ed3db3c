"""Small helpers of DeepSpeed that act on tensors: copies for torch.save, and its norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...ranks.batches import map_leaves


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of `item` in which every tensor has memory of its own on `device`: torch.save writes a view's whole storage."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().to(device, copy=True).contiguous() if isinstance(leaf, Tensor) else leaf

    return map_leaves(copied, item)


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2, mpu: Any = None
) -> Tensor:
    """torch's, on the gradients that parameters show; mpu must be None."""
    if mpu is not None:
        raise NotImplementedError("clip_grad_norm_: mpu is for model parallelism, which shardwise does not do.")
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
