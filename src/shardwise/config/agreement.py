"""What the ranks of a run must have in common, key by key, and the words for what differs.

Every machine has a configuration file of its own and every process its own environment, so two ranks can be told different
things. `AGREED` has the keys that then change numbers, or the number and order of messages between the ranks; `OWN` those
that are a machine's own, with the reason. Every key of the schema is in one of the two. This file compares plain values; who
carries them from rank to rank is told in `ranks/meeting.py` and `Ranks.compare`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from .compiling import CompileConfig
from .schema import Config, EngineConfig, LossScaleConfig, ZeroConfig

# A machine's own, or of no effect: key -> why ranks may differ in it.
OWN: dict[str, str] = {
    "compute_environment": "has one value",
    "machine_rank": "tells the machines apart",
    "main_process_ip": "machines may reach machine 0 by different names",
    "main_process_port": "the ranks have met when this is compared",
    "rdzv_backend": "the ranks have met when this is compared",
    "same_network": "has no effect on the run",
    "main_training_function": "has no effect",
    "gpu_ids": "the GPUs of this machine",
    "enable_cpu_affinity": "the cores of this machine",
    "dynamo_backend": "the older spelling of dynamo_config.dynamo_backend, which is compared as it is in force",
    "deepspeed_config.deepspeed_config_file": "a path of this machine; what the file says is compared key by key",
    "deepspeed_config.offload_optimizer_nvme_path": "a path of this machine",
    "deepspeed_config.offload_param_nvme_path": "a path of this machine",
    "deepspeed_config.deepspeed_moe_layer_cls_names": "has no effect",
    "deepspeed_config.deepspeed_multinode_launcher": "has no effect on running processes",
    "shardwise_config.threads_per_rank": "the cores of this machine",
    # Refused unless empty: there is nothing to compare.
    **dict.fromkeys(
        (
            *("downcast_bf16", "fsdp_config", "megatron_lm_config", "fp8_config", "mpirun_config"),
            *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env"),
            *("parallelism_config", "commands", "command_file"),
            "deepspeed_config.deepspeed_hostfile",
            "deepspeed_config.deepspeed_exclusion_filter",
            "deepspeed_config.deepspeed_inclusion_filter",
        ),
        "is empty",
    ),
}

# Compared. A size of memory is here too: the rank with the least room decides, so machines with different GPUs need no
# different numbers; and a rank without a budget would not take part where the others ask each other for theirs.
AGREED: tuple[str, ...] = (
    "distributed_type",
    "mixed_precision",
    "num_processes",
    "num_machines",
    "use_cpu",
    "debug",
    "deepspeed_config.zero_stage",
    "deepspeed_config.gradient_accumulation_steps",
    "deepspeed_config.gradient_clipping",
    "deepspeed_config.offload_optimizer_device",
    "deepspeed_config.offload_param_device",
    "deepspeed_config.zero3_init_flag",
    "deepspeed_config.zero3_save_16bit_model",
    "shardwise_config.reduce_dtype",
    "shardwise_config.prefetch_units",
    "shardwise_config.gather_with",
    "shardwise_config.units",
    "shardwise_config.whole_adapters",
    "shardwise_config.gpu_memory_budget",
    "shardwise_config.generation_memory_budget",
    "shardwise_config.scheduler_steps_per_process",
    "shardwise_config.collective_timeout_s",
    "shardwise_config.loss_chunk_tokens",
    "shardwise_config.loss_keeps_logits",
    "shardwise_config.fast_lora",
    "shardwise_config.activation_checkpointing",
    "shardwise_config.max_restarts",
    "shardwise_config.restart_processes",
    "shardwise_config.loss_scale.static",
    "shardwise_config.loss_scale.initial",
    "shardwise_config.loss_scale.growth_interval",
    "shardwise_config.loss_scale.hysteresis",
    "shardwise_config.loss_scale.minimum",
    "shardwise_config.train_batch_size",
    "shardwise_config.micro_batch_size",
    "dynamo_config.dynamo_backend",
    "dynamo_config.dynamo_mode",
    "dynamo_config.dynamo_use_fullgraph",
    "dynamo_config.dynamo_use_dynamic",
    "dynamo_config.dynamo_use_regional_compilation",
)

VERSIONS = ("shardwise version", "torch version")
OBJECTS = "the list of objects"
# Where one of these differs, other facts differ with it: they are told alone.
_ALONE = (VERSIONS[0], OBJECTS)
_SECTIONS: dict[str, type[BaseModel]] = {
    "deepspeed_config": ZeroConfig,
    "shardwise_config": EngineConfig,
    "dynamo_config": CompileConfig,
    "shardwise_config.loss_scale": LossScaleConfig,
}
SAME_EVERYWHERE = "Give every machine the same configuration, flags and packages, and every rank the same script."
_MOST = 8  # differences that one error lists


def keys_of_schema() -> list[str]:
    """Every key of the configuration that has no keys below it, dotted."""
    found: list[str] = []
    models: list[tuple[str, type[BaseModel]]] = [("", Config)]
    models += [(f"{name}.", section) for name, section in _SECTIONS.items()]
    for above, model in models:
        found += [f"{above}{name}" for name in model.model_fields if f"{above}{name}" not in _SECTIONS]
    return found


def settings_of(config: Config) -> dict[str, Any]:
    """The settings in force that ranks must have in common: dotted key -> plain JSON value.

    What two spellings say alike is alike here: a section that is not there has its defaults.
    """
    values = config.model_dump(mode="json")
    values["deepspeed_config"] = config.zero.model_dump(mode="json")
    values["dynamo_config"] = (config.compiling or CompileConfig()).model_dump(mode="json")
    found: dict[str, Any] = {}
    for key in AGREED:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


@dataclass(frozen=True)
class Difference:
    """A fact that not all ranks have alike. ranks: by its value, as text, in the order of the ranks."""

    key: str
    ranks: dict[str, list[int]]

    def __str__(self) -> str:
        """`zero_stage is 3 on ranks 0-2 and 2 on rank 3`."""
        return f"{self.key} is " + " and ".join(
            f"{value} on {ranks_said(ranks)}" for value, ranks in self.ranks.items()
        )

    @property
    def first_other(self) -> int:
        """The first rank that differs from rank 0."""
        return min(ranks[0] for ranks in list(self.ranks.values())[1:])


def differences(rows: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """What is not the same in all rows, one for each rank."""
    found: dict[str, Difference] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        ranks: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            ranks.setdefault(said(row[key]) if key in row else "not there", []).append(rank)
        if len(ranks) > 1:
            found[key] = Difference(key, ranks)
    if any(key in found for key in _ALONE):
        return [found[key] for key in (*VERSIONS, OBJECTS) if key in found]
    return list(found.values())


def disagreement(what: str, differing: Sequence[Difference], remedy: str) -> str:
    """An error's text for what `differences` found: `the settings of ranks 0 and 1 differ: ...`.

    what: with `{ranks}` where the first two are named that differ.
    """
    first = min(difference.first_other for difference in differing)
    texts = [str(difference) for difference in differing[:_MOST]]
    if len(differing) > _MOST:
        texts.append(f"and {len(differing) - _MOST} more")
    return f"{what.format(ranks=f'ranks 0 and {first}')}: {'; '.join(texts)}. {remedy}"


def ranks_said(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    alone = len(runs) == 1 and runs[0][0] == runs[0][1]
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'' if alone else 's'} {', '.join(parts)}"


def said(value: Any) -> str:
    """A plain value as a configuration file would say it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) and value else json.dumps(value, sort_keys=True)
