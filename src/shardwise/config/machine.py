"""What this machine has, found without torch: CPU cores, memory, CUDA devices.

The launcher must say "8 processes, but 2 GPUs" in well under a second, and importing torch alone takes longer. Where
the number of devices cannot be known this way (ROCm, WSL without nvidia-smi), it is None and torch is asked later.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Where the kernel says what it has killed; a test has files of its own.
GROUPS = Path("/sys/fs/cgroup")
KILLS = (GROUPS / "memory.events", Path("/proc/vmstat"))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the share that its container is allowed."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def host_memory_bytes() -> int | None:
    """Physical memory of the machine, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def memory_limit_bytes() -> int | None:
    """What this process's container may use, or None without a limit."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def usable_memory_bytes() -> int | None:
    """Bytes of host memory that this process may take: the machine's or its container's; None if neither can be told."""
    return min((count for count in (host_memory_bytes(), memory_limit_bytes()) if count is not None), default=None)


def oom_kills() -> int | None:
    """How many processes of this container the kernel has killed for memory so far; None where it does not tell.

    Of this process's own group where it has one, as in a job of a scheduler; else of the whole container, or machine.
    """
    for path in (_own_group() / "memory.events", *KILLS):
        try:
            for line in path.read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except (OSError, ValueError):
            pass
    return None


def _own_group() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    return GROUPS / own.strip("/")


def process_fields(pid: int | str) -> list[str] | None:
    """What the kernel says of a process behind its name: state, parent, group, session, ...; None where it says nothing.

    Its start, in ticks, is the 20th: with the process's number it is one process for good. Source: proc_pid_stat(5).
    """
    try:
        # The name in parentheses may hold anything.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def physical_gpus() -> int | None:
    """CUDA devices of this machine, whatever CUDA_VISIBLE_DEVICES says; None if only torch can tell."""
    # A container sees every GPU of its host in /proc, but has device files for its own only.
    nodes = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[len("nvidia") :].isdigit()]
    if nodes:
        try:
            listed = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
        except OSError:
            listed = 0
        return min(len(nodes), listed) if listed else len(nodes)
    if shutil.which("nvidia-smi"):
        return len(_listed_gpus()) or None
    return None if any(Path(path).exists() for path in ("/dev/kfd", "/dev/dxg", "/dev/nvmap")) else 0


def _listed_gpus() -> list[str]:
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.startswith("GPU ")]


def gpu_names() -> list[str]:
    """One line for each GPU, as the driver lists them; [] where there are none."""
    return _listed_gpus() if shutil.which("nvidia-smi") else []


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest GPU of this machine, as the driver tells it; None where there is none or it does not tell."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = [int(line) for line in answer.stdout.split() if line.isdigit()]
    return min(sizes) << 20 if sizes else None


def free_disk_bytes(path: str | Path) -> int | None:
    """Free bytes where `path` is or would be made; None if that cannot be told."""
    try:
        return shutil.disk_usage(nearest_existing(path)).free
    except OSError:
        return None


def file_system(path: str | Path) -> int | None:
    """A number of the file system where `path` is or would be made, another one for each; None if that cannot be told."""
    try:
        return os.stat(nearest_existing(path)).st_dev
    except OSError:
        return None


def nearest_existing(path: str | Path) -> Path:
    """`path`, or of the directories above it the nearest that is there."""
    place = Path(path).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def visible_gpus(gpu_ids: str | None = None, environ: Mapping[str, str] | None = None) -> int | None:
    """CUDA devices that a process will see; None if only torch can tell.

    gpu_ids: the setting, "0,1" or "all"; numbers there take the place of CUDA_VISIBLE_DEVICES.
    """
    present = physical_gpus()
    if present == 0:
        return 0
    env = os.environ if environ is None else environ
    chosen = gpu_ids if gpu_ids not in (None, "all") else env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    count = 0
    for part in chosen.split(","):
        name = part.strip()
        # CUDA stops at the first name that is no device: the rest of the list is not seen.
        number = int(name) if name.lstrip("-").isdigit() else None
        if not name or (number is not None and (number < 0 or (present is not None and number >= present))):
            break
        count += 1
    return count


_ANYWHERE = "192.0.2.1"  # of no machine (RFC 5737): the way there is the default route
_GET_ADDRESS = 0x8915  # SIOCGIFADDR


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches `address`, by its IPv4; None where it cannot be told.

    Where the name leads to this machine's loopback, as Debian's hosts file has it (127.0.1.1), that of the default route. None
    for an address that is a loopback's in itself: then all is on one machine. Nothing is sent.
    """
    if address == "localhost" or address.startswith("127.") or ":" in address:
        return None
    with suppress(OSError, ImportError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            addresses = {_ask_address(fcntl.ioctl, probe, name): name for _, name in socket.if_nameindex()}
        for target in (address, _ANYWHERE):
            with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                own = str(probe.getsockname()[0])
                if own in addresses and not own.startswith("127."):
                    return addresses[own]
    return None


def _ask_address(ioctl: Any, probe: socket.socket, name: str) -> str | None:
    try:
        return socket.inet_ntoa(ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))[20:24])
    except OSError:  # an interface without an IPv4 address
        return None


def environment_value(name: str) -> str | None:
    """One variable of this process's environment; only config/ reads it."""
    return os.environ.get(name)


def export(variables: Mapping[str, str]) -> None:
    """Put variables into this process's environment, for the processes that it starts."""
    os.environ.update(variables)


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process's environment has these variables too; afterwards it is as it was, whoever has changed it."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
