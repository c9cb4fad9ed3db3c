"""A slab in somebody else's file: its bytes, and what is written there meanwhile."""

from __future__ import annotations

import os

import pytest
import torch

from shardwise.errors import StoreError
from shardwise.offload import borrowed, drive
from shardwise.offload.borrowed import BorrowedSlab, Loan
from shardwise.offload.nvme import NvmeStore
from shardwise.ranks.lanes import Lanes


@pytest.fixture
def store(tmp_path):
    made = NvmeStore(tmp_path / "drive", Lanes(torch.device("cpu")), 3)
    yield made
    made.close()


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 100)
    return path


def test_its_bytes_are_those_of_the_file_and_of_memory(store, theirs, monkeypatch):
    monkeypatch.setattr(borrowed, "_MOST", 999)
    slab = BorrowedSlab(
        store, 6000, [Loan(0, 5000, str(theirs), 9), Loan(5010, 6000, str(theirs), 20003)], [(5000, 5010)], "w"
    )
    slab.keep(torch.full((6000,), 7, dtype=torch.uint8))
    whole = theirs.read_bytes()
    expected = whole[9:5009] + b"\7" * 10 + whole[20003:20993]
    assert bytes(slab.read_part(0, 6000).tolist()) == expected
    assert bytes(slab.read_part(4990, 40).tolist()) == expected[4990:5030]
    slab.write_part(5005, torch.full((10,), 8, dtype=torch.uint8))
    assert bytes(slab.read_part(0, 6000).tolist()) == expected[:5005] + b"\x08" * 10 + expected[5015:]
    assert theirs.read_bytes() == whole


def test_what_is_written_while_it_is_read_is_an_error(store, theirs, monkeypatch):
    """Also by the last read of a step, after which nothing would look at the file before the step."""
    slab = BorrowedSlab(store, 500, [Loan(0, 500, str(theirs), 9)], [], "w")
    slab.read_part(0, 500)

    def read(descriptor, buffers, offset):
        with theirs.open("r+b") as file:
            file.write(b"\1" * 600)
        return os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(drive, "read_at", read)
    with pytest.raises(StoreError, match="it has been written since the run has begun"):
        slab.read_part(0, 500)
