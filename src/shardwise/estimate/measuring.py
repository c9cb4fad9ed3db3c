"""The terms of this machine, measured once: products, memory, attention, the link, the drive, gathers, the host's calls.

All GPUs of the machine measure at one time, from this process, because they share the host's memory. What cannot be measured
here (no GPU, one GPU, no directory on a drive) is left out, and keeps the default of the GPU's name.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..offload.host import HostStore
from ..ranks.lanes import Lanes
from .activations import Batch

# Large enough that a start does not count: 512 MiB of a copy, 4 TFLOP of a product.
_NBYTES, _SIDE = 512 << 20, 12_288
_BLOCK = 8 << 20
Devices = Sequence[torch.device]


def measured(gpus: int, folder: str | None) -> dict[str, float]:
    """Terms by name. gpus: how many of this machine take part. folder: on the drive that is measured; None: no drive.

    Raises ConfigError where a directory cannot be written.
    """
    found: dict[str, float] = {}
    devices = [torch.device("cuda", number) for number in range(gpus)]
    if devices:
        found = {**_products(devices), **_link(devices), **_host(devices[0])}
    if len(devices) > 1:
        found = {**found, **_gathers(devices), "engines": _by_copy_engines(devices)}
    if folder is not None:
        found.update(_drive(Path(folder)))
    return found


def _best(devices: Devices, run: Callable[[int], object], times: int = 5) -> float:
    """Seconds of the fastest of `times` runs on all devices at once, after a first. run: of a device's number."""
    seconds = []
    for _ in range(times + 1):
        _wait(devices)
        begin = time.perf_counter()
        for number in range(len(devices)):
            run(number)
        _wait(devices)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _wait(devices: Devices) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _empty(device: torch.device, nbytes: int = _NBYTES) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def _products(devices: Devices) -> dict[str, float]:
    sides = [(_random(device, _SIDE, _SIDE), _random(device, _SIDE, _SIDE)) for device in devices]
    matrix = 2 * _SIDE**3 / _best(devices, lambda at: torch.mm(*sides[at]))
    pairs = [(_empty(device), _empty(device)) for device in devices]
    memory = 2 * _NBYTES / _best(devices, lambda at: pairs[at][0].copy_(pairs[at][1]))
    rows = [_random(device, 4096, 8192) for device in devices]
    # As an eager norm has it: 6, 8, 8 and 6 bytes of an element are read and written.
    eager = 28 * rows[0].numel() / _best(devices, lambda at: (rows[at].float().pow(2) * 0.5).to(torch.bfloat16))
    heads, n, d = 32, 2048, 128
    inputs = [[_random(device, 2, heads, n, d).requires_grad_() for _ in range(3)] for device in devices]
    gradients = [_random(device, 2, heads, n, d) for device in devices]

    def attend(at: int) -> None:
        query, key, value = inputs[at]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, inputs[at], gradients[at])

    flops = 3.5 * 2 * 2 * heads * n * n * d  # two products of half a square forward, five backward
    return {
        "matrix": matrix,
        "memory": memory,
        "eager": min(1.0, eager / memory),
        "attention": min(1.0, flops / _best(devices, attend) / matrix),
    }


def _link(devices: Devices) -> dict[str, float]:
    lanes = [Lanes(device) for device in devices]
    stores = [HostStore(one) for one in lanes]
    host = [[store.allocate(_NBYTES, torch.uint8, "link").tensor for _ in range(2)] for store in stores]
    there = [[_empty(device) for _ in range(2)] for device in devices]

    def send(at: int) -> None:
        with lanes[at].up.on():
            there[at][0].copy_(host[at][0], non_blocking=True)

    def bring(at: int) -> None:
        with lanes[at].down.on():
            host[at][1].copy_(there[at][1], non_blocking=True)

    def both(at: int) -> None:
        send(at)
        bring(at)

    one_way = _NBYTES / max(_best(devices, send), _best(devices, bring))
    return {"up": one_way, "both": min(one_way, _NBYTES / _best(devices, both))}


def _gathers(devices: Devices) -> dict[str, float]:
    """NCCL's, alone and beside products; bytes that come to a GPU, a second."""
    from torch.cuda import nccl

    size = _NBYTES // len(devices)
    shards = [_empty(device, size) for device in devices]
    wholes = [_empty(device, size * len(devices)) for device in devices]
    comes = size * (len(devices) - 1)
    sides = [(_random(device, _SIDE // 2, _SIDE // 2), _random(device, _SIDE // 2, _SIDE // 2)) for device in devices]

    def gather() -> None:
        nccl.all_gather(shards, wholes)  # on the current stream of each device

    alone = comes / _best(devices, lambda at: gather() if at == 0 else None)
    lanes = [Lanes(device).step for device in devices]
    seconds = []
    for _ in range(4):
        _wait(devices)
        begin = time.perf_counter()
        for lane, side in zip(lanes, sides, strict=True):
            with lane.on():
                for _ in range(32):
                    torch.mm(*side)
        gather()
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"alone": alone, "nvlink": min(alone, comes / min(seconds))}


def _by_copy_engines(devices: Devices) -> float:
    """Bytes a second that each GPU reads of the next one's memory, all at once; 0 where they do not reach it."""
    others = [*devices[1:], devices[0]]
    if not all(torch.cuda.can_device_access_peer(one, other) for one, other in zip(devices, others, strict=True)):
        return 0.0
    own, theirs = [_empty(device) for device in devices], [_empty(device) for device in others]
    return _NBYTES / _best(devices, lambda at: own[at].copy_(theirs[at], non_blocking=True))


def _host(device: torch.device) -> dict[str, float]:
    """What an operation of a small transformer takes the host, in its forward and its backward."""
    from .meta_model import small_decoder
    from .tracing import trace

    counted = trace(small_decoder("meta"), {}, Batch(1, 8), None)
    model = small_decoder(str(device))
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    spent: list[tuple[float, float]] = []
    for _ in range(8):
        begin = time.perf_counter()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        turn = time.perf_counter()
        torch.autograd.backward(loss)
        spent.append((turn - begin, time.perf_counter() - turn))
    calls = [sum(one.calls for one in found.values()) for found in (counted.forward, counted.backward)]
    return {"call": min(a for a, _ in spent) / calls[0], "backward_call": min(b for _, b in spent) / calls[1]}


def _drive(folder: Path) -> dict[str, float]:
    """Direct reads and writes by four threads, as the engine's tier has them; through the cache where that is refused."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, _NBYTES)
            try:
                handle = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            except OSError:
                raise ConfigError(
                    f"{folder}: its file system has no direct I/O, which offloading to it wants"
                ) from None
            try:
                return {"write": _NBYTES / _moved_s(os.pwritev, handle), "read": _NBYTES / _moved_s(os.preadv, handle)}
            finally:
                os.close(handle)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be measured: {error.strerror}") from None


def _moved_s(call: Callable[..., int], handle: int) -> float:
    buffers = [mmap.mmap(-1, _BLOCK) for _ in range(4)]  # these start on a page, as direct I/O wants

    def part(buffer: Any, first: int) -> None:
        for offset in range(first, _NBYTES, len(buffers) * _BLOCK):
            call(handle, [buffer], offset)

    threads = [threading.Thread(target=part, args=(buffer, at * _BLOCK)) for at, buffer in enumerate(buffers)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin
