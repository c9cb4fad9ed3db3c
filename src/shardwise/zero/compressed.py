"""Gathers whose weights travel between machines as 8-bit codes: when that is, and how weights become codes and weights again.

    exact      shard ------------------------- all_gather --------------> whole
    rounded    shard -> scales and codes ----- all_gather -> of all ranks -> whole, this rank's own slice too

The codes of a shard depend on the shard alone, so a forward, its recomputation and its backward compute with the same bits,
on every rank. `docs/design/compressed_gathers.md` says what is rounded and what is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..offload.blocks import chunks, divisors, in_blocks, largest, nan_unless_finite
from ..offload.peers import on_one_machine
from ..plan.blueprint import Blueprint
from ..plan.compressed import BLOCK, CHUNK, Packing
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from .flat import FlatBuffer

log = logging.getLogger("shardwise")

GatherDtype = Literal["none", "int8"]

_LARGEST_CODE = 127


# When.


def compresses(gather_dtype: GatherDtype, plan: Plan, ranks: Ranks) -> bool:
    """Whether gathers in passes shall send codes: the same on every rank. Collective where the setting asks for it.

    Rank 0 says where it has no effect.
    """
    if gather_dtype == "none":
        return False
    why_not = None
    if not plan.frozen.sharded and not plan.parameter.sharded:
        why_not = "passes gather no weights below zero_stage 3"
    elif not any(ranks.any_of([not on_one_machine(ranks)])):
        what = "all ranks are" if ranks.copies.size == 1 else "each shard group is"
        why_not = f"{what} on one machine, where weights are gathered exactly"
    if why_not is not None and ranks.rank == 0:
        log.warning("gather_dtype: has no effect: %s.", why_not)
    return why_not is None


def refuse_wide(blueprints: Sequence[Blueprint], shards: int) -> None:
    """Raise ConfigError for trained weights that would be gathered in fp32 or fp64: on every rank, since all have the same."""
    for blueprint in blueprints:
        if blueprint.trainable and blueprint.plan.parameter.leaves(shards) and blueprint.dtype.itemsize > 2:
            raise ConfigError(
                f"gather_dtype: int8 is for weights that compute in 16 bits; {blueprint.trainable[0].name} is trained and "
                f"gathered in {str(blueprint.dtype).removeprefix('torch.')}. Set mixed_precision: bf16, or gather_dtype: none."
            )


def say_what_travels(buffers: Sequence[FlatBuffer]) -> None:
    """Log how many bytes of the gathered `buffers` travel how."""
    packed = [buffer for buffer in buffers if buffer.packing is not None]
    exact = [buffer for buffer in buffers if buffer.packing is None]
    before, after = (sum(sizes) / 1e6 for sizes in zip((0, 0), *map(_sizes, packed), strict=True))
    rest = ""
    if exact:
        dtypes = sorted({str(m.dtype).removeprefix("torch.") for buffer in exact for m in buffer.members})
        size = sum(buffer.whole_nbytes for buffer in exact) / 1e6
        rest = f" {size:,.1f} MB travel exactly, the first {exact[0].members[0].name}: their buffers hold {', '.join(dtypes)}."
    if not packed:
        log.warning(
            "gather_dtype: has no effect: no buffer that is gathered holds weights of one 16-bit dtype alone.%s", rest
        )
    else:
        tell = log.warning if exact else log.info
        tell("gather_dtype int8: %.1f MB of weights travel as %.1f MB in each pass.%s", before, after, rest)


def _sizes(buffer: FlatBuffer) -> tuple[int, int]:
    assert buffer.packing is not None
    return buffer.whole_nbytes, buffer.packing.nbytes


# How.


@torch.no_grad()
def quantise(weights: Tensor, packing: Packing, part: Tensor) -> None:
    """Write the scales and codes of this rank's `weights` into `part`, on the current lane.

    weights: (packing.numel,) in bf16 or fp16. part: (packing.part_nbytes,) bytes.
    A block with inf or NaN has the scale NaN, whatever its codes are.
    """
    scales, codes = _scales_and_codes(part.view(1, -1), packing)
    for first, blocks in chunks(weights.view(1, -1), CHUNK // BLOCK):
        own = scales[:, first : first + blocks.shape[1]]
        # Not divided: a GPU divides by a number as it multiplies by the inverse, and a CPU does not.
        torch.mul(largest(blocks), 1 / _LARGEST_CODE, out=own)
        scaled = blocks.float().div_(
            divisors(nan_unless_finite(own))
        )  # a CPU would divide mixed dtypes in a second copy
        scaled.round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).nan_to_num_(0)
        begin = first * BLOCK
        codes[:, begin : begin + blocks[0].numel()].copy_(scaled.flatten(1))
        del own, scaled  # before the next chunk takes as much


@torch.no_grad()
def dequantise(parts: Tensor, packing: Packing, whole: Tensor) -> None:
    """Write the weights that every rank's scales and codes stand for into `whole`, on the current lane.

    parts: (packing.nbytes,) bytes, of the ranks in their order. whole: (shards * numel,) in the weights' dtype.
    """
    scales, codes = _scales_and_codes(parts.view(packing.shards, -1), packing)
    # A GPU rounds products as it writes them; a CPU has codes and products in fp32 first, in what quantising took.
    at_once = packing.blocks if whole.is_cuda else max(1, min(packing.numel, CHUNK) // BLOCK // (2 * packing.shards))
    for first, blocks in chunks(whole.view(packing.shards, -1), at_once):
        begin, count, width = first * BLOCK, blocks.shape[1], blocks.shape[2]
        own = in_blocks(codes[:, begin : begin + count * width], width)
        torch.mul(own, scales[:, first : first + count].unsqueeze(-1), out=blocks)


def _scales_and_codes(rows: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Of (ranks, part_nbytes) bytes: (ranks, blocks) scales, (ranks, numel) codes; both are views."""
    at = packing.codes_at
    return rows[:, :at].view(torch.float32), rows[:, at : at + packing.numel].view(torch.int8)
