"""Writes past the page cache: the file has the bytes, however they lie in memory and whatever its file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shardwise.files import disk, past_cache
from shardwise.files.past_cache import PAGE, PastCache
from shardwise.files.writer import BLOCK_NBYTES, Layout, Spec, TensorFile, as_bytes, read_part
from shardwise.offload.pinned import host_tensor

NBYTES = 40 * PAGE


def written(path: Path, data: memoryview, cuts: list[int], start: int) -> bytes:
    """The file after `data` came to it from `start` on, by several threads, in pieces that end at `cuts`."""
    descriptor = disk.create(path, start + data.nbytes)
    past = PastCache(path, descriptor)
    pieces = list(zip([0, *cuts], [*cuts, data.nbytes], strict=True))
    random.Random(0).shuffle(pieces)
    try:
        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(past.write, data[a:b], start + a) for a, b in pieces]:
                done.result()
        past.finish()
        os.fsync(descriptor)
    finally:
        past.close()
        os.close(descriptor)
    return path.read_bytes()[start:]


def some_bytes(shift: int) -> memoryview:
    """NBYTES of chance, that begin `shift` bytes behind a page."""
    memory = host_tensor(NBYTES + PAGE, torch.uint8, pinned=False)[shift : shift + NBYTES]
    memory.copy_(torch.randint(0, 256, (NBYTES,), dtype=torch.uint8))
    return as_bytes(memory)


@pytest.mark.parametrize("start", [0, 1, 1000, PAGE])
@pytest.mark.parametrize("shift", [0, 8, 1000, PAGE - 1])
def test_the_bytes_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, shift: int) -> None:
    monkeypatch.setattr(past_cache, "_BLOCK_NBYTES", 3 * PAGE)
    draw = random.Random(start + shift)
    data = some_bytes(shift)
    cuts = sorted(draw.sample(range(1, NBYTES), 12))
    assert written(tmp_path / "file", data, cuts, start) == bytes(data)


def test_whole_pages_go_past_the_cache_and_edges_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    descriptor = disk.create(path, NBYTES)
    past = PastCache(path, descriptor)
    if past._direct is None:
        pytest.skip("this file system has no way past its cache")
    calls: list[tuple[bool, int, int]] = []
    plain = disk.write

    def write(into: int, data: memoryview, offset: int, path: Path) -> None:
        calls.append((into == descriptor, data.nbytes, offset))
        plain(into, data, offset, path)

    monkeypatch.setattr(disk, "write", write)
    data = some_bytes(8)
    past.write(data[: 10 * PAGE - 8], 8)
    assert calls == [(False, 9 * PAGE, PAGE)]
    past.finish()
    assert calls[1:] == [(True, PAGE - 8, 8)]
    past.close()
    os.close(descriptor)


@pytest.mark.parametrize("refused", ["open", "write"])
def test_without_such_a_way_all_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    if refused == "open":
        monkeypatch.setattr(disk, "open_past_cache", lambda path, access: None)
    else:
        plain = os.pwrite

        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            if _is_direct(descriptor):
                raise OSError(errno.EINVAL, "not here")
            return plain(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
    data = some_bytes(0)
    assert written(tmp_path / "file", data, [5 * PAGE, 5 * PAGE + 7, 20 * PAGE], 0) == bytes(data)


def test_a_full_drive_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    descriptor = disk.create(tmp_path / "file", NBYTES)
    past = PastCache(tmp_path / "file", descriptor)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="full"):
        past.write(some_bytes(0), 0)
    past.close()
    os.close(descriptor)


def test_a_file_written_so_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.files.writer._LARGE", 0)
    values = torch.randn(3 * BLOCK_NBYTES // 8 + 5)
    layout = Layout([Spec("a", torch.float32, tuple(values.shape))], "file")
    assert not layout.start % PAGE
    with TensorFile(tmp_path / "file", layout) as file:
        file.bypass_cache()
        data = as_bytes(values)
        for begin in range(0, data.nbytes, 1_000_000):
            file.write_span(data[begin : begin + 1_000_000], layout.offsets["a"] + begin)
        file.note("a", [zlib.crc32(data[at : at + BLOCK_NBYTES]) for at in range(0, data.nbytes, BLOCK_NBYTES)])
    out = torch.empty_like(values)
    read_part(tmp_path / "file", file.places["a"], 0, out)
    assert torch.equal(out, values)


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
