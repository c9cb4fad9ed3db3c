"""Which drive lies under a directory, as Linux tells it in /proc and /sys: is it an NVMe drive at all?

    directory -> mount (its kind, and where it comes from) -> block device -> the disks that it is made of

A partition lies on its disk, a logical volume or a RAID on several. Of a file system without a block device of this machine (a
network's, a container's overlay, memory) the kind is all that is known. Nothing is opened and nothing is measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .machine import nearest_existing
from .offloads import DEVICES, directories_of
from .schema import Config

BLOCKS = Path("/sys/class/block")
MOUNTS = Path("/proc/self/mountinfo")

_NVME = re.compile(r"nvme\d")
_IN_MEMORY = ("tmpfs", "ramfs")
_VIRTUAL = ("vd", "xvd")  # they say that they turn, whatever lies below
_OF_A_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "ceph", "beegfs", "gpfs", "fuse.sshfs", "virtiofs")


@dataclass(frozen=True)
class Drive:
    """What lies under a directory.

    kind:       of the file system, such as ext4; empty where it is not known.
    disks:      the disks below, by the kernel's names (nvme0n1, sda); none where there is no block device.
    rotational: whether any of them turns.
    """

    kind: str
    disks: tuple[str, ...] = ()
    rotational: bool = False

    @property
    def is_nvme(self) -> bool:
        return bool(self.disks) and all(_NVME.match(name) for name in self.disks)


def drive_of(path: str | Path) -> Drive | None:
    """The drive where `path` is or would be made; None where the system does not tell (it is not Linux)."""
    place = nearest_existing(path)
    try:
        number = os.stat(place).st_dev
        mounts = list(_mounts(MOUNTS.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return None
    own = f"{os.major(number)}:{os.minor(number)}"
    # By its number where the kernel lists it so; btrfs has numbers of its own, then the mount whose point is nearest.
    named = [mount for mount in mounts if mount[0] == own]
    inside = [mount for mount in mounts if place.is_relative_to(mount[1])]
    found = named or sorted(inside, key=lambda mount: len(mount[1]))[-1:]
    if not found:
        return None
    _, _, kind, source = found[0]
    device = Path(os.path.realpath(source)).name if source.startswith("/dev/") else ""
    disks = tuple(sorted(set(_disks(device)))) if device else ()
    return Drive(kind, disks, any(_reads(BLOCKS / disk / "queue" / "rotational") == "1" for disk in disks))


def not_nvme(path: str | Path) -> str | None:
    """What `path` lies on, where that is no NVMe drive or cannot be seen to be one; None where it is one."""
    drive = drive_of(path)
    if drive is None or drive.is_nvme:
        return None
    if drive.kind in _IN_MEMORY:
        return f"{path} is memory ({drive.kind}), not a drive: what is offloaded there still takes host memory"
    if drive.kind in _OF_A_NETWORK:
        return f"{path} is in a network ({drive.kind}), not on an NVMe drive: steps will wait for it"
    if not drive.disks:
        return f"{path} is on a file system ({drive.kind}) that does not tell its drive; an NVMe drive cannot be seen"
    names = ", ".join(drive.disks)
    if all(name.startswith(_VIRTUAL) for name in drive.disks):
        return f"{path} is on {names}, a virtual disk: an NVMe drive cannot be seen below it, so try how fast it is"
    if drive.rotational:
        return f"{path} is on {names}, which the system calls a turning disk, not an NVMe drive: steps will wait for it"
    return f"{path} is on {names}, which is not called an NVMe drive; it may be slower"


def drive_notes(config: Config) -> list[str]:
    """What is to be said of the directories of a run that offloads to a drive, each once."""
    zero = config.zero
    used = [
        (zero.offload_optimizer_device, zero.offload_optimizer_nvme_path),
        (zero.offload_param_device, zero.offload_param_nvme_path),
    ]
    paths = [path for device, paths in used if DEVICES[device].on_disk for path in directories_of(paths)]
    return [text for path in dict.fromkeys(paths) if (text := not_nvme(path)) is not None]


def _mounts(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Number, mount point, kind and source of each line of mountinfo; proc(5) has the form."""
    for line in text.splitlines():
        own, _, rest = line.partition(" - ")
        fields, after = own.split(), rest.split()
        if len(fields) >= 5 and len(after) >= 2:
            point = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
            yield fields[2], point, after[0], after[1]


def _disks(device: str) -> Iterator[str]:
    """The disks that a block device is made of: a partition's, and all of a volume's."""
    place = BLOCKS / device
    if not place.exists():
        return
    below = [entry.name for entry in (place / "slaves").iterdir()] if (place / "slaves").is_dir() else []
    if below:
        for name in below:
            yield from _disks(name)
    elif (place / "partition").exists():
        yield place.resolve().parent.name
    else:
        yield device


def _reads(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
