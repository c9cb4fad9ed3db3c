"""One engine alone on the device: build, warm up, then time whole steps and take the peak; and nothing left over after.

Peak bytes only mean something when no other engine holds memory, so an engine is built, measured and freed before the
next one is built; rounds (A B C A B C) spread the drift of a machine over all of them. A step is timed from an idle
device to an idle device, on the host's clock: forward, backward, optimizer step, zero_grad, all that a step costs.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cases import Case
from engines import Engine, Trainee, mean_over_ranks
from place import Place


@dataclass
class Round:
    """What one engine did in one round. Times and peaks are the largest over the ranks; the rest is this rank's.

    step_ms:  one number per timed step. losses: the mean over ranks, per step, warm-up included.
    peaks:    bytes by name; empty on a CPU, where torch does not count them.
    first_s:  seconds of building and the first step.
    leftover: bytes that were still allocated on the device after the engine was dropped; 0 unless it leaks.
    """

    build_s: float
    step_ms: list[float]
    losses: list[float]
    peaks: dict[str, int]
    at_rest: dict[str, int]
    host_rss: int
    first_s: float = 0.0
    leftover: int = 0


@dataclass
class Account:
    """All rounds of one engine."""

    engine: Engine
    rounds: list[Round] = field(default_factory=list)

    @property
    def step_ms(self) -> list[float]:
        return [value for done in self.rounds for value in done.step_ms]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def losses(self) -> list[float]:
        return self.rounds[0].losses

    def peak(self, name: str) -> int | None:
        """The largest over the rounds, or None where it was not measured."""
        return max((done.peaks[name] for done in self.rounds if name in done.peaks), default=None)

    def record(self, case: Case, tokens_per_step: int) -> dict[str, Any]:
        """The fields of this engine's JSON line that the measurement gives."""
        return {
            "case": case.name,
            "engine": self.engine.text,
            "step_ms": {
                "median": round(self.median_ms, 3),
                "min": round(min(self.step_ms), 3),
                "max": round(max(self.step_ms), 3),
                "steps": len(self.step_ms),
                "median_by_round": [round(statistics.median(done.step_ms), 3) for done in self.rounds],
            },
            "tokens_per_s": round(tokens_per_step / self.median_ms * 1000, 1),
            "peak_bytes": {name: self.peak(name) for name in self.rounds[0].peaks},
            "at_rest_bytes": self.rounds[0].at_rest,
            "host_rss_bytes": max(done.host_rss for done in self.rounds),
            "leftover_bytes": max(done.leftover for done in self.rounds),
            "build_s": round(max(done.build_s for done in self.rounds), 2),
            "first_step_s": round(max(done.first_s for done in self.rounds), 2),
            "losses": self.losses,
            "rounds_bitwise_equal": all(done.losses == self.losses for done in self.rounds),
        }


def run_alone(
    engine: Engine,
    case: Case,
    place: Place,
    *,
    reduce_dtype: str,
    warmup: int,
    steps: int,
    before_drop: Callable[[Trainee], None] | None = None,
) -> Round:
    """Build `engine`, take `warmup` steps, time `steps` more, drop it, and say what was seen.

    before_drop: called with the trainee after the timing, while it is still there (to trace it).
    """
    free(place)
    base, base_reserved = held(place)
    started = time.perf_counter()
    trainee = engine.build(case, place, reduce_dtype)
    place.synchronize()
    build_s = time.perf_counter() - started
    losses = [take_step(trainee, case, place, 0)] if warmup else []
    place.synchronize()
    first_s = time.perf_counter() - started
    losses += [take_step(trainee, case, place, index) for index in range(1, warmup)]
    place.synchronize()
    if place.cuda:
        # What building needed is not what training needs: give back the blocks that only building used.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    step_ms = []
    for index in range(warmup, warmup + steps):
        seconds, loss = timed_step(trainee, case, place, index)
        losses.append(loss)
        step_ms.append(seconds * 1000)
    done = Round(
        build_s,
        largest(step_ms, place),
        mean_over_ranks(losses, place),
        peaks(place, base, base_reserved),
        _at_rest(trainee),
        psutil.Process().memory_info().rss,
        first_s,
    )
    if before_drop is not None:
        before_drop(trainee)
    del trainee
    free(place)
    if place.cuda:
        done.leftover = held(place)[0] - base
    return done


def timed_step(trainee: Trainee, case: Case, place: Place, index: int) -> tuple[float, torch.Tensor]:
    """Seconds from an idle device to an idle device, and this rank's loss."""
    batch = case.batch(index, place.rank, place.device)
    _seed(index, place)
    place.synchronize()
    started = time.perf_counter()
    loss = trainee.step(batch)
    place.synchronize()
    return time.perf_counter() - started, loss


def take_step(trainee: Trainee, case: Case, place: Place, index: int) -> torch.Tensor:
    """Step number `index` on its own batch and random numbers; gives this rank's loss."""
    batch = case.batch(index, place.rank, place.device)
    _seed(index, place)
    return trainee.step(batch)


def free(place: Place) -> None:
    """Give every unreachable tensor and every cached block back."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled holds on to what it was compiled for
    gc.collect()
    place.synchronize()
    if place.cuda:
        # cuBLAS keeps its workspaces in torch's allocator: they belong to no engine and would count as left over.
        if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
            clear()
        torch.cuda.empty_cache()


def _seed(index: int, place: Place) -> None:
    # Dropout: the same masks for every engine, other masks on every rank.
    torch.manual_seed(1000 * index + place.rank)


def largest(values: Sequence[float], place: Place) -> list[float]:
    """Of each number the largest over the ranks. Every rank calls this."""
    if not dist.is_initialized():  # a front end may need no group for one rank
        return list(values)
    stacked = torch.tensor(values, dtype=torch.float64, device=place.device)
    dist.all_reduce(stacked, op=dist.ReduceOp.MAX)
    return stacked.tolist()


def held(place: Place) -> tuple[int, int]:
    """Bytes allocated and reserved now: before an engine is built, what those before it did not give back."""
    if not place.cuda:
        return 0, 0
    return torch.cuda.memory_allocated(place.device), torch.cuda.memory_reserved(place.device)


def peaks(place: Place, base: int, base_reserved: int) -> dict[str, int]:
    """The engine's own peaks. base, base_reserved: bytes that an engine before it left, which DeepSpeed does."""
    if not place.cuda:
        return {}
    unused, total = torch.cuda.mem_get_info(place.device)
    mine = {
        "allocated": torch.cuda.max_memory_allocated(place.device) - base,
        "reserved": torch.cuda.max_memory_reserved(place.device) - base_reserved,
        # With the context, NCCL's buffers and the cache: what nvidia-smi shows after the last step.
        "device_in_use": total - unused - base_reserved,
    }
    return dict(zip(mine, map(int, largest(list(mine.values()), place)), strict=True))


def _at_rest(trainee: Trainee) -> dict[str, int]:
    """Bytes of this rank by "role/tier", and the moments that the optimizer keeps, whatever the engine."""
    moments: dict[str, int] = {}
    for state in trainee.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                local = value.to_local() if isinstance(value, DTensor) else value
                key = f"moments/{local.device.type}"
                moments[key] = moments.get(key, 0) + local.nbytes
    return {**_names(trainee.ledger()), **moments}


def _names(ledger: dict[Any, int]) -> dict[str, int]:
    return {"/".join(str(getattr(part, "value", part)) for part in key): size for key, size in ledger.items()}
