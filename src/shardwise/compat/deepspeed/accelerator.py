"""deepspeed.accelerator: the device of this process, CUDA or the CPU, through torch."""

from __future__ import annotations

from typing import Any

import torch

from ...ranks.ranks import Ranks
from .comm import joined

_CHOSEN: list[Any] = []


class Accelerator:
    """What DeepSpeed calls the abstract accelerator. A name that torch.cuda has and this has not is torch.cuda's; on the CPU
    it is refused."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._name = "cuda" if self._cuda else "cpu"

    def _ranks(self) -> Ranks | None:
        return joined()

    def device_name(self, device_index: int | None = None) -> str:
        return self._name if device_index is None or not self._cuda else f"cuda:{device_index}"

    def current_device(self) -> int | str:
        return torch.cuda.current_device() if self._cuda else "cpu"

    def current_device_name(self) -> str:
        return f"cuda:{torch.cuda.current_device()}" if self._cuda else "cpu"

    def device(self, device_index: int | None = None) -> Any:
        return torch.device(self.device_name(device_index))

    def set_device(self, device_index: int) -> None:
        if self._cuda:
            torch.cuda.set_device(device_index)

    def device_count(self) -> int:
        ranks = self._ranks()
        return torch.cuda.device_count() if self._cuda else ranks.local_world_size if ranks is not None else 1

    def is_available(self) -> bool:
        return True

    def communication_backend_name(self) -> str:
        return "nccl" if self._cuda else "gloo"

    def is_synchronized_device(self) -> bool:
        return not self._cuda

    def synchronize(self, device_index: int | None = None) -> None:
        if self._cuda:
            torch.cuda.synchronize(device_index)

    def empty_cache(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()

    def is_bf16_supported(self) -> bool:
        return not self._cuda or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor.pin_memory() if self._cuda else tensor

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_allocated(device_index) if self._cuda else 0

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_allocated(device_index) if self._cuda else 0

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device_index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self._cuda or not hasattr(torch.cuda, name):
            raise AttributeError(
                f"get_accelerator().{name} is not answered: shardwise stands for DeepSpeed here, on the device "
                f"{'cuda' if self.__dict__.get('_cuda') else 'cpu'}. Use torch's own functions."
            )
        return getattr(torch.cuda, name)


def get_accelerator() -> Accelerator:
    """The same object at every call."""
    if not _CHOSEN:
        _CHOSEN.append(Accelerator())
    found: Accelerator = _CHOSEN[0]
    return found


def set_accelerator(accelerator: Any) -> None:
    raise NotImplementedError("set_accelerator: shardwise runs on CUDA or the CPU, whichever the run has.")


def is_current_accelerator_supported() -> bool:
    return True
