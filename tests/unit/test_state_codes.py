"""Moments as 16 and 8 bits: the sizes, the values, what is not a number, and what happens at the edges of what is written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rig.allocated import most_in_use
from shardwise.offload import coded, codes
from shardwise.offload.coded import CodedSlab
from shardwise.offload.codes import Chance, Coding
from shardwise.offload.store import MemoryStore
from shardwise.plan.compressed import BLOCK
from shardwise.plan.state_dtypes import PIECE, scratch_nbytes, state_nbytes
from shardwise.ranks.lanes import Lanes
from shardwise.step.moments import counted

CPU = torch.device("cpu")
CODINGS = [Coding(dtype, second) for dtype in ("bf16", "int8") for second in (False, True)]


def at_step(number: int, first: int = 0) -> Chance:
    return Chance(first, torch.tensor(number, dtype=torch.int32))


def moments(numel: int, *, second: bool, seed: int = 0) -> Tensor:
    """Of very different sizes, a tenth of them 0."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=source) * torch.randn(numel, generator=source).mul(3).exp()
    values[torch.rand(numel, generator=source) < 0.1] = 0
    return values.square() if second else values


def back(coding: Coding, values: Tensor, chance: Chance | None = None) -> Tensor:
    return coding.decode(coding.encode(values, chance), torch.empty_like(values))


def by_hand(values: Tensor, *, second: bool) -> Tensor:
    """8 bits, one block after another, to the nearest."""
    found = []
    for block in values.split(BLOCK):
        scale, power, most = block.abs().max().double(), 4 if second else 2, 255 if second else 127
        code = ((block.double().abs() / scale) ** (1 / power) * most).round()
        code = torch.where((block > 0) & second, code.clamp(min=1), code)
        found.append(((code / most) ** power).float() * scale.float() * block.sign())
    return torch.cat(found)


@pytest.mark.parametrize("numel", [0, 1, BLOCK, BLOCK + 1, 10 * BLOCK - 3])
def test_they_take_the_bytes_that_were_told(numel):
    for coding in CODINGS:
        parts = coding.encode(moments(numel, second=coding.second))
        assert sum(part.nbytes for part in parts) == state_nbytes(numel, coding.dtype)
    assert state_nbytes(numel, "fp32") == 4 * numel
    assert state_nbytes(numel, "int8") == numel + 4 * math.ceil(numel / BLOCK)


@pytest.mark.parametrize("second", [False, True])
def test_8_bits_are_the_nearest_of_a_code_that_is_finer_near_zero(second):
    values = moments(5 * BLOCK + 77, second=second)
    torch.testing.assert_close(back(Coding("int8", second), values), by_hand(values, second=second), rtol=1e-6, atol=0)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_what_was_decoded_has_the_same_codes_again_however_it_is_rounded(coding, monkeypatch):
    monkeypatch.setattr(codes, "PIECE", 4 * BLOCK)
    values = moments(300 * BLOCK + 5, second=coding.second)
    for chance in (None, at_step(1)):
        parts = coding.encode(values, chance)
        decoded = coding.decode(parts, torch.empty_like(values))
        for again in (None, at_step(1), at_step(2), at_step(3, first=BLOCK)):
            for part, same in zip(parts, coding.encode(decoded, again), strict=True):
                assert torch.equal(part, same)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_pieces_do_not_show(dtype, monkeypatch):
    values = moments(9 * BLOCK + 5, second=True)
    whole = Coding(dtype, True).encode(values, at_step(4, first=512))
    monkeypatch.setattr(codes, "PIECE", 2 * BLOCK)
    for part, same in zip(whole, Coding(dtype, True).encode(values, at_step(4, first=512)), strict=True):
        assert torch.equal(part, same)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_second_moments_are_right_in_the_mean_and_first_ones_the_nearest(dtype):
    values = torch.full((1 << 16,), 1.2345e-3)
    values[::BLOCK] = 1.0
    of_second = torch.stack([back(Coding(dtype, True), values, at_step(step)) for step in range(8)])
    rest = of_second[:, values < 1]
    assert len(rest.unique()) == 2
    assert rest.min() < 1.2345e-3 < rest.max()
    assert abs(rest.double().mean() / 1.2345e-3 - 1) < 2e-4
    assert torch.equal(back(Coding(dtype, False), values, at_step(1)), back(Coding(dtype, False), values))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_second_moment_that_only_decays_does_not_stand_still(dtype):
    values = torch.full((BLOCK,), 0.3)
    values[0] = 1.0  # of a weight that gets gradients
    for step in range(700):
        values[1:] *= 0.999
        values = back(Coding(dtype, True), values, at_step(step))
    assert 0.5 < values[1:].mean() / (0.3 * 0.999**700) < 1.5


def test_a_second_moment_above_zero_stays_there():
    values = torch.full((BLOCK,), 1e-12)
    values[:2] = torch.tensor([1.0, 0.0])
    for chance in (None, at_step(1), at_step(2)):
        found = back(Coding("int8", True), values, chance)
        assert found[0] == 1
        assert found[1] == 0
        assert (found[2:] == (1 / 255) ** 4).all()


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_zeros_and_what_is_too_small_are_zeros(coding):
    assert torch.equal(back(coding, torch.zeros(300), at_step(1)), torch.zeros(300))
    if coding.dtype == "int8":
        assert torch.equal(back(coding, torch.full((300,), 1e-35), at_step(1)), torch.zeros(300))
    zeros = [torch.zeros_like(part) for part in coding.room(300, CPU)]
    assert torch.equal(coding.decode(zeros, torch.ones(300)), torch.zeros(300))


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_no_number_is_loud(coding, value):
    values = moments(3 * BLOCK, second=coding.second)
    values[BLOCK + 3] = value
    for chance in (None, at_step(1)):
        found = back(coding, values, chance)
        assert not found[BLOCK + 3].isfinite()
        rest = torch.cat([found[:BLOCK], found[2 * BLOCK :]])
        assert rest.isfinite().all()
        if coding.dtype == "int8":
            assert found[BLOCK : 2 * BLOCK].isnan().all()


def test_a_second_moment_below_zero_is_loud():
    values = moments(2 * BLOCK, second=True)
    values[3] = -1e-3
    found = back(Coding("int8", True), values, at_step(1))
    assert found[:BLOCK].isnan().all()
    assert found[BLOCK:].isfinite().all()


# Slabs.


def slab(numel: int, coding: Coding) -> CodedSlab:
    return CodedSlab(MemoryStore(Lanes(CPU)), numel, coding, "w.exp_avg")


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("order", ["forwards", "backwards", "odd ones first"])
def test_what_is_written_in_parts_is_as_if_written_at_once(coding, order, monkeypatch):
    monkeypatch.setattr(coded, "PIECE", 300)
    values = moments(5 * BLOCK + 9, second=coding.second)
    expected = slab(len(values), coding)
    expected.put_parts(expected.packed(values))
    ends = [10, 11, 200, 256, 300, 700, 1024, 1280, len(values)]
    parts = list(zip([0, *ends], ends, strict=False))
    parts = {"forwards": parts, "backwards": parts[::-1], "odd ones first": parts[1::2] + parts[::2]}[order]
    found = slab(len(values), coding)
    for begin, end in parts:
        found.write_part(begin, values[begin:end])
        assert found.read_part(begin, end - begin).shape == (end - begin,)
    for one, other in zip(found.stored, expected.stored, strict=True):
        assert torch.equal(one.tensor, other.tensor)
    for begin, end in parts:
        assert torch.equal(found.read_part(begin, end - begin), back(coding, values)[begin:end])
    assert found.nbytes == state_nbytes(len(values), coding.dtype)
    assert not found.in_memory
    assert found.dtype == torch.float32


def test_a_step_ends_what_was_kept_of_the_edges():
    found = slab(3 * BLOCK, Coding("int8", False))
    found.write_part(BLOCK + 3, torch.ones(10))
    assert found._edges
    found.put_parts(found.packed(torch.zeros(3 * BLOCK), 0, torch.tensor(1)))
    assert not found._edges
    found.write_part(BLOCK + 1, torch.ones(1))
    assert torch.equal(found.read_part(BLOCK, 20), torch.tensor([0.0, 1.0, *[0.0] * 18]))


def test_no_block_is_cut():
    found = slab(3 * BLOCK, Coding("int8", False))
    with pytest.raises(AssertionError, match="never cut"):
        found.put_parts(found.packed(torch.zeros(BLOCK)), 3)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_coding_takes_the_memory_that_was_told(coding):
    values = moments(PIECE + 3000, second=coding.second)
    parts = coding.encode(values, at_step(1))
    out = torch.empty_like(values)
    sizes = state_nbytes(len(values), coding.dtype), 0
    for work, kept in zip(
        (lambda: coding.encode(values, at_step(1)), lambda: coding.decode(parts, out)), sizes, strict=True
    ):
        with torch.profiler.profile(profile_memory=True) as prof:
            work()
        assert kept <= most_in_use(prof) <= kept + scratch_nbytes(len(values), coding.dtype)


# Counts.


def test_counts_of_steps_are_added_up_without_a_device():
    states = [{"step": torch.tensor(3.0)}, {"step": 4}, {"exp_avg": torch.zeros(3)}]
    assert counted(states, CPU).item() == 7
    assert counted([], CPU).item() == 0
    assert counted(states, CPU).dtype == torch.int32


def test_scratch_is_for_a_piece_at_a_time():
    assert scratch_nbytes(1 << 30, "fp32") == 0
    assert scratch_nbytes(1 << 30, "int8") == scratch_nbytes(1 << 22, "bf16") == 28 << 22
