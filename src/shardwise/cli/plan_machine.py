"""Of which machine `shardwise plan` speaks: this one, or one that flags describe. Without torch.

A flag says a size (80GB, 512GiB) or a rate (25GB/s); what no flag says is this machine's if no GPUs are named, else the data
sheet's of the GPU, or of the commonest one of such memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.fields import budget
from ..config.machine import (
    free_disk_bytes,
    gpu_memory_bytes,
    gpu_names,
    usable_memory_bytes,
    visible_gpus,
)
from ..config.yaml_file import default_file
from ..errors import ConfigError
from ..estimate.kept_terms import FILE, stored
from ..estimate.terms import SHEETS, Sheet, Terms, sheet_named, sheet_of_memory, terms_of, with_values
from .model_flags import count_of

if TYPE_CHECKING:
    from ..estimate.bytes import Machine

_RATE = re.compile(r"([0-9.]+ *[KMGT]?I?B)/S", re.IGNORECASE)
_DRIVE = "/local_nvme"  # where an example's drive is, as the questions of `config` have it


@dataclass(frozen=True)
class MachineAsked:
    """The flags, as they were typed. gpus: of each machine. link: one way. nvme: free bytes of a drive. drive: its rate."""

    gpus: str | None = None
    gpu: str | None = None
    gpu_memory: str | None = None
    host_memory: str | None = None
    link: str | None = None
    network: str | None = None
    nvme: str | None = None
    drive: str | None = None

    @property
    def described(self) -> bool:
        """Whether it is another machine than this."""
        return any((self.gpus, self.gpu, self.gpu_memory))


@dataclass(frozen=True)
class Described:
    """gpus: of each machine. nvme_path: where what rests on a drive goes; None: no drive. notes: where terms are from."""

    gpus: int
    gpu_nbytes: int
    host_nbytes: int | None
    disk_nbytes: int | None
    nvme_path: str | None
    terms: Terms
    notes: tuple[str, ...]

    def machine(self) -> Machine:
        from ..estimate.bytes import Disk, Machine

        disks = []
        if self.nvme_path is not None:
            disks = [Disk(self.nvme_path, self.disk_nbytes, dict.fromkeys(("optimizer", "frozen", "parameter"), 1.0))]
        return Machine(self.gpus, self.gpu_nbytes, self.host_nbytes, disks)


def described(asked: MachineAsked, gpu_ids: str | None, nvme_path: str | None) -> Described:
    """The machine that is meant. nvme_path: of the settings. Raises ConfigError for a flag, or where no GPU is known."""
    known, notes, terms_here = _gpu(asked, gpu_ids)
    count, nbytes, sheet = known
    terms = with_values(terms_of(sheet), terms_here)
    if asked.link is not None:
        link = _rate("--link", asked.link)
        terms = replace(terms, up=link, both=link * min(1.0, terms.both / terms.up))
    if asked.network is not None:
        terms = replace(terms, network=_rate("--network", asked.network))
    if asked.drive is not None:
        terms = replace(terms, read=_rate("--drive", asked.drive), write=_rate("--drive", asked.drive))
    host = _size("--host_memory", asked.host_memory)
    path, free = nvme_path, None
    if asked.nvme is not None:
        path, free = nvme_path or _DRIVE, _size("--nvme", asked.nvme)
    elif nvme_path is not None and not asked.described:
        free = free_disk_bytes(nvme_path)
    if path is None:
        notes = (*notes, "without plans on a drive: say --nvme SIZE, or --offload_optimizer_nvme_path DIR")
    if host is None and not asked.described:
        host = usable_memory_bytes()
    elif host is None:
        notes = (*notes, "host memory is taken to be enough: say --host_memory SIZE")
    return Described(count, nbytes, host, free, path, terms, notes)


def _gpu(
    asked: MachineAsked, gpu_ids: str | None
) -> tuple[tuple[int, int, Sheet], tuple[str, ...], Mapping[str, float]]:
    """(how many GPUs, bytes of one, its sheet), notes, and terms that were measured here."""
    count = count_of("--gpus", asked.gpus)
    nbytes = _size("--gpu_memory", asked.gpu_memory)
    if asked.described:
        if asked.gpu is not None:
            named = sheet_named(asked.gpu)
            if named is None:
                raise ConfigError(f"--gpu: {asked.gpu!r} is not known; known are {', '.join(SHEETS)}")
            name, sheet = named
            note = f"rates of an {name} by its data sheet, times the shares that an H200 reached of its own"
        elif nbytes is not None:
            name, sheet = sheet_of_memory(nbytes)
            note = f"rates of an {name}, the commonest GPU of that memory: say --gpu NAME for another"
        else:
            raise ConfigError("--gpus: also say which: --gpu NAME, as H100, or --gpu_memory SIZE")
        return (count or 1, nbytes or sheet.nbytes, sheet), (note,), {}
    here = _gpu_here(gpu_ids)
    if here is None:
        raise ConfigError("this machine has no GPU: describe one, as --gpus 8 --gpu H100 --host_memory 1TB")
    return here


def _gpu_here(gpu_ids: str | None) -> tuple[tuple[int, int, Sheet], tuple[str, ...], Mapping[str, float]] | None:
    """The same of this machine; None where it has no GPU that is named."""
    here, names = visible_gpus(gpu_ids), gpu_names()
    if here == 0 or not names:
        return None
    nbytes = gpu_memory_bytes() or 0
    named = sheet_named(names[0])
    name, sheet = named if named is not None else sheet_of_memory(nbytes)
    kept = stored(terms_file(), names)
    note = (
        f"{len(kept)} terms measured on this machine"
        if kept
        else f"terms by the data sheet of an {name}; to measure: --measure"
    )
    if named is None and not kept:
        note = f"{names[0]} is not known: terms of an {name}; to measure: --measure"
    return (here or len(names), nbytes or sheet.nbytes, sheet), (note,), kept


def terms_here(gpu_ids: str | None) -> Terms | None:
    """The terms of this machine; None where it has no GPU that is named. Raises ConfigError for a wrong file of terms."""
    here = _gpu_here(gpu_ids)
    return None if here is None else with_values(terms_of(here[0][2]), here[2])


def terms_file() -> Path:
    """Where measured terms are kept: beside the configuration in the user's cache."""
    return default_file().with_name(FILE)


def _size(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        found = budget(text)
    except ValueError:
        found = "auto"
    if not isinstance(found, int) or found <= 0:
        raise ConfigError(f"{flag}: {text!r} is not a size such as 80GB")
    return found


def _rate(flag: str, text: str) -> float:
    match = _RATE.fullmatch(text.strip())
    try:
        found = budget(match[1]) if match else "auto"
    except ValueError:
        found = "auto"
    if not isinstance(found, int) or found <= 0:
        raise ConfigError(f"{flag}: {text!r} is not a rate such as 25GB/s")
    return float(found)


def tokens_of(text: str | None) -> float | None:
    """1B is 10^9 tokens. Raises ConfigError for what is no number."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMBT]?)", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--tokens: {text!r} is not a number of tokens such as 1B or 300M")
    return float(match[1]) * 1000.0 ** " KMBT".index(match[2] or " ")
