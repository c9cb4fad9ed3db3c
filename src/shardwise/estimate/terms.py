"""What a machine does in a second: the terms of the model of a step's time, from data sheets or from a measurement.

A term is a rate in bytes or operations a second, or seconds of one thing. Its default is what was measured on two H200s, or is
assumed; docs/scaling.md says which. Another GPU has its data sheet's rates times the share that the H200s reached of theirs.
This file knows nothing of models, plans and tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from ..errors import ConfigError


@dataclass(frozen=True)
class Terms:
    """Bytes or operations a second, and seconds. The comment says where each is from.

    up, both: of one rank's link to its host, with all ranks of the machine at it: one way alone; each way when both are busy.
    """

    nvlink: float = (
        112e9  # measured: 30 GB of gathers in 134 ms on two H200s while the computation runs; 224 to 263e9 alone
    )
    engines: float | None = None  # what gathers get inside a machine, where it is not what NCCL does
    slowing: float = 0.12  # measured: 32 ms over DDP at 2 ranks less 18 ms exposed, over 116 ms of hidden gathers
    per_machine: int = 8  # ranks of one machine
    launch: float = 30e-6  # assumed: a kernel's start on both sides
    latency: float = 5e-6  # assumed: a hop inside a machine
    network: float = 40e9  # assumed: a 400 Gbit/s card for each rank, at 80%
    network_latency: float = 15e-6  # assumed: a hop between machines
    kernel: float = 4e-6  # assumed: one that works on little, behind another on its lane
    memory: float = 4.0e12  # assumed: what streaming kernels reach of an H200's 4.8e12
    matrix: float = 770e12  # measured: a product of large bf16 matrices
    eager: float = 0.86  # learned from DDP's `lora8b`, 479 ms: of `memory`, kernels that are not fused
    attention: float = 0.43  # measured: of `matrix`, causal SDPA forward and backward: 7.7e12 operations in 23.1 ms
    alone: float = 230e9  # measured: a gather or a reduction that nothing runs beside
    up: float = 54.5e9  # measured: pinned copies one way, both ranks at once
    both: float = 37.2e9  # measured: each way, both ways and both ranks at once
    adding: float = 16e9  # measured on a CPU: one thread adds blocks of 8 MiB to a gradient in host memory
    read: float = 1.2e9  # measured: a virtual machine's drive, direct I/O; all ranks of a machine together
    write: float = 2.6e9  # the same
    call: float = 20e-6  # learned from DDP's `bart`, 82 to 101 ms: what the host takes for an operation in a forward
    backward_call: float = 8e-6  # the same, in a backward
    unit_call: float = 1e-4  # measured: 5.7 and 5.0 ms of hooks in a pass of `bart`, over its units and adapters
    compiled_call: float = 1e-3  # learned from `bart` compiled: what the host takes for a compiled block in a pass
    host_step: float = 10e-3  # measured: the device is idle for 9.7 to 13.7 ms of a step, behind its backward

    def over_link(self, up: float, down: float) -> float:
        """Seconds in which so many bytes go up and come down, begun together."""
        return min(up, down) / self.both + abs(up - down) / self.up


@dataclass(frozen=True)
class Sheet:
    """A GPU by its public data sheet: dense bf16 operations a second, bytes a second and bytes of its memory.

    peers: bytes a second that it sends to another GPU of its machine over NVLink; 0: over PCIe. pcie: each way.
    """

    matrix: float
    memory: float
    nbytes: int
    peers: float
    pcie: float


_GEN3, _GEN4, _GEN5 = 16e9, 32e9, 64e9
SHEETS: Mapping[str, Sheet] = {
    "B200": Sheet(2250e12, 8.0e12, 180 * 10**9, 900e9, _GEN5),
    "H200": Sheet(989e12, 4.8e12, 141 * 10**9, 450e9, _GEN5),
    "H100 NVL": Sheet(835e12, 3.9e12, 94 * 10**9, 300e9, _GEN5),
    "H100 PCIe": Sheet(756e12, 2.0e12, 80 * 10**9, 0, _GEN5),
    "H100": Sheet(989e12, 3.35e12, 80 * 10**9, 450e9, _GEN5),
    "A100 40GB": Sheet(312e12, 1.555e12, 40 * 10**9, 300e9, _GEN4),
    "A100 PCIe": Sheet(312e12, 1.935e12, 80 * 10**9, 0, _GEN4),
    "A100": Sheet(312e12, 2.039e12, 80 * 10**9, 300e9, _GEN4),
    "L40S": Sheet(362e12, 0.864e12, 48 * 10**9, 0, _GEN4),
    "L40": Sheet(181e12, 0.864e12, 48 * 10**9, 0, _GEN4),
    "L4": Sheet(121e12, 0.3e12, 24 * 10**9, 0, _GEN4),
    "A10": Sheet(125e12, 0.6e12, 24 * 10**9, 0, _GEN4),
    "RTX 6000 Ada": Sheet(364e12, 0.96e12, 48 * 10**9, 0, _GEN4),
    "RTX A6000": Sheet(155e12, 0.768e12, 48 * 10**9, 0, _GEN4),
    "RTX 5090": Sheet(209e12, 1.792e12, 32 * 10**9, 0, _GEN5),
    "RTX 4090": Sheet(165e12, 1.008e12, 24 * 10**9, 0, _GEN4),
    "RTX 3090": Sheet(71e12, 0.936e12, 24 * 10**9, 0, _GEN4),
}

# Of a data sheet's rate, what two H200s reached: products, streaming, gathers by copy engines and by NCCL, pinned copies one
# way and both. Without NVLink bytes between GPUs cross PCIe twice, and copy engines reach no peer.
MATRIX, MEMORY, ENGINES, ALONE, BESIDE = 0.78, 0.83, 0.68, 0.51, 0.25
UP, BOTH, ACROSS = 0.85, 0.58, 0.35
SLOWING = 0.26  # measured with copy engines: 14 ms over DDP, of which 2 exposed, over 47 ms of hidden gathers


def sheet_named(name: str) -> tuple[str, Sheet] | None:
    """The GPU that `name` says, as a driver or a person does: "NVIDIA H100 80GB HBM3", "4090"; None if it is not known."""
    words = name.upper().replace("-", " ").replace("GEFORCE", "").split()
    for known, sheet in SHEETS.items():
        parts = known.upper().removeprefix("RTX ").split()
        if all(part in words for part in parts):
            return known, sheet
    return None


def sheet_of_memory(nbytes: int) -> tuple[str, Sheet]:
    """The commonest GPU of about so much memory, where nobody has named it."""
    common = ("H200", "H100", "L40S", "A100 40GB", "RTX 5090", "RTX 4090", "B200")
    name = min(common, key=lambda known: abs(SHEETS[known].nbytes - nbytes))
    return name, SHEETS[name]


def terms_of(sheet: Sheet) -> Terms:
    """The terms of such GPUs: the data sheet's rates, times the shares that two H200s reached."""
    across = ACROSS * sheet.pcie
    return Terms(
        matrix=MATRIX * sheet.matrix,
        memory=MEMORY * sheet.memory,
        nvlink=BESIDE * sheet.peers or across,
        alone=ALONE * sheet.peers or across,
        engines=ENGINES * sheet.peers or None,
        slowing=SLOWING if sheet.peers else Terms.slowing,
        up=UP * sheet.pcie,
        both=BOTH * sheet.pcie,
    )


def with_values(terms: Terms, values: Mapping[str, object]) -> Terms:
    """`terms` with those of a measurement in their place; engines of 0: copy engines reach no peer.

    Raises ConfigError for a name or a value that is none.
    """
    known = {one.name for one in fields(Terms)} - {"per_machine"}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{name}: no term of the model; measure again: shardwise plan --measure")
        if name == "engines" and value == 0:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"{name}: {value!r} is not a number above 0; measure again: shardwise plan --measure")
    given = {name: float(value) or None for name, value in values.items() if isinstance(value, (int, float))}
    return replace(terms, **given)  # type: ignore[arg-type]


def as_values(terms: Terms) -> dict[str, float]:
    """For a file, or JSON: what is None is left out."""
    return {name: value for name, value in asdict(terms).items() if value is not None}
