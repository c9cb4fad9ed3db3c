"""Tensors cut into blocks that share a scale: what codes of weights on their way and of states at rest have in common.

(rows, n)  ->  (rows, blocks, 256), and what is left of each row as one shorter block
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.compressed import BLOCK


def chunks(rows: Tensor, at_once: int) -> list[tuple[int, Tensor]]:
    """(number of its first block, (rows, blocks, width)): whole blocks, `at_once` of each row, then the shorter one."""
    full, rest = divmod(rows.shape[1], BLOCK)
    found = []
    for first in range(0, full, at_once):
        count = min(at_once, full - first)
        found.append((first, in_blocks(rows[:, first * BLOCK : (first + count) * BLOCK], BLOCK)))
    if rest:
        found.append((full, in_blocks(rows[:, full * BLOCK :], rest)))
    return found


def in_blocks(rows: Tensor, width: int) -> Tensor:
    """(rows, n) as (rows, n / width, width), the same memory."""
    return rows.view(rows.shape[0], -1, width)


def largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block, in fp32; inf or NaN where one of its numbers is."""
    low, high = torch.aminmax(blocks, dim=-1)
    return torch.maximum(high, low.neg_()).float()


def nan_unless_finite(scales: Tensor) -> Tensor:
    """The same tensor, in place: a block of which a number is not finite decodes to NaN, whatever its codes are."""
    return scales.masked_fill_(~scales.isfinite(), torch.nan)


def divisors(scales: Tensor) -> Tensor:
    """The scales, for a division: a block of zeros is divided by 1."""
    return torch.where(scales == 0, 1, scales).unsqueeze(-1)
