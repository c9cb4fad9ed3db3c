"""Slabs over several drives, and host memory without copies: the same bytes, whatever way they go."""

from __future__ import annotations

import errno
import os
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from shardwise.errors import StoreError
from shardwise.offload import drive, files
from shardwise.offload.files import PAGE
from shardwise.offload.nvme import NvmeStore
from shardwise.offload.pinned import host_room
from shardwise.offload.striping import BLOCK, Stretch, file_sizes, stretches
from shardwise.ranks.lanes import Lanes

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in "abc"]
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture
def opened(folders):
    stores = []

    def opens(count):
        stores.append(NvmeStore(folders[:count] if count > 1 else folders[0], Lanes(CPU), 0))
        return stores[-1]

    yield opens
    for store in stores:
        store.close()


# Arithmetic.


def test_whole_blocks_go_to_the_drives_in_turn():
    assert stretches(0, 2 * BLOCK + 5, 2, 1) == [
        Stretch(0, BLOCK, 1, 0),
        Stretch(BLOCK, 2 * BLOCK, 0, 0),
        Stretch(2 * BLOCK, 2 * BLOCK + 5, 1, BLOCK),
    ]
    assert stretches(BLOCK - 3, BLOCK + 4, 2, 0) == [
        Stretch(BLOCK - 3, BLOCK, 0, BLOCK - 3),
        Stretch(BLOCK, BLOCK + 4, 1, 0),
    ]
    assert file_sizes(2 * BLOCK + 5, 2, 1) == [BLOCK, BLOCK + 5]
    assert file_sizes(5, 3, 2) == [0, 0, 5]


@pytest.mark.parametrize("drives", [1, 2, 3])
def test_stretches_cover_a_slab_once_and_fill_each_file(drives):
    draw = random.Random(drives)
    for _ in range(200):
        nbytes, start = draw.randrange(1, 9 * BLOCK), draw.randrange(drives)
        cuts = sorted({0, nbytes, *(draw.randrange(nbytes) for _ in range(3))})
        found = [s for begin, end in pairwise(cuts) for s in stretches(begin, end, drives, start)]
        assert [s.first for s in found] == [0, *(s.last for s in found[:-1])]
        for number, size in enumerate(file_sizes(nbytes, drives, start)):
            there = sorted((s.offset, s.last - s.first) for s in found if s.drive == number)
            assert sum(length for _, length in there) == size
            assert all(a + n == b for (a, n), (b, _) in pairwise(there)), "no byte twice, no hole"
        assert max(file_sizes(nbytes, drives, start)) - min(file_sizes(nbytes, drives, start)) <= BLOCK


# Bytes.


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_parts_written_and_read_are_those_of_a_slab_in_memory(opened, monkeypatch, count, direct):
    if not direct:
        real = files._open

        def without(folder, flags):
            if flags:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(folder, flags)

        monkeypatch.setattr(files, "_open", without)
    draw = random.Random(count)
    store = opened(count)
    numel = 5 * BLOCK // 4 + 777
    slab, model = store.allocate(numel, torch.int32, "weights"), torch.zeros(numel, dtype=torch.int32)
    slab.put(model).enqueued()
    page = PAGE // 4
    for turn in range(30):
        begin = draw.randrange(numel // page) * page
        length = min(numel - begin, draw.choice([page, 7 * page, BLOCK // 4, 3 * BLOCK // 4, numel]))
        whole = host_room(length, torch.int32) if draw.random() < 0.5 else torch.empty(length, dtype=torch.int32)
        whole.fill_(turn)
        if draw.random() < 0.5:
            slab.put_parts([whole], begin, given=True)
        else:
            slab.put_parts([whole], begin)
            whole.fill_(-1)  # its owner may do so
        model[begin : begin + length] = turn
        begin = draw.randrange(numel)
        length = draw.randrange(1, numel - begin + 1)
        out = torch.empty(length, dtype=torch.int32) if draw.random() < 0.3 else slab.room(length, CPU)[0]
        slab.fetch(out, begin).enqueued()
        assert torch.equal(out, model[begin : begin + length])
    store.drain()
    assert torch.equal(slab.read_part(0, numel), model)
    assert store.open_files == count
    assert {bool(len(each.files)) for each in store.drives} == {True}


@pytest.mark.parametrize("given", [True, False])
def test_of_two_writes_of_the_same_bytes_the_later_one_stays(opened, monkeypatch, given):
    real, slow = drive.write_at, [0.2, 0.0]

    def write(*args):
        time.sleep(slow.pop(0) if slow else 0.0)
        return real(*args)

    monkeypatch.setattr(drive, "write_at", write)
    store = opened(1)
    slab = store.allocate(4 * PAGE, torch.uint8, "weights")
    for value, begin, numel in ((1, 0, 4 * PAGE), (2, PAGE, PAGE)):
        content = host_room(numel, torch.uint8)
        slab.put_parts([content.fill_(value)], begin, given=given)
    store.drain()
    assert slab.read_part(0, 4 * PAGE).view(4, PAGE)[:, 0].tolist() == [1, 2, 1, 1]


def test_whole_pages_of_host_memory_go_without_blocks(opened):
    store = opened(1)
    slab = store.allocate(3 * BLOCK, torch.uint8, "weights")
    (content,) = slab.room(slab.numel, CPU)
    content.random_(0, 255)
    slab.put_parts([content], given=True)
    store.drain()
    before = content._version
    kept = content.clone()
    slab.fetch(content.zero_()).enqueued()
    assert torch.equal(content, kept)
    assert content._version > before + 1, "autograd sees that it was written"
    assert store.staging_nbytes == 0
    slab.put(content).enqueued()
    assert store.staging_nbytes > 0, "what somebody may write goes through blocks"


def test_what_was_given_lives_until_it_is_written_and_is_bounded(opened, monkeypatch):
    """More than the blocks would hold is never kept."""
    store = opened(1)
    most, now = [0], [0]
    slab = store.allocate(20 * BLOCK, torch.uint8, "weights")
    take, give = store.drives[0].take_turn, store.drives[0].give_turn

    def taking():
        take()
        now[0] += 1
        most[0] = max(most[0], now[0])

    def giving():
        now[0] -= 1
        give()

    monkeypatch.setattr(store.drives[0], "take_turn", taking)
    monkeypatch.setattr(store.drives[0], "give_turn", giving)
    for number in range(20):
        part = host_room(BLOCK, torch.uint8).fill_(number)
        slab.put_parts([part], number * BLOCK, given=True)
        del part
    store.drain()
    found = slab.read_part(0, slab.numel).view(20, BLOCK)
    assert torch.equal(found[:, 0], torch.arange(20, dtype=torch.uint8))
    assert (found == found[:, :1]).all()
    assert 0 < most[0] <= 8


def test_small_slabs_lie_on_all_drives_too(opened):
    store = opened(3)
    slabs = [store.allocate(100, torch.float32, f"bias {number}") for number in range(6)]
    assert [len(each.files) for each in store.drives] == [2, 2, 2]
    assert all(len(slab.files) == 1 for slab in slabs)


# What they say.


def test_a_full_second_drive_is_told_by_its_name_and_the_first_gives_its_space_back(opened, folders, monkeypatch):
    store = opened(2)
    real = os.posix_fallocate
    second = set()

    def fallocate(descriptor, offset, length):
        if descriptor in second:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, length)

    make = store.drives[1].files.make

    def made():
        file = make()
        second.add(file.descriptor)
        return file

    monkeypatch.setattr(store.drives[1].files, "make", made)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    slab = store.allocate(3 * BLOCK, torch.uint8, "weights")
    words = (
        rf"rank 0 could not take 8,388,608 bytes for weights in {folders[1]}: No space left on device\. Give nvme_path"
    )
    with pytest.raises(StoreError, match=words):
        store.drain()
    with pytest.raises(StoreError, match=words):
        slab.read_part(0, 5)
    assert [len(each.files) for each in store.drives] == [0, 0]
    assert store.nbytes == 0


@pytest.mark.parametrize("way", ["write", "read"])
def test_a_drive_that_fails_is_told_by_its_name(opened, folders, monkeypatch, way):
    store = opened(2)
    slab = store.allocate(2 * BLOCK, torch.uint8, "weights")
    slab.put(torch.ones(slab.numel, dtype=torch.uint8)).enqueued()
    store.drain()
    real = getattr(drive, f"{way}_at")

    def failing(descriptor, buffers, offset):
        if descriptor == slab.files[1].descriptor:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(drive, f"{way}_at", failing)
    slab.put(torch.zeros(slab.numel, dtype=torch.uint8)).enqueued()
    words = rf"could not {way} 8,388,608 bytes of weights in {folders[1]}: Input/output"
    if way == "write":
        with pytest.raises(StoreError, match=words):
            store.drain()
    with pytest.raises(StoreError, match=words):
        slab.read_part(0, slab.numel)
    assert slab.read_part(0, BLOCK).sum() == 0, "the other drive's bytes are there"


def test_several_paths_are_each_there_once(folders, tmp_path, caplog):
    lanes = Lanes(CPU)
    with pytest.raises(
        StoreError, match=rf"{tmp_path}/none: No such file or directory\. Each of several paths must exist"
    ):
        NvmeStore([folders[0], tmp_path / "none"], lanes, 0)
    assert not (tmp_path / "none").exists()
    (tmp_path / "link").symlink_to(folders[0])
    with pytest.raises(StoreError, match=rf"rank 2: {folders[0]} and {tmp_path}/link of nvme_path are one directory"):
        NvmeStore([folders[0], folders[1], tmp_path / "link"], lanes, 2)
    with pytest.raises(StoreError, match="are one directory"):
        NvmeStore([folders[0], folders[0]], lanes, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=rf"could not put files into {tmp_path}/file: "):
        NvmeStore([folders[0], tmp_path / "file"], lanes, 0)
    store = NvmeStore(folders[:2], lanes, 0)
    assert "several of" in caplog.text
    assert "one file system" in caplog.text
    store.close()
    assert all(list(Path(folder).iterdir()) == [] for folder in folders)
