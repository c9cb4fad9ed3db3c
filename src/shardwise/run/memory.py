"""How much memory a part of a run takes, on the GPU and on the host, said in eight lines.

The GPU's figures are exact: torch's caching allocator counts every byte and keeps the maximum. The host has no such
counter per process that can be reset without privileges, so a thread reads the resident set twenty times a second
and keeps the largest; a peak shorter than that may be missed. This file knows nothing of shards or plans.
"""

from __future__ import annotations

import gc
import threading
from types import TracebackType
from typing import Any, ClassVar, Self

import psutil
import torch

from ..ranks.lanes import whole_device
from ..ranks.ranks import Ranks

SAMPLE_INTERVAL_S = 0.05  # a reading with its wake-up takes 60 to 200 us: under 0.4% of one core


class _PeakSampler:
    """The largest resident set of this process between `start` and `stop`, read by a thread of its own.

    The thread is a daemon: should nobody ever call `stop`, it still cannot keep the process alive.
    """

    def __init__(self, process: psutil.Process) -> None:
        self.peak = 0
        self._process = process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="shardwise-memory", daemon=True)

    def start(self) -> None:
        self.read()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after one last reading. Calling it twice does no harm."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self.read()

    def read(self) -> int:
        """The resident set now, in bytes."""
        now = int(self._process.memory_info().rss)
        self.peak = max(self.peak, now)
        return now

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL_S):
            try:
                self.read()
            except psutil.Error:
                return


class MemoryTracker:
    """A context that measures what its body takes, in bytes, and says so in eight lines.

        with MemoryTracker("train") as memory:
            train_one_epoch()
        accelerator.print(memory.report())

    name:   what is measured; it stands in every line.
    device: the device whose memory counts as GPU memory; this process's current CUDA device if None. With a CPU
            device, or without CUDA, the GPU figures are 0 and the report says that there is none.
    ranks:  the ranks of the run; their device is taken when `device` is None.

    gpu_begin, gpu_end, gpu_peak: bytes that torch had allocated on the device on entry and exit, and the most between.
    cpu_begin, cpu_end, cpu_peak: the same of this process's resident set on the host.

    Trackers nest, also on one device: an outer one sees the peaks of those within it. An exception passes through after
    the measurement has ended. Each rank measures itself; nothing is communicated.
    """

    _open: ClassVar[list[MemoryTracker]] = []

    def __init__(self, name: str, device: torch.device | str | int | None = None, ranks: Ranks | None = None) -> None:
        self.name = name
        self.device = _cuda_device(device if device is not None or ranks is None else ranks.device)
        self.gpu_begin = self.gpu_end = self.gpu_peak = 0
        self.cpu_begin = self.cpu_end = self.cpu_peak = 0
        self._sampler: _PeakSampler | None = None
        self._finished = False

    @property
    def gpu_used(self) -> int:
        """Bytes that stayed allocated on the device: end minus begin."""
        return self.gpu_end - self.gpu_begin

    @property
    def gpu_peaked(self) -> int:
        """Bytes by which the device's peak exceeded the beginning."""
        return self.gpu_peak - self.gpu_begin

    @property
    def cpu_used(self) -> int:
        """Bytes by which the resident set grew: end minus begin."""
        return self.cpu_end - self.cpu_begin

    @property
    def cpu_peaked(self) -> int:
        """Bytes by which the resident set's peak exceeded the beginning."""
        return self.cpu_peak - self.cpu_begin

    def __enter__(self) -> Self:
        """Raises RuntimeError if this tracker is already measuring."""
        if self._sampler is not None:
            raise RuntimeError(
                f"the memory tracker {self.name!r} is already measuring; make a second one to nest them."
            )
        gc.collect()
        if self.device is not None:
            torch.cuda.empty_cache()
            # The reset below would erase what the trackers around this one have seen.
            self._tell_the_outer_ones()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.gpu_begin = self.gpu_end = self.gpu_peak = torch.cuda.memory_allocated(self.device)
        sampler = _PeakSampler(psutil.Process())
        self.cpu_begin = self.cpu_end = self.cpu_peak = sampler.read()
        sampler.start()
        self._sampler, self._finished = sampler, False
        MemoryTracker._open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sampler, self._sampler = self._sampler, None
        if self in MemoryTracker._open:
            MemoryTracker._open.remove(self)
        if sampler is None:
            return
        sampler.stop()
        gc.collect()
        if self.device is not None:
            torch.cuda.empty_cache()
            self.gpu_end = torch.cuda.memory_allocated(self.device)
            self.gpu_peak = max(self.gpu_peak, torch.cuda.max_memory_allocated(self.device))
            self._tell_the_outer_ones()
        self.cpu_end = sampler.read()
        self.cpu_peak = sampler.peak
        self._finished = True

    def report(self) -> str:
        """The eight lines, in whole megabytes (2**20 bytes). Raises RuntimeError while nothing has been measured."""
        if not self._finished:
            raise RuntimeError(
                f"the memory tracker {self.name!r} has measured nothing yet; ask after its `with` block."
            )
        gpu = (self.gpu_begin, self.gpu_used, self.gpu_peaked, self.gpu_peak)
        cpu = (self.cpu_begin, self.cpu_used, self.cpu_peaked, self.cpu_peak)
        remark = "" if self.device is not None else " (no GPU)"
        return "\n".join([*self._lines("GPU", gpu, remark), *self._lines("CPU", cpu, "")])

    def _lines(self, kind: str, values: tuple[int, int, int, int], remark: str) -> list[str]:
        heads = [
            f"{kind} Memory before entering the {self.name} :",
            f"{kind} Memory consumed at the end of the {self.name} (end-begin):",
            f"{kind} Peak Memory consumed during the {self.name} (max-begin):",
            f"{kind} Total Peak Memory consumed during the {self.name} (max):",
        ]
        return [f"{head} {_megabytes(value)}{remark}" for head, value in zip(heads, values, strict=True)]

    def _tell_the_outer_ones(self) -> None:
        for outer in MemoryTracker._open:
            if outer.device == self.device and self.device is not None:
                outer.gpu_peak = max(outer.gpu_peak, torch.cuda.max_memory_allocated(self.device))


def _cuda_device(device: Any) -> torch.device | None:
    """The CUDA device to measure, with its index; None where there is none."""
    if not torch.cuda.is_available():
        return None
    chosen = torch.device("cuda" if device is None else device)
    return whole_device(chosen) if chosen.type == "cuda" else None


def _megabytes(count: int) -> int:
    """Whole megabytes, rounded towards zero so that a small loss does not read as -1."""
    return int(count / 2**20)
