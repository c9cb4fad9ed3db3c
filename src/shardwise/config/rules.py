"""Which settings go together: a table of rules over a whole configuration, and what is legal but without effect.

A rule names the key that an error is told of and looks at a Config whose values are right one by one; `check.py` asks all of
them before anything starts. What a plan refuses too is said in `offloads.py`, once for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .offloads import DEVICES, WITH_DIRECTORY, no_directory, refused_offload, states_stay
from .schema import Config, Key, LossScaleConfig

# What is wrong with a configuration, or None.
Look = Callable[[Config], str | None]


@dataclass(frozen=True)
class Problem:
    """Something wrong with one key. `also` names the other keys that the rule looked at."""

    key: Key
    text: str
    also: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Rule:
    """Settings that cannot all be meant. key: that the error is told of. also: the others that `look` compares it with."""

    key: Key
    also: tuple[Key, ...]
    look: Look


RULES: list[Rule] = []


def conflicts(config: Config) -> list[Problem]:
    """Every set of settings that cannot all be meant, in the order of the rules."""
    found = ((rule, rule.look(config)) for rule in RULES)
    return [Problem(rule.key, text, rule.also) for rule, text in found if text is not None]


def _rule(key: str, *also: str) -> Callable[[Look], Look]:
    """The function below is the rule of this dotted key."""

    def add(look: Look) -> Look:
        RULES.append(Rule(tuple(key.split(".")), tuple(tuple(name.split(".")) for name in also), look))
        return look

    return add


# ZeRO, and where its shards rest.


@_rule("deepspeed_config", "distributed_type")
def _zero_in_another_run(config: Config) -> str | None:
    kind = config.distributed_type
    if kind == "DEEPSPEED" or config.zero.zero_stage == 0:
        return None
    return f"distributed_type is {kind}, which has no ZeRO; set distributed_type: DEEPSPEED or remove this section"


def _of_zero(key: str, *also: str) -> Callable[[Look], Look]:
    """A rule within a deepspeed_config, which is not looked at where there should be none."""

    def add(look: Look) -> Look:
        _rule(f"deepspeed_config.{key}", *also)(lambda c: None if _zero_in_another_run(c) else look(c))
        return look

    return add


@_of_zero("shard_group", "num_processes", "deepspeed_config.zero_stage")
def _groups_that_do_not_divide(config: Config) -> str | None:
    size, processes = config.zero.shard_group, config.num_processes
    if not isinstance(size, int) or not config.zero.zero_stage or processes is None or processes % size == 0:
        return None
    return f"{size} does not divide the {processes} processes; take a number that does, machine or world"


@_of_zero("optimizer_shard_group", "deepspeed_config.shard_group", "deepspeed_config.zero_stage")
def _states_over_all_ranks(config: Config) -> str | None:
    zero = config.zero
    if zero.optimizer_shard_group == "shard_group" or zero.shard_group == "world" or zero.zero_stage not in (1, 2):
        return None
    return (
        f"world keeps shard_group: {zero.shard_group} for the weights alone, and at zero_stage {zero.zero_stage} these are "
        "whole on every rank; take shard_group: world, which shards the same over all ranks, or zero_stage 3"
    )


@_of_zero("offload_param_device", "deepspeed_config.zero_stage")
def _param_is_whole(config: Config) -> str | None:
    return refused_offload("param", config.zero.offload_param_device, config.zero.zero_stage)


@_of_zero("offload_optimizer_device", "deepspeed_config.zero_stage")
def _optimizer_is_whole(config: Config) -> str | None:
    return refused_offload("optimizer", config.zero.offload_optimizer_device, config.zero.zero_stage)


@_of_zero("offload_optimizer_nvme_path", "deepspeed_config.offload_optimizer_device")
def _optimizer_without_directory(config: Config) -> str | None:
    device = config.zero.offload_optimizer_device
    return no_directory(device) if DEVICES[device].on_disk and not config.zero.offload_optimizer_nvme_path else None


@_of_zero("offload_param_nvme_path", "deepspeed_config.offload_param_device")
def _param_without_directory(config: Config) -> str | None:
    device = config.zero.offload_param_device
    return no_directory(device) if DEVICES[device].on_disk and not config.zero.offload_param_nvme_path else None


@_of_zero("deepspeed_multinode_launcher", "num_machines")
def _another_launcher(config: Config) -> str | None:
    launcher = config.zero.deepspeed_multinode_launcher
    if launcher in (None, "standard") or config.num_machines == 1:
        return None
    return f"{launcher!r} is not supported; write standard and run `shardwise launch` on every machine"


# Devices, processes and machines.


@_rule("use_cpu", "distributed_type")
def _cpu_or_gpus(config: Config) -> str | None:
    if not config.use_cpu or config.distributed_type != "MULTI_GPU":
        return None
    return "true contradicts distributed_type MULTI_GPU; set distributed_type: MULTI_CPU, or use_cpu: false"


@_rule("gpu_ids", "use_cpu")
def _gpus_of_a_cpu_run(config: Config) -> str | None:
    given = config.use_cpu and config.gpu_ids not in (None, "all")
    return f"{config.gpu_ids!r} contradicts use_cpu: true" if given else None


@_rule("num_processes", "num_machines")
def _uneven_machines(config: Config) -> str | None:
    processes, machines = config.num_processes, config.num_machines
    if processes is None or processes % machines == 0:
        return None
    return f"{processes} processes cannot be spread evenly over {machines} machines (it counts all machines)"


@_rule("num_processes", "distributed_type")
def _several_processes_of_one(config: Config) -> str | None:
    if config.distributed_type != "NO" or config.num_processes is None or config.num_processes == 1:
        return None
    return f"{config.num_processes} contradicts distributed_type NO, which is one process; take MULTI_GPU or MULTI_CPU"


@_rule("machine_rank", "num_machines")
def _no_such_machine(config: Config) -> str | None:
    rank, machines = config.machine_rank, config.num_machines
    return f"{rank} is not below num_machines {machines}; ranks of machines count from 0" if rank >= machines else None


@_rule("main_process_ip", "num_machines")
def _no_address(config: Config) -> str | None:
    machines = config.num_machines
    if machines == 1 or config.main_process_ip is not None:
        return None
    return f"is needed with num_machines {machines}: the address of machine 0"


@_rule("main_process_port", "num_machines")
def _no_port(config: Config) -> str | None:
    machines = config.num_machines
    if machines == 1 or config.main_process_port:
        return None
    return f"is needed with num_machines {machines}: a free port of machine 0, the same number on every machine"


@_rule("gpu_ids")
def _odd_gpus(config: Config) -> str | None:
    ids = [part.strip() for part in str(config.gpu_ids).split(",")]
    if config.gpu_ids in (None, "all") or (all(part.isdigit() for part in ids) and len(set(ids)) == len(ids)):
        return None
    return f"{config.gpu_ids!r} is not 'all' or different numbers such as 0,1"


# Precision, batches, graphs.


@_rule("shardwise_config.loss_scale", "mixed_precision")
def _scale_without_fp16(config: Config) -> str | None:
    if config.engine.loss_scale == LossScaleConfig() or config.mixed_precision == "fp16":
        return None
    return f"a loss scale is for mixed_precision fp16 only; mixed_precision is {config.mixed_precision}"


@_rule("shardwise_config.train_batch_size", "num_processes", "shardwise_config.micro_batch_size")
def _batches_that_do_not_multiply(config: Config) -> str | None:
    total, micro, processes = config.engine.train_batch_size, config.engine.micro_batch_size, config.num_processes
    if not total or not micro or not processes or not config.zero.gradient_accumulation_steps:
        return None
    steps = config.gradient_accumulation_steps
    if micro * steps * processes == total:
        return None
    return (
        f"{total} is not {micro} per process x {steps} accumulation step(s) x {processes} process(es) = "
        f"{micro * steps * processes}"
    )


# CUDA graphs read weights where they were recorded.


@_rule("dynamo_config.dynamo_mode", "shardwise_config.gpu_memory_budget")
def _graphs_of_weights_that_move(config: Config) -> str | None:
    compiling = config.compiling
    if compiling is None or not compiling.records_graphs:
        return None
    if config.zero.zero_stage < 3 or config.engine.gpu_memory_budget is not None:
        return None
    return (
        f"{compiling.dynamo_mode} records CUDA graphs, and gathered weights do not stay at one address; set "
        "shardwise_config.gpu_memory_budget, within which they do, or take default"
    )


@_rule("dynamo_config.dynamo_mode", "shardwise_config.activation_checkpointing")
def _graphs_of_blocks_that_change(config: Config) -> str | None:
    compiling = config.compiling
    if compiling is None or not compiling.records_graphs or config.engine.activation_checkpointing != "auto":
        return None
    return (
        f"{compiling.dynamo_mode} records CUDA graphs, and activation_checkpointing: auto changes what a block does "
        "after the third step; take all or none, or dynamo_mode default"
    )


def lies_on_one_machine(group: int, local_processes: int) -> bool:
    """Whether every group of `group` ranks does, where each machine has `local_processes`: machines are filled in turn."""
    return local_processes % group == 0


def _exact_gathers(config: Config) -> str | None:
    """Why the file alone says that no gather sends codes; None where it may."""
    zero, processes = config.zero, config.num_processes
    if config.engine.gather_dtype == "none":
        return None
    if zero.zero_stage < 3:
        return f"at zero_stage {zero.zero_stage}: passes gather no weights"
    if config.num_machines == 1:
        return "on one machine, where weights are gathered exactly"
    group = zero.shard_group
    inside = group == "machine" or (
        isinstance(group, int) and processes and lies_on_one_machine(group, processes // config.num_machines)
    )
    return f"with shard_group {group}: gathers stay on one machine" if inside else None


def notes(config: Config) -> list[str]:
    """Accepted settings without effect in this combination, and facts that a reader of the file may not expect."""
    said = []
    zero = config.zero
    if zero.shard_group != "world" and not zero.zero_stage:
        said.append("shard_group: has no effect at zero_stage 0: nothing is sharded.")
    if zero.optimizer_shard_group == "world" and (zero.shard_group == "world" or not zero.zero_stage):
        why = "nothing is sharded" if not zero.zero_stage else "shard_group is world, so all ranks divide everything"
        said.append(f"optimizer_shard_group: has no effect: {why}.")
    for name in ("zero3_init_flag", "zero3_save_16bit_model"):
        if getattr(zero, name) and zero.zero_stage < 3:
            said.append(f"{name}: has no effect at zero_stage {zero.zero_stage}; it is for zero_stage 3.")
    for name in ("offload_optimizer_nvme_path", "offload_param_nvme_path"):
        if getattr(zero, name) and not DEVICES[getattr(zero, name.replace("nvme_path", "device"))].on_disk:
            said.append(f"{name}: has no effect, because the device is not {WITH_DIRECTORY}.")
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
    if (exact := _exact_gathers(config)) is not None:
        said.append(f"gather_dtype: has no effect {exact}.")
    if config.engine.offload_param_source != "copy" and not DEVICES[zero.offload_param_device].on_disk:
        said.append(f"offload_param_source: has no effect, because offload_param_device is not {WITH_DIRECTORY}.")
    device = zero.offload_optimizer_device
    if config.engine.optimizer_state_dtype != "fp32" and not DEVICES[device].visits(cuda=not config.use_cpu):
        said.append(states_stay(device))
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
