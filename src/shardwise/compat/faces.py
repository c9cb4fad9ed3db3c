"""Which names of DeepSpeed are answered, module by module, and where each of them lives here. Data alone: nothing is imported.

`MODULES` is the whole surface; a module or a name that is not in it is refused by `refusal`. `UNSUPPORTED` are classes that
programs import for their `isinstance`, and that nobody can make.
"""

from __future__ import annotations

import difflib

# DeepSpeed's own number comes first: programs compare it. It is the release whose surface this was written from.
VERSION = "0.19.8+shardwise"
HOME = "shardwise.compat.deepspeed"

_ENGINE = {"DeepSpeedEngine": ".engine:DeepSpeedEngine"}
_ZERO = {
    "Init": ".building:Init",
    "GatheredParameters": ".gathering:GatheredParameters",
    "register_external_parameter": ".gathering:register_external_parameter",
    "unregister_external_parameter": ".gathering:unregister_external_parameter",
    "set_z3_leaf_modules": ".leaves:set_z3_leaf_modules",
    "ZeroParamStatus": ".gathering:ZeroParamStatus",
    "ZeroParamType": ".gathering:ZeroParamType",
}
_FRAGMENTS = {
    name: f".fragments:{name}"
    for name in (
        "safe_get_full_fp32_param",
        "safe_get_full_grad",
        "safe_get_full_optimizer_state",
        "safe_set_full_fp32_param",
        "safe_set_full_grad",
        "safe_set_full_optimizer_state",
        "safe_update_full_grad_vectorized",
    )
}
_LEAVES = {
    name: f".leaves:{name}"
    for name in (
        *("set_z3_leaf_modules", "set_z3_leaf_modules_by_name", "set_z3_leaf_modules_by_suffix"),
        *("unset_z3_leaf_modules", "get_z3_leaf_modules", "z3_leaf_module"),
    )
}
_SCHEDULES = {
    name: f"...run.deepspeed_schedules:{name}"
    for name in (
        *("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "VALID_LR_SCHEDULES"),
        *("LR_RANGE_TEST", "ONE_CYCLE", "WARMUP_LR", "WARMUP_DECAY_LR", "WARMUP_COSINE_LR"),
        *("WARMUP_LOG_RATE", "WARMUP_LINEAR_RATE", "LR_RANGE_TEST_MIN_LR", "LR_RANGE_TEST_STEP_RATE"),
        *("LR_RANGE_TEST_STEP_SIZE", "LR_RANGE_TEST_STAIRCASE", "CYCLE_FIRST_STEP_SIZE", "CYCLE_SECOND_STEP_SIZE"),
        *("CYCLE_FIRST_STAIR_COUNT", "CYCLE_SECOND_STAIR_COUNT", "DECAY_STEP_SIZE", "CYCLE_MIN_LR", "CYCLE_MAX_LR"),
        *("DECAY_LR_RATE", "CYCLE_MIN_MOM", "CYCLE_MAX_MOM", "DECAY_MOM_RATE", "WARMUP_MIN_LR", "WARMUP_MAX_LR"),
        *("WARMUP_NUM_STEPS", "WARMUP_TYPE", "WARMUP_MIN_RATIO", "COS_MIN_RATIO", "TOTAL_NUM_STEPS"),
    )
}
_LOGGING = {"logger": ".logs:logger", "log_dist": ".logs:log_dist", "print_rank_0": ".logs:print_rank_0"}
_COMM = {
    name: f".comm:{name}"
    for name in (
        *("init_distributed", "is_initialized", "is_available", "get_rank", "get_world_size", "get_local_rank"),
        *("barrier", "broadcast", "broadcast_object_list", "all_reduce", "all_gather", "all_gather_object"),
        *("all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "reduce_scatter", "gather", "scatter"),
        *("all_to_all_single", "send", "recv", "isend", "irecv", "new_group", "get_world_group", "get_global_rank"),
        *("get_group_rank", "get_process_group_ranks", "destroy_process_group", "ReduceOp", "ProcessGroup", "group"),
        *("monitored_barrier", "get_backend"),
    )
}
_ACCELERATOR = {
    "get_accelerator": ".accelerator:get_accelerator",
    "set_accelerator": ".accelerator:set_accelerator",
    "is_current_accelerator_supported": ".accelerator:is_current_accelerator_supported",
}
_CONVERSION = {
    name: f".zero_to_fp32:{name}"
    for name in (
        "get_fp32_state_dict_from_zero_checkpoint",
        "load_state_dict_from_zero_checkpoint",
        "convert_zero_checkpoint_to_fp32_state_dict",
    )
}

MODULES: dict[str, dict[str, str]] = {
    "deepspeed": {
        "initialize": ".entry:initialize",
        "init_distributed": ".comm:init_distributed",
        "add_config_arguments": ".entry:add_config_arguments",
        "init_inference": ".entry:init_inference",
        "tp_model_init": ".entry:tp_model_init",
        "OnDevice": ".building:OnDevice",
        "DeepSpeedConfigError": ".settings:ConfigError",
        **_ENGINE,
        **_LOGGING,
        "get_accelerator": ".accelerator:get_accelerator",
        "DeepSpeedOptimizerCallable": ".entry:OptimizerCallable",
        "DeepSpeedSchedulerCallable": ".entry:SchedulerCallable",
    },
    "deepspeed.accelerator": _ACCELERATOR,
    "deepspeed.checkpoint": {},
    "deepspeed.checkpoint.utils": {"clone_tensors_for_torch_save": ".copies:clone_tensors_for_torch_save"},
    "deepspeed.comm": _COMM,
    "deepspeed.comm.comm": _COMM,
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": {"DEEPSPEED_ENVIRONMENT_NAME": ".entry:ENVIRONMENT_NAME"},
    "deepspeed.ops": {"__compatible_ops__": ".ops:COMPATIBLE_OPS"},
    "deepspeed.ops.aio": {"AsyncIOBuilder": ".ops:AsyncIOBuilder"},
    "deepspeed.ops.op_builder": {
        name: f".ops:{name}"
        for name in (
            *("AsyncIOBuilder", "CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder", "FusedAdamBuilder"),
            *("FusedLionBuilder", "OpBuilder"),
        )
    },
    "deepspeed.ops.adam": {
        "DeepSpeedCPUAdam": "...run.deepspeed_optimizers:DeepSpeedCPUAdam",
        "FusedAdam": "...run.deepspeed_optimizers:FusedAdam",
    },
    "deepspeed.ops.adagrad": {"DeepSpeedCPUAdagrad": "...run.deepspeed_optimizers:DeepSpeedCPUAdagrad"},
    "deepspeed.ops.lion": {
        "DeepSpeedCPULion": "...run.deepspeed_optimizers:DeepSpeedCPULion",
        "FusedLion": "...run.deepspeed_optimizers:FusedLion",
    },
    "deepspeed.runtime": {},
    "deepspeed.runtime.base_optimizer": {"ZeROOptimizer": ".optimizer:ZeroOptimizer"},
    "deepspeed.runtime.config": {
        "DeepSpeedConfig": ".settings:DeepSpeedConfig",
        "DeepSpeedConfigError": ".settings:ConfigError",
    },
    "deepspeed.runtime.dataloader": {"RepeatingLoader": ".loaders:RepeatingLoader"},
    "deepspeed.runtime.engine": _ENGINE,
    "deepspeed.runtime.lr_schedules": _SCHEDULES,
    "deepspeed.runtime.utils": {
        "clip_grad_norm_": ".copies:clip_grad_norm_",
        "see_memory_usage": ".logs:see_memory_usage",
    },
    "deepspeed.runtime.zero": _ZERO,
    "deepspeed.runtime.zero.stage3": {"DeepSpeedZeroOptimizer_Stage3": ".optimizer:DeepSpeedZeroOptimizer_Stage3"},
    "deepspeed.runtime.zero.stage_1_and_2": {"DeepSpeedZeroOptimizer": ".optimizer:DeepSpeedZeroOptimizer"},
    "deepspeed.runtime.zero.offload_config": {"OffloadDeviceEnum": ".settings:OffloadDeviceEnum"},
    "deepspeed.runtime.zero.partition_parameters": {
        **_ZERO,
        "zero_wrapper_for_fp_tensor_constructor": ".building:zero_wrapper_for_fp_tensor_constructor",
        "_orig_torch_arange": ".building:original_arange",
    },
    "deepspeed.utils": {
        **_FRAGMENTS,
        **_LEAVES,
        **_LOGGING,
        "RepeatingLoader": ".loaders:RepeatingLoader",
        "OnDevice": ".building:OnDevice",
        "is_initialized": ".comm:is_initialized",
    },
    "deepspeed.utils.groups": {
        name: ".groups:" + name.lstrip("_")
        for name in (
            *("_get_data_parallel_group", "_get_data_parallel_world_size", "_get_data_parallel_rank"),
            *("_get_sequence_parallel_group", "_get_sequence_parallel_world_size", "_get_sequence_parallel_rank"),
            *("_get_expert_parallel_group", "_get_model_parallel_world_size", "_get_model_parallel_group"),
        )
    },
    "deepspeed.utils.logging": _LOGGING,
    "deepspeed.utils.zero_to_fp32": _CONVERSION,
    "deepspeed.zero": _ZERO,
}

UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "deepspeed": ("PipelineEngine", "PipelineModule", "InferenceEngine", "DeepSpeedHybridEngine"),
    "deepspeed.ops.adam": ("ZenFlowCPUAdam", "OnebitAdam"),
    "deepspeed.zero": ("TiledLinear", "TiledLinearReturnBias"),
    "deepspeed.runtime.zero": ("TiledLinear", "TiledLinearReturnBias"),
}


def refusal(path: str) -> str:
    """Why `path`, a dotted name of DeepSpeed, is not there."""
    known = [*MODULES, *(f"{module}.{name}" for module, row in MODULES.items() for name in row)]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.85)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"{path} is not answered: in this process shardwise stands for DeepSpeed (shardwise.compat), and does ZeRO 1 to 3 with "
        f"offload, no pipelines, tensor or expert parallelism, inference engine or launcher.{hint} docs/design/deepspeed.md "
        "lists what is there."
    )
