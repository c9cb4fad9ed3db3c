"""Triton's source of `kernels.py`. Imported only where Triton is."""

# Triton compiles these functions by their source; types of what it has no hints for are none of mypy's.
# Its constants are in capitals, as in Triton's own, and only NaN differs from itself.
# mypy: ignore-errors
# ruff: noqa: N803, PLR0124

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ROUNDS = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: a small number that is added to it loses its fraction, to the nearest even


@triton.jit
def _drawn(bits, at, step, place):
    """As `codes._drawn`, unsigned."""
    mixed = at.to(tl.uint32) * 0x9E3779B1 + place.to(tl.uint32)
    mixed = (mixed + tl.load(step).to(tl.uint32) * 0x85EBCA77) ^ bits.to(tl.uint32, bitcast=True)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return mixed ^ (mixed >> 16)


@triton.jit
def _second(relative, values, bits, at, step, place, DRAWS: tl.constexpr):
    codes = tl.sqrt_rn(tl.sqrt_rn(relative)) * 255.0
    if DRAWS:
        below = tl.floor(codes)
        share = (codes * codes + below * below) * (codes + below) * (codes - below)
        width = below * 2.0 + 1.0
        share = tl.div_rn(tl.div_rn(share, width), (width * width + 1.0) * 0.5)
        drawn = (_drawn(bits, at, step, place) & 1023).to(tl.int32).to(tl.float32)
        codes = below + (share * 1024.0 - 0.5 > drawn).to(tl.float32)
    else:
        codes = (codes + _ROUNDS) - _ROUNDS
    codes = tl.where(codes == codes, tl.minimum(codes, 255.0), 0.0)
    return tl.maximum(codes, (values > 0).to(tl.float32)).to(tl.int32).to(tl.uint8)


@triton.jit
def encode(
    values_at, codes_at, scales_at, step, place, smallest, numel,
    SECOND: tl.constexpr, DRAWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(values_at + at, mask=at < numel, other=0.0)
    bits = values.to(tl.int32, bitcast=True)
    # Magnitudes are in the order of their bits, with inf and NaN above all others.
    largest = tl.max(bits & _MAGNITUDE, axis=1)
    scales = largest.to(tl.float32, bitcast=True)
    broken = largest >= _INFINITY
    if SECOND:
        broken = broken | (tl.min(values, axis=1) < 0)
    scales = tl.where(broken, float("nan"), tl.where(scales < smallest, 0.0, scales))
    tl.store(scales_at + row, scales, mask=row * BLOCK < numel)
    relative = tl.div_rn(values, tl.broadcast_to(tl.where(scales == 0, 1.0, scales)[:, None], values.shape))
    if SECOND:
        codes = _second(relative, values, bits, at, step, place, DRAWS)
    else:
        roots = tl.minimum((tl.sqrt_rn(tl.abs(relative)) * 127.0 + _ROUNDS) - _ROUNDS, 127.0)
        signed = tl.where(relative < 0, -roots, roots)
        codes = tl.where(relative == relative, signed, 0.0).to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True)
    tl.store(codes_at + at, codes, mask=at < numel)


@triton.jit
def decode(codes_at, scales_at, table, out_at, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes = tl.load(codes_at + at, mask=at < numel, other=0).to(tl.int32)
    scales = tl.load(scales_at + row, mask=row * BLOCK < numel, other=0.0)
    tl.store(out_at + at, tl.load(table + codes) * scales[:, None], mask=at < numel)


@triton.jit
def round_at_random(values_at, out_at, step, place, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(values_at + at, mask=at < numel, other=0.0)
    bits = values.to(tl.int32, bitcast=True)
    drawn = _drawn(bits, at, step, place) & 0xFFFF
    upper = ((drawn + bits.to(tl.uint32, bitcast=True)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    tl.store(out_at + at, tl.where(values == values, upper, 0x7FC0).to(tl.int16), mask=at < numel)
