"""An optimizer's moments as fewer bits, and numbers again: what rests off the device under `optimizer_state_dtype`.

              first moments (any sign)                          second moments (never negative)
    bf16      rounded to the nearest                            rounded up or down, at random by where the number lies
    int8      sign(x) sqrt(|x| / s) in steps of 1/127           (x / s)^(1/4) in steps of 1/255, at random too

s is the largest magnitude of a block of 256, kept in fp32. A second moment moves by 1/1000 of itself in a step, less than a
step of its codes: rounded to the nearest it would stand still, and one that becomes 0 would let its weight jump. So it is
rounded at random, right in the mean, and what is above 0 stays above 0. The chance comes from a hash of the number, its place
and the count of steps: the same run has the same bits, and a resumed one goes on with them.

What was decoded has the very same codes again, however it is rounded: a checkpoint of the numbers is one of the codes.
Nothing here depends on the device: each operation is rounded as IEEE 754 says, and powers come from a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..plan.compressed import BLOCK
from ..plan.state_dtypes import PIECE, StateDtype
from . import kernels
from .blocks import chunks, divisors, largest, nan_unless_finite

# A block whose largest magnitude is below is zeros: its codes would stand for numbers that fp32 cannot tell apart.
_SMALLEST = 2.0**-100
# Chances are multiples of 1/1024 and half of that away from 0 and 1: more than the error of a quotient and its roots, so that
# what stands on a code stays there.
_CHANCES = 1024


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


# An integer hash by Chris Wellons, "lowbias32"; and two odd numbers.
_SHIFT_MULTIPLY = ((16, _signed(0x7FEB352D)), (15, _signed(0x846CA68B)))
_BY_PLACE, _BY_STEP = _signed(0x9E3779B1), _signed(0x85EBCA77)


@dataclass(frozen=True)
class Chance:
    """What rounding at random depends on beside a number. first: the place of the first. step: () int32, on the device."""

    first: int
    step: Tensor

    @property
    def draw(self) -> kernels.Draw:
        """The same, with the first place as the hash has it: an int32."""
        return self.step, _signed(self.first * _BY_PLACE & 0xFFFFFFFF)


@dataclass(frozen=True)
class Coding:
    """How the numbers of one state rest. second: whether they are a second moment.

    parts: what they rest as: (dtype, how many numbers an element of it stands for).
    """

    dtype: StateDtype
    second: bool

    @property
    def parts(self) -> tuple[tuple[torch.dtype, int], ...]:
        return ((torch.bfloat16, 1),) if self.dtype == "bf16" else ((torch.uint8, 1), (torch.float32, BLOCK))

    def room(self, numel: int, device: torch.device) -> list[Tensor]:
        """Memory for the parts of `numel` numbers from the beginning of a block on."""
        return [torch.empty(-(-numel // each), dtype=dtype, device=device) for dtype, each in self.parts]

    @torch.no_grad()
    def encode(self, values: Tensor, chance: Chance | None = None) -> list[Tensor]:
        """(n,) fp32 numbers, from the beginning of a block on, as parts.

        chance: for second moments; None rounds to the nearest. A block with inf, NaN or a second moment below 0 becomes NaN.
        """
        parts = self.room(values.numel(), values.device)
        if self.dtype == "bf16":
            if chance is None or not self.second:
                parts[0].copy_(values)
            elif kernels.usable(values.device):
                kernels.round_at_random(values, chance.draw, parts[0])
            else:
                _round_at_random(values, chance, parts[0])
            return parts
        if kernels.usable(values.device):
            draw = None if chance is None else chance.draw
            kernels.encode(values, parts[0], parts[1], draw, second=self.second, smallest=_SMALLEST)
            return parts
        for first, blocks in chunks(values.view(1, -1), PIECE // BLOCK):
            begin, end = first * BLOCK, first * BLOCK + blocks.numel()
            scales = largest(blocks)
            if self.second:
                scales.masked_fill_(blocks.amin(-1) < 0, torch.nan)
            nan_unless_finite(scales).masked_fill_(scales < _SMALLEST, 0)
            parts[1][first : first + scales.numel()].copy_(scales.view(-1))
            roots = blocks.div(divisors(scales))
            codes = self._codes(roots, blocks, None if chance is None else Chance(chance.first + begin, chance.step))
            parts[0][begin:end].copy_(codes.view(-1))
        return parts

    def _codes(self, relative: Tensor, blocks: Tensor, chance: Chance | None) -> Tensor:
        """Codes as bytes. relative: the blocks over their scales; scratch afterwards."""
        if not self.second:
            codes = relative.abs().sqrt_().mul_(127).round_().clamp_(max=127).copysign_(relative).nan_to_num_(0)
            return codes.to(torch.int8).view(torch.uint8)
        codes = relative.sqrt_().sqrt_().mul_(255)
        if chance is None:
            codes.round_()
        else:
            below = codes.floor()
            share = _between(codes, below)
            drawn = _drawn(blocks.reshape(-1), chance).bitwise_and_(_CHANCES - 1).view(blocks.shape)
            codes = below.add_(share.mul_(_CHANCES).sub_(0.5) > drawn)
        codes.clamp_(max=255).nan_to_num_(0)
        return torch.maximum(codes, (blocks > 0).to(codes.dtype)).to(torch.uint8)

    @torch.no_grad()
    def decode(self, parts: Sequence[Tensor], out: Tensor) -> Tensor:
        """Write the numbers that `parts` stand for into `out`, fp32 on their device, and give it."""
        if self.dtype == "bf16":
            return out.copy_(parts[0])
        table = _powers(self.second, out.device)
        if kernels.usable(out.device):
            kernels.decode(parts[0], parts[1], table, out)
            return out
        for begin in range(0, out.numel(), PIECE):
            piece = out[begin : begin + PIECE]
            torch.index_select(table, 0, parts[0][begin : begin + piece.numel()].int(), out=piece)
            scales = parts[1][begin // BLOCK :]
            for first, blocks in chunks(piece.view(1, -1), PIECE // BLOCK):
                blocks.mul_(scales[first : first + blocks.shape[1]].view(1, -1, 1))
        return out


def _between(codes: Tensor, below: Tensor) -> Tensor:
    """Where each number lies between the fourth powers below and above it, from 0 to 1. codes: scratch afterwards.

    In the mean the number is right, not its root: (x^4 - k^4) / ((k + 1)^4 - k^4), in factors that lose no digits.
    """
    share = codes.square().addcmul_(below, below).mul_(codes + below).mul_(codes.sub_(below))
    width = below.mul(2).add_(1)
    share.div_(width)
    return share.div_(width.square_().add_(1).div_(2))  # 2 k^2 + 2 k + 1


@cache
def _powers(second: bool, device: torch.device) -> Tensor:
    """What each code stands for, over the scale: the largest is exactly 1. Signed codes are in two's complement."""
    codes = torch.arange(256, dtype=torch.float64)
    if second:
        found = (codes / 255) ** 4
    else:
        signed = torch.where(codes < 128, codes, codes - 256)
        found = (signed / 127).square().copysign(signed)
    return found.float().to(device)


def _round_at_random(values: Tensor, chance: Chance, out: Tensor) -> None:
    """fp32 to bf16: up with the probability that the bits say which are cut off. NaN stays NaN."""
    for begin in range(0, values.numel(), PIECE):
        piece = values[begin : begin + PIECE]
        drawn = _drawn(piece, Chance(chance.first + begin, chance.step)).bitwise_and_(0xFFFF)
        rounded = drawn.add_(piece.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
        out[begin : begin + PIECE].copy_(rounded.where(~piece.isnan(), piece))


def _drawn(values: Tensor, chance: Chance) -> Tensor:
    """(n,) int32 without a pattern, from fp32 numbers, their places and the step."""
    drawn = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    step, place = chance.draw
    drawn.mul_(_BY_PLACE).add_(step * _BY_STEP + place).bitwise_xor_(values.view(torch.int32))
    for shift, factor in _SHIFT_MULTIPLY:
        drawn.bitwise_xor_(_shifted(drawn, shift)).mul_(factor)
    return drawn.bitwise_xor_(_shifted(drawn, 16))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return bits.bitwise_right_shift(by).bitwise_and_((1 << (32 - by)) - 1)
