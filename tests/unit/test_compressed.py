"""Weights as 8-bit codes: the sizes, the values, and what is not a number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rig.allocated import most_in_use
from shardwise.errors import ConfigError
from shardwise.plan.blueprint import Blueprint, Member, codes_nbytes, gathered_at_once, packing_of
from shardwise.plan.compressed import BLOCK, CHUNK, Packing
from shardwise.plan.layout import Layout
from shardwise.plan.plan import Plan
from shardwise.zero import compressed
from shardwise.zero.compressed import dequantise, quantise, refuse_wide

DTYPES = [torch.bfloat16, torch.float16]


def there_and_back(shards: list[torch.Tensor]) -> torch.Tensor:
    """What every rank has of these shards after a gather."""
    packing = Packing(shards[0].numel(), len(shards))
    parts = torch.full((packing.nbytes,), 255, dtype=torch.uint8)
    for rank, shard in enumerate(shards):
        quantise(shard, packing, parts.view(len(shards), -1)[rank])
    whole = torch.full((packing.numel * len(shards),), 7.0, dtype=shards[0].dtype)
    dequantise(parts, packing, whole)
    return whole


def by_hand(shard: torch.Tensor) -> torch.Tensor:
    """The same one block after another, in fp32."""
    found = []
    for block in shard.float().split(BLOCK):
        scale = block.abs().max() / 127
        found.append((block / scale).round() * scale if scale else block)
    return torch.cat(found).to(shard.dtype)


@pytest.mark.parametrize(
    ("numel", "nbytes"),
    [(64, 80), (256, 272), (320, 336), (512, 528), (1 << 20, (1 << 20) + 4 * 4096)],
)
def test_a_part_is_a_byte_for_each_weight_and_a_scale_for_each_block(numel: int, nbytes: int) -> None:
    packing = Packing(numel, 3)
    assert packing.part_nbytes == nbytes == math.ceil((numel + 4 * math.ceil(numel / 256)) / 16) * 16
    assert packing.nbytes == 3 * nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [64, 256, 320, 1024 + 192])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_codes_stand_for_the_nearest_of_255_values_of_their_block(dtype, numel, shards, monkeypatch) -> None:
    monkeypatch.setattr(compressed, "CHUNK", 2 * BLOCK)  # several at a time
    torch.manual_seed(numel)
    parts = [(0.02 * torch.randn(numel)).to(dtype) for _ in range(shards)]
    whole = there_and_back(parts)
    assert torch.equal(whole, torch.cat([by_hand(part) for part in parts]))
    for part, found in zip(parts, whole.split(numel), strict=True):
        for block, back in zip(part.float().split(BLOCK), found.float().split(BLOCK), strict=True):
            step = block.abs().max() / 127
            assert (block - back).abs().max() <= step * (0.5 + 127 * torch.finfo(dtype).eps)
            assert back.abs().max() == block.abs().max()  # the largest is itself


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_rounded_once_is_not_rounded_again(dtype) -> None:
    torch.manual_seed(0)
    once = there_and_back([torch.randn(1000 * 64, dtype=torch.float32).to(dtype)])
    assert torch.equal(there_and_back([once]), once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_the_smallest_and_largest_numbers_survive(dtype) -> None:
    info = torch.finfo(dtype)
    for value in (0.0, info.max, -info.max, info.tiny, info.smallest_normal, -info.smallest_normal / 4):
        shard = torch.zeros(320, dtype=dtype)
        shard[3] = shard[300] = value
        assert torch.equal(there_and_back([shard, shard]), torch.cat([shard, shard])), value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_block_with_what_is_no_number_is_nan_and_no_other_is(dtype, value) -> None:
    shard = torch.ones(640, dtype=dtype)
    shard[260] = value
    whole = there_and_back([shard, torch.ones(640, dtype=dtype)])
    assert whole.isnan().nonzero().flatten().tolist() == list(range(256, 512))
    assert torch.equal(whole[whole.isfinite()], torch.ones(1280 - 256, dtype=dtype))


def test_gaussian_weights_are_off_by_three_quarters_of_a_percent() -> None:
    torch.manual_seed(0)
    weights = (0.02 * torch.randn(1 << 18)).bfloat16()
    error = (there_and_back([weights]).float() - weights.float()).norm() / weights.float().norm()
    assert 0.006 < error < 0.008


@pytest.mark.parametrize(("numel", "shards"), [(1 << 16, 2), (CHUNK + 192, 2), (1 << 18, 16)])
def test_making_and_reading_codes_takes_what_the_estimate_says(numel, shards) -> None:
    packing = Packing(numel, shards)
    weights, parts = torch.randn(numel).bfloat16(), torch.zeros(packing.nbytes, dtype=torch.uint8)
    whole = torch.zeros(shards * numel, dtype=torch.bfloat16)
    for work in (
        lambda: quantise(weights, packing, parts[: packing.part_nbytes]),
        lambda: dequantise(parts, packing, whole),
    ):
        with torch.profiler.profile(profile_memory=True) as prof:
            work()
        most = most_in_use(prof)
        assert 2 * min(numel, CHUNK) <= most <= packing.staging_nbytes, (most, packing.staging_nbytes)


# Which buffers, and their bytes.


def member(name: str, dtype: torch.dtype, numel: int = 1000) -> Member:
    return Member(name, nn.Parameter(torch.empty(numel, device="meta", dtype=dtype), requires_grad=False), dtype)


def test_a_buffer_of_one_16_bit_dtype_is_packed_and_any_other_travels_exactly() -> None:
    def packed(*dtypes: torch.dtype) -> Packing | None:
        members = [member(str(i), dtype) for i, dtype in enumerate(dtypes)]
        layout = Layout.pack([(m.name, (1000,), 1000 * m.dtype.itemsize) for m in members], 2, 128)
        return packing_of(members, layout, 1)

    assert packed(torch.bfloat16, torch.bfloat16) == Packing(2048 // 2, 2)
    assert packed(torch.float16) == Packing(1024 // 2, 2)
    for mixed in (
        [torch.bfloat16, torch.float32],
        [torch.bfloat16, torch.float16],
        [torch.uint8, torch.bfloat16],
        [torch.float32],
        [torch.int16],
        [torch.float8_e4m3fn],
    ):
        assert packed(*mixed) is None


def blueprint(*, trained: torch.dtype = torch.bfloat16) -> Blueprint:
    plan = Plan.from_stage(3)
    return Blueprint("", (), plan, (member("q", torch.bfloat16, 10000),), (member("w", trained, 3000),))


def test_the_estimate_counts_the_codes_of_one_gather() -> None:
    unit = blueprint()
    frozen, trained = unit.packings(4)
    assert (frozen.numel, trained.numel) == (
        unit.frozen_layout(4).shard_numel // 2,
        unit.trainable_layout(4).shard_numel,
    )
    nbytes = frozen.nbytes + trained.nbytes + frozen.staging_nbytes
    assert codes_nbytes([frozen, trained]) == nbytes
    model = nn.Module()
    exact = gathered_at_once([unit, unit], model, 4, 1)
    assert gathered_at_once([unit, unit], model, 4, 1, compressed=True) == exact + nbytes
    assert Packing(CHUNK * 10, 2).staging_nbytes < 5 * CHUNK
    assert blueprint(trained=torch.float32).packings(4) == [frozen]
    assert Blueprint("", (), Plan.from_stage(2), unit.frozen, unit.trainable).packings(4) == []


def test_trained_weights_that_are_gathered_in_fp32_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"gather_dtype: int8 is for .* 16 bits; w is trained and gathered in float32\. Set"
    ):
        refuse_wide([blueprint(trained=torch.float32)], 2)
    refuse_wide([blueprint()], 2)
    whole = Blueprint(
        "", (), Plan.from_stage(3).with_whole_parameters(), (), blueprint(trained=torch.float32).trainable
    )
    refuse_wide([whole], 2)  # as small adapters are: never gathered
