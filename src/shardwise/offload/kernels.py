"""The codes of `codes.py` in one kernel each way, where Triton runs: the same bits as its operations one by one.

A chunk of a step has two moments to decode and to encode. As operations of torch these are a hundred launches, which take the
host longer than the link takes for the chunk. Here they are four, and read and write each number once.

Kernels round as those operations do: no product is fused with a sum (`enable_fp_fusion`), quotients and roots are IEEE 754's.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..plan.compressed import BLOCK

log = logging.getLogger("shardwise")

_ROWS = 16  # blocks of one program
# Of a draw: the count of steps, () int32 on the device, and the first place as the hash has it.
Draw = tuple[Tensor, int]
_PLAIN = {"enable_fp_fusion": False, "num_warps": 8}


@cache
def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`: tried once, on a block. Else what is slower is said once."""
    if device.type != "cuda":
        return False
    try:
        _made()
        codes, scales = torch.empty(BLOCK, dtype=torch.uint8, device=device), torch.empty(1, device=device)
        encode(torch.ones(BLOCK, device=device), codes, scales, None, second=False, smallest=0.0)
    except Exception as error:  # a compiler that is missing, a device that it does not know: whatever Triton raises
        log.warning("moments as codes are made without Triton, which is slower: %s: %s", type(error).__name__, error)
        return False
    return True


def encode(values: Tensor, codes: Tensor, scales: Tensor, draw: Draw | None, *, second: bool, smallest: float) -> None:
    """int8 codes and scales of (n,) fp32 `values`. See `Coding.encode`; smallest: scales below are 0."""
    step, place = draw or (values, 0)  # neither is read without a draw
    _made().encode[_grid(values)](
        *(values, codes, scales, step, place, smallest, values.numel()),
        SECOND=second, DRAWS=draw is not None, ROWS=_ROWS, BLOCK=BLOCK, **_PLAIN,
    )  # fmt: skip


def decode(codes: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    """The numbers that int8 codes stand for. table: (256,) fp32, of each code over the scale."""
    _made().decode[_grid(out)](codes, scales, table, out, out.numel(), ROWS=_ROWS, BLOCK=BLOCK, **_PLAIN)


def round_at_random(values: Tensor, draw: Draw, out: Tensor) -> None:
    """(n,) fp32 to bf16, up or down by what is drawn."""
    bits, numel = out.view(torch.int16), values.numel()
    _made().round_at_random[_grid(values)](values, bits, *draw, numel, ROWS=_ROWS, BLOCK=BLOCK, **_PLAIN)


def _grid(values: Tensor) -> tuple[int]:
    return (-(-values.numel() // (_ROWS * BLOCK)),)


@cache
def _made() -> Any:
    from . import triton_kernels  # imports Triton, which torch brings along with CUDA and only there

    return triton_kernels
