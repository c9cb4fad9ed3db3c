"""Weights and moments as codes on a device: the bits of a CPU, in the memory that the arithmetic says."""

from __future__ import annotations

import copy

import torch
from table import Row

from shardwise.offload import kernels
from shardwise.offload.codes import Chance, Coding
from shardwise.plan.compressed import CHUNK, Packing
from shardwise.ranks.ranks import Ranks
from shardwise.zero.compressed import dequantise, quantise


def apart(ranks: Ranks) -> Ranks:
    """The same ranks, told that each sits on a machine of its own."""
    other = copy.copy(ranks)
    other._divided, other.machines = {}, tuple(range(ranks.world_size))
    return other


def check_codes(numel: int, ranks: Ranks) -> Row:
    """Of shards of `numel` weights. What quantising and reading take beside codes and weights is within the estimate."""
    packing = Packing(numel, 4)
    differing, over = 0, 0
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(ranks.rank)
        shards = (0.02 * torch.randn(4, numel)).to(dtype)
        shards[1, 300], shards[2, 5], shards[3] = torch.inf, torch.nan, 0
        found = []
        for device in (torch.device("cpu"), ranks.device):
            own, codes = shards.to(device), torch.zeros(packing.nbytes, dtype=torch.uint8, device=device)
            whole = torch.zeros(4 * numel, dtype=dtype, device=device)
            before = _in_use(device)
            for shard, part in zip(own, codes.view(4, -1), strict=True):
                quantise(shard, packing, part)
            dequantise(codes, packing, whole)
            over = max(over, _peak(device) - before - packing.staging_nbytes - (1 << 16))
            found.append(whole.cpu())
        same = (found[0] == found[1]) | (found[0].isnan() & found[1].isnan())
        differing += int((~same).sum())
    name = f"codes of 4 x {numel} weights"
    return Row("codes", name, 0.0, float(differing), not differing and over <= 0, f"{over} bytes over the estimate")


def check_moments(numel: int, ranks: Ranks) -> Row:
    """One kernel each way has the bits that a CPU finds operation by operation. loss, weight: codes and numbers apart."""
    torch.manual_seed(ranks.rank)
    values = torch.randn(numel) * torch.exp(4 * torch.randn(numel))
    codes, numbers = 0, 0
    for second in (False, True):
        mine = values.square() if second else values.clone()
        mine[3], mine[300], mine[520], mine[1024:1280], mine[1280:1536] = 0, torch.nan, torch.inf, 0, 1e-38
        for dtype in ("bf16", "int8"):
            coding = Coding(dtype, second)  # type: ignore[arg-type]
            for first in (None, 768, (1 << 33) + 256):
                found = []
                for device in (torch.device("cpu"), ranks.device):
                    step = torch.tensor(17, dtype=torch.int32, device=device)
                    parts = coding.encode(mine.to(device), None if first is None else Chance(first, step))
                    out = coding.decode(parts, torch.empty(numel, device=device))
                    found.append([part.cpu() for part in (*parts, out)])
                *parts, out = (_apart(a, b) for a, b in zip(*found, strict=True))
                codes, numbers = codes + sum(parts), numbers + out
    note = "in kernels" if kernels.usable(ranks.device) else "operation by operation"
    return Row("moments", f"codes of {numel} moments", float(codes), float(numbers), not codes and not numbers, note)


def _apart(a: torch.Tensor, b: torch.Tensor) -> int:
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())


def _in_use(device: torch.device) -> int:
    """Bytes, from which the peak is counted anew; a CPU counts none."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


SIZES = [2048 + 192, 3 * CHUNK + 320]
