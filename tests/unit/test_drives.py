"""Which drive a directory is on, told from /proc and /sys as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwise.config import drives
from shardwise.config.check import checked
from shardwise.config.drives import Drive, drive_notes, drive_of, not_nvme


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(kind, source, blocks)`: tmp_path is a mount of this kind. blocks: name -> its disk, or what it is made of."""

    def made(kind, source, blocks=(), rotational=()):
        place, devices = tmp_path / "block", tmp_path / "devices"
        place.mkdir()
        for name, below in dict(blocks).items():
            own = devices / (below if isinstance(below, str) else "") / name
            own.mkdir(parents=True, exist_ok=True)
            if isinstance(below, str):
                (own / "partition").write_text("1\n")
            for part in below if isinstance(below, list) else ():
                (own / "slaves" / part).mkdir(parents=True)
            (own / "queue").mkdir(exist_ok=True)
            (own / "queue" / "rotational").write_text(f"{int(name in rotational)}\n")
            (place / name).symlink_to(own)
        mounts = tmp_path / "mountinfo"
        number = os.stat(tmp_path).st_dev
        own = f"{os.major(number)}:{os.minor(number)}"
        mounts.write_text(
            f"1 0 0:1 / / rw - rootfs rootfs rw\n2 1 {own} / {tmp_path} rw,relatime shared:1 - {kind} {source} rw\nodd line\n"
        )
        monkeypatch.setattr(drives, "BLOCKS", place)
        monkeypatch.setattr(drives, "MOUNTS", mounts)
        return tmp_path / "not" / "there" / "yet"

    return made


def test_a_partition_and_a_volume_lie_on_their_disks(machine):
    blocks = {"nvme0n1": None, "nvme1n1": None, "nvme0n1p2": "nvme0n1", "dm-0": ["nvme0n1p2", "nvme1n1"]}
    path = machine("ext4", "/dev/dm-0", blocks)
    assert drive_of(path) == Drive("ext4", ("nvme0n1", "nvme1n1"))
    assert not_nvme(path) is None


@pytest.mark.parametrize(
    ("kind", "source", "blocks", "rotational", "told"),
    [
        ("ext4", "/dev/sda1", {"sda": None, "sda1": "sda"}, ["sda"], "on sda, which the system calls a turning disk"),
        ("xfs", "/dev/sdb", {"sdb": None}, [], "on sdb, which is not called an NVMe drive; it may be slower"),
        ("ext4", "/dev/vda", {"vda": None}, ["vda"], "on vda, a virtual disk"),
        ("btrfs", "/dev/dm-1", {"dm-1": ["nvme0n1", "sda"], "nvme0n1": None, "sda": None}, ["sda"], "on nvme0n1, sda"),
        ("tmpfs", "tmpfs", {}, [], "is memory (tmpfs), not a drive"),
        ("nfs4", "server:/home", {}, [], "in a network (nfs4)"),
        ("overlay", "overlay", {}, [], "a file system (overlay) that does not tell its drive"),
    ],
)
def test_what_is_no_nvme_drive_is_said(machine, kind, source, blocks, rotational, told):
    path = machine(kind, source, blocks, rotational)
    text = not_nvme(path)
    assert text is not None
    assert told in text
    assert text.startswith(str(path))


def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(drives, "MOUNTS", tmp_path / "none")
    assert (drive_of(tmp_path), not_nvme(tmp_path)) == (None, None)


def test_each_directory_of_a_run_is_told_once_and_only_where_it_is_used(monkeypatch):
    monkeypatch.setattr(drives, "not_nvme", lambda path: f"{path} is slow" if path != "/fast" else None)
    zero = {"zero_stage": 3, "offload_optimizer_device": "nvme", "offload_param_device": "nvme"}
    paths = {"offload_optimizer_nvme_path": "/slow", "offload_param_nvme_path": "/slow"}
    config = checked({"distributed_type": "DEEPSPEED", "deepspeed_config": {**zero, **paths}})
    assert drive_notes(config) == ["/slow is slow"]
    zero["offload_optimizer_device"] = zero["offload_param_device"] = "cpu"
    assert drive_notes(checked({"distributed_type": "DEEPSPEED", "deepspeed_config": {**zero, **paths}})) == []


def test_this_machine_is_read():
    assert drive_of(Path("/")) is None or drive_of("/").kind
