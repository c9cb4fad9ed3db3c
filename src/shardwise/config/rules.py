"""Which settings go together: the check of a whole configuration, all of it, before anything starts.

`check` gives either a Config or every problem at once. Where a key is wrong by itself it is set aside, and the rules
look at the rest; so one run of the launcher shows a wrong type, an unknown key and an illegal pair together. `notes`
tells what is legal but without effect.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from .compiling import CompileConfig
from .schema import Config, EngineConfig, LossScaleConfig, ZeroConfig

Key = tuple[str, ...]

# Keys of a DeepSpeed JSON that people put into a YAML's deepspeed_config, where accelerate does not look at them.
_OF_THE_JSON = {
    *(
        "bf16",
        "fp16",
        "zero_optimization",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "optimizer",
        "scheduler",
    ),
    *("steps_per_print", "wall_clock_breakdown", "activation_checkpointing", "aio", "communication_data_type"),
}

# What other files call a key that has another name, or no use, here. The text follows "unknown key".
_SECTIONS: dict[Key, type[BaseModel]] = {
    (): Config,
    ("deepspeed_config",): ZeroConfig,
    ("shardwise_config",): EngineConfig,
    ("shardwise_config", "loss_scale"): LossScaleConfig,
    ("dynamo_config",): CompileConfig,
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one key. `also` names the other keys that the rule looked at."""

    key: Key
    text: str
    also: tuple[Key, ...] = ()


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean zero_stage?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def check(values: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The Config of `values` and no problem, or None and every problem found."""
    values = _without_legacy(values)
    try:
        config = Config.model_validate(values)
        problems: list[Problem] = []
    except ValidationError as error:
        problems = _problems(error)
        rest = values
        for problem in problems:
            rest = _dropped(rest, problem.key)
        config = Config.model_validate(rest)
    set_aside = {problem.key for problem in problems}
    for problem in _conflicts(config):
        if not {problem.key, *problem.also} & set_aside:
            problems.append(problem)
    return (None, problems) if problems else (config, [])


def _without_legacy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Old files say `fp16: true` where new ones say `mixed_precision: fp16`."""
    plain = dict(values)
    if isinstance(plain.get("fp16"), bool) and plain.pop("fp16"):
        plain.setdefault("mixed_precision", "fp16")
    return plain


def _problems(error: ValidationError) -> list[Problem]:
    found = []
    for detail in error.errors(include_url=False, include_context=False):
        # Positions in a list say nothing to a reader of the file; the key of the list does.
        key = tuple(part for part in detail["loc"] if isinstance(part, str))
        if detail["type"] == "extra_forbidden":
            section = _SECTIONS.get(key[:-1])
            known = sorted(section.model_fields) if section else []
            text = f"unknown key{nearest(key[-1], known) or _section_of(key[-1])}"
            if key[:-1] == ("deepspeed_config",) and key[-1] in _OF_THE_JSON:
                text = (
                    "is a key of DeepSpeed's JSON: put it into the file that deepspeed_config_file names, or write "
                    "mixed_precision, zero_stage and the like here"
                )
        elif detail["type"] == "model_type":
            text = f"{detail['input']!r} is not a section with keys of its own"
        else:
            text = detail["msg"]
        found.append(Problem(key, text))
    return found


def _section_of(word: str) -> str:
    """For a key in the wrong section: the section that has one of that name."""
    for path, model in _SECTIONS.items():
        if word in model.model_fields:
            return f"; it belongs into {'.'.join(path) or 'the top level'}"
    for path, model in _SECTIONS.items():
        close = difflib.get_close_matches(word, sorted(model.model_fields), n=1, cutoff=0.75)
        if close:
            return f"; did you mean {close[0]} of {'.'.join(path) or 'the top level'}?"
    return ""


def _dropped(values: Mapping[str, Any], key: Key) -> dict[str, Any]:
    rest = dict(values)
    if len(key) > 1 and isinstance(rest.get(key[0]), dict):
        rest[key[0]] = _dropped(rest[key[0]], key[1:])
    elif key:
        rest.pop(key[0], None)
    return rest


def _zero(name: str) -> Key:
    return ("deepspeed_config", name)


def _conflicts(config: Config) -> list[Problem]:
    """Every pair of settings that cannot both be meant."""
    found: list[Problem] = []
    stage_key = _zero("zero_stage")
    if config.distributed_type != "DEEPSPEED" and config.zero.zero_stage != 0:
        found.append(
            Problem(
                ("deepspeed_config",),
                f"distributed_type is {config.distributed_type}, which has no ZeRO; set distributed_type: DEEPSPEED "
                "or remove this section",
                (("distributed_type",),),
            )
        )
    else:
        zero = config.zero
        if zero.offload_param_device != "none" and zero.zero_stage != 3:
            found.append(
                Problem(
                    _zero("offload_param_device"),
                    f"{zero.offload_param_device} needs zero_stage 3, where parameters are sharded; zero_stage is "
                    f"{zero.zero_stage}",
                    (stage_key,),
                )
            )
        if zero.offload_optimizer_device != "none" and zero.zero_stage == 0:
            found.append(
                Problem(
                    _zero("offload_optimizer_device"),
                    f"{zero.offload_optimizer_device} needs zero_stage 1, 2 or 3, where the optimizer is sharded; "
                    "zero_stage is 0",
                    (stage_key,),
                )
            )
        for role in ("optimizer", "param"):
            device, path = _zero(f"offload_{role}_device"), _zero(f"offload_{role}_nvme_path")
            if getattr(zero, device[1]) == "nvme" and not getattr(zero, path[1]):
                found.append(
                    Problem(
                        path, "is needed for the device nvme: a directory on the drive, such as /mnt/nvme", (device,)
                    )
                )
        launcher = zero.deepspeed_multinode_launcher
        if launcher not in (None, "standard") and config.num_machines > 1:
            found.append(
                Problem(
                    _zero("deepspeed_multinode_launcher"),
                    f"{launcher!r} is not supported; write standard and run `shardwise launch` on every machine",
                    (("num_machines",),),
                )
            )
    if config.use_cpu and config.distributed_type == "MULTI_GPU":
        found.append(
            Problem(
                ("use_cpu",),
                "true contradicts distributed_type MULTI_GPU; set distributed_type: MULTI_CPU, or use_cpu: false",
                (("distributed_type",),),
            )
        )
    if config.use_cpu and config.gpu_ids not in (None, "all"):
        found.append(Problem(("gpu_ids",), f"{config.gpu_ids!r} contradicts use_cpu: true", (("use_cpu",),)))
    found += _machine_conflicts(config)
    engine = config.engine
    if engine.loss_scale != LossScaleConfig() and config.mixed_precision != "fp16":
        found.append(
            Problem(
                ("shardwise_config", "loss_scale"),
                f"a loss scale is for mixed_precision fp16 only; mixed_precision is {config.mixed_precision}",
                (("mixed_precision",),),
            )
        )
    if engine.train_batch_size and engine.micro_batch_size and config.num_processes:
        product = engine.micro_batch_size * config.gradient_accumulation_steps * config.num_processes
        if product != engine.train_batch_size and config.zero.gradient_accumulation_steps:
            found.append(
                Problem(
                    ("shardwise_config", "train_batch_size"),
                    f"{engine.train_batch_size} is not {engine.micro_batch_size} per process x "
                    f"{config.gradient_accumulation_steps} accumulation step(s) x {config.num_processes} process(es) "
                    f"= {product}",
                    (("num_processes",), ("shardwise_config", "micro_batch_size")),
                )
            )
    return found + _graph_conflicts(config)


def _graph_conflicts(config: Config) -> list[Problem]:
    """CUDA graphs read weights where they were recorded."""
    compiling = config.compiling
    if compiling is None or not compiling.records_graphs:
        return []
    mode = ("dynamo_config", "dynamo_mode")
    found = []
    if config.zero.zero_stage == 3 and config.engine.gpu_memory_budget is None:
        text = (
            f"{compiling.dynamo_mode} records CUDA graphs, and gathered weights do not stay at one address; set "
            "shardwise_config.gpu_memory_budget, within which they do, or take default"
        )
        found.append(Problem(mode, text, (("shardwise_config", "gpu_memory_budget"),)))
    if config.engine.activation_checkpointing == "auto":
        text = (
            f"{compiling.dynamo_mode} records CUDA graphs, and activation_checkpointing: auto changes what a block does "
            "after the third step; take all or none, or dynamo_mode default"
        )
        found.append(Problem(mode, text, (("shardwise_config", "activation_checkpointing"),)))
    return found


def _machine_conflicts(config: Config) -> list[Problem]:
    found: list[Problem] = []
    processes, machines = config.num_processes, config.num_machines
    if processes is not None and processes % machines:
        found.append(
            Problem(
                ("num_processes",),
                f"{processes} processes cannot be spread evenly over {machines} machines (it counts all machines)",
                (("num_machines",),),
            )
        )
    if config.distributed_type == "NO" and processes is not None and processes > 1:
        found.append(
            Problem(
                ("num_processes",),
                f"{processes} contradicts distributed_type NO, which is one process; take MULTI_GPU or MULTI_CPU",
                (("distributed_type",),),
            )
        )
    if config.machine_rank >= machines:
        found.append(
            Problem(
                ("machine_rank",),
                f"{config.machine_rank} is not below num_machines {machines}; ranks of machines count from 0",
                (("num_machines",),),
            )
        )
    if machines > 1 and config.main_process_ip is None:
        found.append(
            Problem(
                ("main_process_ip",),
                f"is needed with num_machines {machines}: the address of machine 0",
                (("num_machines",),),
            )
        )
    if machines > 1 and not config.main_process_port:
        found.append(
            Problem(
                ("main_process_port",),
                f"is needed with num_machines {machines}: a free port of machine 0, the same number on every machine",
                (("num_machines",),),
            )
        )
    if config.gpu_ids not in (None, "all"):
        ids = [part.strip() for part in str(config.gpu_ids).split(",")]
        if not all(part.isdigit() for part in ids) or len(set(ids)) != len(ids):
            found.append(Problem(("gpu_ids",), f"{config.gpu_ids!r} is not 'all' or different numbers such as 0,1"))
    return found


def notes(config: Config) -> list[str]:
    """Accepted settings without effect in this combination, and facts that a reader of the file may not expect."""
    said = []
    zero = config.zero
    for name in ("zero3_init_flag", "zero3_save_16bit_model"):
        if getattr(zero, name) and zero.zero_stage < 3:
            said.append(f"{name}: has no effect at zero_stage {zero.zero_stage}; it is for zero_stage 3.")
    for name in ("offload_optimizer_nvme_path", "offload_param_nvme_path"):
        if getattr(zero, name) and getattr(zero, name.replace("nvme_path", "device")) != "nvme":
            said.append(f"{name}: has no effect, because the device is not nvme.")
    offloads = {zero.offload_optimizer_device, zero.offload_param_device} != {"none"}
    if (
        config.engine.gpu_memory_budget is not None
        and not offloads
        and zero.zero_stage < 3
        and config.engine.activation_checkpointing != "auto"
    ):
        said.append("gpu_memory_budget: has no effect, because nothing is offloaded and every weight is whole.")
    if config.engine.generation_memory_budget != "auto" and zero.zero_stage < 3:
        said.append(f"generation_memory_budget: has no effect at zero_stage {zero.zero_stage}: every weight is whole.")
    if zero.deepspeed_moe_layer_cls_names:
        said.append("deepspeed_moe_layer_cls_names: has no effect; every unit is gathered whole, its experts included.")
    if zero.deepspeed_multinode_launcher not in (None, "standard"):
        said.append("deepspeed_multinode_launcher: has no effect on one machine.")
    if config.compiling is not None and not config.compiling.dynamo_use_regional_compilation:
        said.append("dynamo_use_regional_compilation: has no effect; the model is compiled block by block in any case.")
    if config.compiling is not None and config.engine.fast_lora is True:
        said.append("fast_lora: has no effect on compiled blocks; the compiler fuses the same passes.")
    if config.engine.loss_keeps_logits and config.engine.loss_chunk_tokens is None:
        said.append("loss_keeps_logits: has no effect without loss_chunk_tokens.")
    if config.main_training_function != "main":
        said.append("main_training_function: has no effect; the script is run from its first line.")
    if config.num_machines > 1 and not config.same_network:
        said.append(
            "same_network: false: the ranks still connect to one another directly, so every machine must be reachable "
            f"from every other; machine 0 is reached at {config.main_process_ip}."
        )
    return said
