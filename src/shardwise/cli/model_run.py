"""The model, the run and this machine, as flags and settings say them. torch is imported by what is called, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config.machine import file_system, free_disk_bytes, gpu_memory_bytes, usable_memory_bytes, visible_gpus
from ..config.offloads import Offloaded, directories_of
from ..config.schema import Config
from ..errors import ConfigError
from ..estimate.hub import check_path
from .model_flags import Asked, count_of

if TYPE_CHECKING:
    from ..estimate.bytes import Disk, Machine, Run

# What of an estimate lies in the directories of a setting.
_ROLES: dict[Offloaded, tuple[str, ...]] = {"optimizer": ("optimizer",), "param": ("frozen", "parameter")}


def machine_of(config: Config) -> Machine:
    """This machine, as far as it can be told, with the GPUs that the run may use."""
    from ..estimate.bytes import Machine

    gpus = 0 if config.use_cpu else visible_gpus(config.gpu_ids) or 0
    return Machine(gpus, gpu_room(config, gpu_memory_bytes()), usable_memory_bytes(), _disks(config))


def gpu_room(config: Config, nbytes: int | None) -> int | None:
    """What of a GPU of `nbytes` (None: not known) a run may take: all of it, or its gpu_memory_budget where that is a size."""
    limit = config.engine.gpu_memory_budget
    return min(limit, nbytes or limit) if isinstance(limit, int) else nbytes


def model_of(model: str, asked: Asked) -> Any:
    """The model without memory, with what the flags do to it."""
    check_path(model)
    from ..estimate.meta_model import Adapters, build_meta_model

    rank = count_of("--lora_r", asked.lora_r)
    adapters = None
    if rank is not None:
        adapters = Adapters(rank, _names(asked.target_modules), _names(asked.modules_to_save))
    return build_meta_model(model, dtype=asked.dtype, adapters=adapters, quantize=asked.quantize)


def run_of(config: Config, asked: Asked, gpus: int) -> Run:
    """What the bytes depend on besides the model and its plan. gpus: of this machine."""
    from ..estimate.activations import Batch
    from ..estimate.bytes import Run
    from ..plan.precision import Precision

    engine, length = config.engine, count_of("--sequence_length", asked.sequence_length)
    world_size = config.num_processes or max(1, gpus) * config.num_machines
    local_processes = -(-world_size // config.num_machines)
    said = config.zero.shard_group
    group = said if isinstance(said, int) else local_processes if said == "machine" else world_size
    if world_size % group:
        raise ConfigError(f"--shard_group: {group} does not divide {world_size} processes; take a number that does")
    batch = None
    if length is not None:
        rows = engine.micro_batch_size or 1
        checkpointing = asked.checkpointing or engine.activation_checkpointing != "none"
        batch = Batch(rows, length, checkpointing, asked.attention, engine.loss_chunk_tokens, engine.loss_keeps_logits)
    return Run(
        world_size=world_size,
        local_processes=local_processes,
        precision=Precision.named(config.mixed_precision, engine.reduce_dtype),
        cuda=not config.use_cpu,
        options=engine,
        accumulates=config.gradient_accumulation_steps > 1,
        batch=batch,
        shard_group=None if group == world_size else group,
        all_own=config.zero.optimizer_shard_group == "world" and group < world_size,
        directories=max(1, sum(len(paths) for paths in set(_paths(config).values()))),
    )


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _paths(config: Config) -> dict[Offloaded, tuple[str, ...]]:
    """The directories of what rests on a disk."""
    zero = config.zero
    found: dict[Offloaded, tuple[str, ...]] = {
        "optimizer": directories_of(zero.offload_optimizer_nvme_path),
        "param": directories_of(zero.offload_param_nvme_path),
    }
    return {role: paths for role, paths in found.items() if paths}


def _disks(config: Config) -> list[Disk]:
    """The file systems of these directories, each with its part of the bytes. A role without one lies beside the other."""
    from ..estimate.bytes import Disk

    paths = _paths(config)
    anywhere = next(iter(paths.values()), (".",))
    names: dict[object, list[str]] = {}
    shares: dict[object, dict[str, float]] = {}
    for offloaded, roles in _ROLES.items():
        own = paths.get(offloaded, anywhere)
        for path in own:
            place = file_system(path) or path
            if path not in names.setdefault(place, []):
                names[place].append(path)
            for role in roles:
                there = shares.setdefault(place, {})
                there[role] = there.get(role, 0.0) + 1 / len(own)
    return [Disk(" and ".join(of), free_disk_bytes(of[0]), shares[place]) for place, of in names.items()]
