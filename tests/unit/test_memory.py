"""The memory tracker: eight lines, true figures, no thread left behind, no exception swallowed."""

from __future__ import annotations

import re
import threading
import time

import pytest
import torch

from shardwise.run.memory import SAMPLE_INTERVAL_S, MemoryTracker

GUIDE_LINES = [
    r"GPU Memory before entering the train : 0 \(no GPU\)",
    r"GPU Memory consumed at the end of the train \(end-begin\): 0 \(no GPU\)",
    r"GPU Peak Memory consumed during the train \(max-begin\): 0 \(no GPU\)",
    r"GPU Total Peak Memory consumed during the train \(max\): 0 \(no GPU\)",
    r"CPU Memory before entering the train : \d+",
    r"CPU Memory consumed at the end of the train \(end-begin\): -?\d+",
    r"CPU Peak Memory consumed during the train \(max-begin\): \d+",
    r"CPU Total Peak Memory consumed during the train \(max\): \d+",
]


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shardwise-memory"]


def touch(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * 2**20, dtype=torch.uint8)


def test_the_report_is_the_eight_lines_of_the_guide() -> None:
    with MemoryTracker("train", device="cpu") as memory:
        pass
    lines = memory.report().splitlines()
    assert len(lines) == 8
    for line, pattern in zip(lines, GUIDE_LINES, strict=True):
        assert re.fullmatch(pattern, line), line


def test_memory_that_is_kept_counts_as_consumed() -> None:
    with MemoryTracker("train", device="cpu") as memory:
        kept = touch(64)
    assert kept.numel() == 64 * 2**20
    assert 60 * 2**20 < memory.cpu_used < 80 * 2**20
    assert memory.cpu_peak >= memory.cpu_end == memory.cpu_begin + memory.cpu_used


def test_memory_that_is_freed_counts_only_in_the_peak() -> None:
    with MemoryTracker("train", device="cpu") as memory:
        passing = touch(64)
        time.sleep(4 * SAMPLE_INTERVAL_S)
        del passing
    assert memory.cpu_peaked > 60 * 2**20
    assert memory.cpu_used < 32 * 2**20


def test_an_exception_passes_through_and_ends_the_thread() -> None:
    memory = MemoryTracker("train", device="cpu")

    def fail_inside() -> None:
        with memory:
            assert sampling_threads()
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fail_inside()
    assert not sampling_threads()
    assert memory.report()


def test_no_thread_is_left_after_many_uses() -> None:
    memory = MemoryTracker("train", device="cpu")
    for _ in range(5):
        with memory:
            pass
    assert not sampling_threads()


def test_trackers_nest() -> None:
    with MemoryTracker("outer", device="cpu") as outer, MemoryTracker("inner", device="cpu") as inner:
        kept = touch(64)
    assert kept.numel()
    assert outer.cpu_peak >= inner.cpu_begin + 60 * 2**20
    assert not MemoryTracker._open


def test_a_tracker_that_measures_cannot_be_entered_again() -> None:
    memory = MemoryTracker("train", device="cpu")
    with memory, pytest.raises(RuntimeError, match="already measuring"), memory:
        pass


def test_a_report_before_the_end_is_refused() -> None:
    memory = MemoryTracker("train", device="cpu")
    with pytest.raises(RuntimeError, match="measured nothing yet"):
        memory.report()


def test_sampling_costs_less_than_one_percent() -> None:
    shares = []
    with MemoryTracker("idle", device="cpu"):
        for _ in range(3):  # the least of three: other processes of a busy machine only ever add
            begin_cpu, begin = time.process_time(), time.perf_counter()
            time.sleep(0.5)
            shares.append((time.process_time() - begin_cpu) / (time.perf_counter() - begin))
    assert min(shares) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_figures_are_the_allocators() -> None:
    with MemoryTracker("outer") as outer:
        with MemoryTracker("train") as memory:
            kept = torch.empty(8 * 2**20, dtype=torch.uint8, device="cuda")
            del kept
            kept = torch.empty(2**20, dtype=torch.uint8, device="cuda")
        assert memory.gpu_used == 2**20
        assert memory.gpu_peaked == 8 * 2**20
        with MemoryTracker("later") as later:
            pass
    assert kept.numel()
    assert later.gpu_peaked == 0
    assert outer.gpu_peaked == 8 * 2**20
    assert "no GPU" not in memory.report()
