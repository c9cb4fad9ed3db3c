"""What each name of accelerate is in shardwise: the same, wider, or refused and why; its home, and where scripts import it.

    HOMES     home -> names       what can be imported and used WIDER     name -> how         where ours takes or gives more
    than accelerate's REFUSED   reason -> names     can be imported, says the reason when it is used (`refused.py`) MODULES
    path -> names       accelerate's modules, below `shardwise`; nothing of its `commands` ALIASES   path -> home
    modules of shardwise with a public path of their own, which have what accelerate's of that name has

`tests/unit/test_names.py` holds it against the accelerate that is installed. This file is data: it imports nothing heavy.
"""

from __future__ import annotations

from typing import NamedTuple

HOMES: dict[str, str] = {
    "front.accelerator": "Accelerator",
    "run.accumulation": "GradientAccumulationPlugin GradientState",
    "run.accelerator_state": "AcceleratorState",
    "run.process": """DistributedType PartialState broadcast broadcast_object_list gather gather_object
        pad_across_processes reduce set_seed synchronize_rng_states wait_for_everyone""",
    "ranks.batches": "concatenate send_to_device",
    "errors": "DataError:DistributedOperationException",
    "data.prepare": "DataLoaderConfiguration skip_first_batches",
    "data.loader": "PreparedLoader:DataLoaderAdapter PreparedLoader:DataLoaderStateMixin",
    "run.plugins": """AutocastKwargs DeepSpeedPlugin DistributedDataParallelKwargs GradScalerKwargs InitProcessGroupKwargs
        KwargsHandler ProfileKwargs ProjectConfiguration""",
    "run.deepspeed_plugins": "get_active_deepspeed_plugin",
    "run.dynamo": "TorchDynamoPlugin",
    "run.dummies": "DummyOptim DummyScheduler",
    "run.logging": "MultiProcessAdapter get_logger",
    "run.tracking": """AimTracker ClearMLTracker CometMLTracker DVCLiveTracker GeneralTracker LOGGER_TYPE_TO_CLASS MLflowTracker
        SwanLabTracker TensorBoardTracker TrackioTracker WandBTracker filter_trackers get_available_trackers on_main_process
        register_tracker_class""",
    "run.local_sgd": "LocalSGD",
    "run.launchers": "debug_launcher notebook_launcher",
    "run.memory_fit": "clear_device_cache find_executable_batch_size release_memory should_reduce_batch_size",
    "config.variables": """clear_environment get_int_from_env parse_choice_from_env parse_flag_from_env patch_environment
        purge_accelerate_environment str_to_bool""",
    "config.kinds": """BaseEnum ComputeEnvironment CustomDtype DDPCommunicationHookType DynamoBackend EnumWithContains
        LoggerType PrecisionType RNGType""",
    "names.installed": """STR_OPERATION_TO_FUNC are_libraries_initialized compare_versions is_4bit_bnb_available
        is_8bit_bnb_available is_aim_available is_amdsmi_available is_bf16_available is_bitsandbytes_multi_backend_available
        is_bnb_available is_boto3_available is_clearml_available is_comet_ml_available is_cuda_available is_datasets_available
        is_deepspeed_available is_dvclive_available is_fp16_available is_fp8_available is_habana_gaudi1 is_hpu_available
        is_import_timer_available is_lomo_available is_matplotlib_available is_megatron_lm_available is_mlflow_available
        is_mlu_available is_mps_available is_msamp_available is_musa_available is_neuron_available is_npu_available
        is_numpy_available is_pandas_available is_peft_available is_pippy_available is_pynvml_available is_pytest_available
        is_rich_available is_rocm_available is_sagemaker_available is_schedulefree_available is_sdaa_available
        is_swanlab_available is_tensorboard_available is_timm_available is_torch_distributed_available is_torch_version
        is_torch_xla_available is_torchao_available is_torchdata_available is_torchdata_stateful_dataloader_available
        is_torchvision_available is_tqdm_available is_trackio_available is_transformer_engine_available
        is_transformer_engine_mxfp8_available is_transformers_available is_triton_available is_wandb_available
        is_weights_only_available is_xccl_available is_xpu_available""",
    "names.checkpoints": "load_checkpoint_in_model",
    "names.structures": """CannotPadNestedTensorWarning ConvertOutputsToFp32 GatheredParameters TensorInformation
        convert_outputs_to_fp32 convert_to_fp32 find_batch_size find_device get_data_structure get_shape honor_type
        ignorant_find_batch_size initialize_tensors is_namedtuple is_tensor_information is_torch_tensor is_torch_xpu_tensor
        listify pad_input_tensors recursively_apply slice_tensors""",
    "names.models": """clean_state_dict_for_safetensors compute_module_sizes compute_module_total_buffer_size
        convert_file_size_to_int dtype_byte_size extract_model_from_parallel find_tied_parameters get_grad_scaler
        get_mixed_precision_context_manager get_module_children_bottom_up get_non_persistent_buffers has_offloaded_params
        id_tensor_storage init_empty_weights init_on_device is_compiled_module is_peft_model model_has_dtensor
        named_module_tensors""",
    "names.compiling": "compile_regions has_compiled_regions has_repeated_blocks is_repeated_blocks",
    "names.files": """MODEL_NAME OPTIMIZER_NAME PROFILE_PATTERN_NAME RNG_STATE_NAME SAFE_MODEL_NAME SAFE_WEIGHTS_INDEX_NAME
        SAFE_WEIGHTS_NAME SAFE_WEIGHTS_PATTERN_NAME SAMPLER_NAME SCALER_NAME SCHEDULER_NAME TORCH_DYNAMO_MODES
        WEIGHTS_INDEX_NAME WEIGHTS_NAME WEIGHTS_PATTERN_NAME load load_state_dict save""",
    "names.small": """check_os_kernel convert_bytes convert_dict_to_env_variables get_current_device_type get_free_port
        get_pretty_name is_port_in_use merge_dicts recursive_getattr tqdm write_basic_config""",
    "names.state": "do_nothing is_initialized synchronize_rng_state",
    "names.loaders": """BatchSamplerShard DataLoaderDispatcher DataLoaderShard IterableDatasetShard SeedableRandomSampler
        SkipBatchSampler SkipDataLoader get_sampler prepare_data_loader""",
    "names.prepared": "AcceleratedOptimizer AcceleratedScheduler move_to_device",
}

WIDER: dict[str, str] = {
    "Accelerator": "init, generation, ema, stop_requested, has_checkpoint, finish_saving",
    "ProjectConfiguration": "keep_best, smaller_is_better",
    "concatenate": "joins lists of plain objects, too",
    "find_executable_batch_size": "all ranks try the smaller size together",
    "gather": "shapes are compared over the ranks first",
    "gather_object": "also without a list: the ranks' values",
    "init_empty_weights": "`accelerator.init()` builds a model whose weights come later",
    "load": "numpy's types of every kind",
    "prepare_data_loader": "the loader has state_dict",
    "reduce": "scale acts; the mean of whole numbers is a float",
    "AcceleratedOptimizer": "the optimizer is the script's own object",
    "AcceleratedScheduler": "the schedule is the script's own object",
}

REFUSED: dict[str, str] = {
    "it spreads a model over devices for inference. Use transformers' from_pretrained(..., device_map=...) for that; a model "
    "that is to be trained is built in `with accelerator.init():` and given to prepare.": """OffloadedWeightsLoader
        PrefixedDataset align_module_device attach_layerwise_casting_hooks calculate_maximum_sizes check_device_map
        check_device_same
        check_tied_parameters_in_config check_tied_parameters_on_same_device clean_device_map copy_tensor_to_devices
        cpu_offload cpu_offload_with_hook disk_offload dispatch_model extract_submodules_state_dict fallback_allocate
        get_balanced_memory get_max_layer_size get_max_memory get_module_leaves get_module_size_with_ties
        get_state_dict_from_offload get_state_dict_offloaded_model infer_auto_device_map load_checkpoint_and_dispatch
        load_offloaded_weight load_offloaded_weights offload_state_dict offload_weight
        prepare_pippy retie_parameters save_offload_index set_module_tensor_to_device AlignDevicesHook
        CpuOffload LayerwiseCastingHook ModelHook SequentialHook UserCpuOffloadHook add_hook_to_module
        attach_align_device_hook attach_align_device_hook_on_blocks attach_execution_device_hook remove_hook_from_module
        remove_hook_from_submodules""",
    "FSDP is another way to shard. Set zero_stage 3 in the configuration, or give "
    "deepspeed_plugin=DeepSpeedPlugin(zero_stage=3).": """FullyShardedDataParallelPlugin compile_regions_fsdp2
        disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading ensure_weights_retied fsdp2_apply_ac
        fsdp2_canonicalize_names fsdp2_load_full_state_dict fsdp2_prepare_model fsdp2_switch_optimizer_parameters
        get_fsdp2_grad_scaler load_fsdp_model load_fsdp_optimizer merge_fsdp_weights save_fsdp_model save_fsdp_optimizer
        FSDP_AUTO_WRAP_POLICY FSDP_BACKWARD_PREFETCH FSDP_MODEL_NAME FSDP_PYTORCH_VERSION FSDP_SHARDING_STRATEGY
        FSDP_STATE_DICT_TYPE FSDP2_PYTORCH_VERSION FSDP2_STATE_DICT_TYPE DTENSOR_PYTORCH_VERSION""",
    "tensor, context, sequence and pipeline parallelism are not here. Models are sharded over all ranks by zero_stage.": """
        BETA_CP_AVAILABLE_PYTORCH_VERSION BETA_SP_AVAILABLE_DEEPSPEED_VERSION BETA_TP_AVAILABLE_PYTORCH_VERSION
        BETA_TP_AVAILABLE_TRANSFORMERS_VERSION DeepSpeedSequenceParallelConfig ParallelismConfig TorchContextParallelConfig
        TorchTensorParallelConfig TorchTensorParallelPlugin get_model_tp_size""",
    "Megatron-LM is not here. Models are sharded over all ranks by zero_stage.": """AbstractTrainStep BertTrainStep GPTTrainStep
        MegatronEngine MegatronLMDummyDataLoader MegatronLMDummyScheduler MegatronLMOptimizerWrapper MegatronLMPlugin
        MegatronLMSchedulerWrapper MODEL_CONFIGS_TO_MEGATRON_PARSERS T5TrainStep add_model_config_to_megatron_parser
        avg_losses_across_data_parallel_group gather_across_data_parallel_groups megatron_lm_initialize
        megatron_lm_prepare_data_loader megatron_lm_prepare_model_optimizer_scheduler megatron_lm_prepare_optimizer
        megatron_lm_prepare_scheduler parse_bert_config parse_glm4_moe_config parse_gpt2_config parse_llama_config
        parse_t5_config""",
    "computing in fp8 is not here. Use mixed_precision='bf16'.": """AORecipeKwargs FP8BackendType FP8RecipeKwargs
        MSAMPRecipeKwargs SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING TERecipeKwargs apply_fp8_autowrap contextual_fp8_autocast
        convert_model convert_model_to_fp8_ao check_cuda_fp8_capability filter_first_and_last_linear_layers has_ao_layers
        has_transformer_engine_layers torchao_required""",
    "models are quantised by the library that loads them: from_pretrained(..., quantization_config=...). Prepared "
    "ones are trained through adapters.": """BnbQuantizationConfig get_module_class_from_name has_4bit_bnb_layers
        load_and_quantize_model""",
    "DeepSpeed is not used: the engine is shardwise's own. prepare gives the script's own model, optimizer and schedule.": """
        DEEPSPEED_MULTINODE_LAUNCHERS DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper DeepSpeedSchedulerWrapper
        HfDeepSpeedConfig compile_regions_deepspeed deepspeed_required map_pytorch_optim_to_deepspeed""",
    "SageMaker, TPUs and other devices than CUDA's and the CPU are not supported.": """MITA_PROFILING_AVAILABLE_PYTORCH_VERSION
        SAGEMAKER_PARALLEL_EC2_INSTANCES SAGEMAKER_PYTHON_VERSION SAGEMAKER_PYTORCH_VERSION SAGEMAKER_TRANSFORMERS_VERSION
        SageMakerDistributedType USE_TORCH_XLA XPU_PROFILING_AVAILABLE_PYTORCH_VERSION install_xla prepare_sagemager_args_inputs
        prepare_tpu""",
    "it is of accelerate's own launcher. Start processes by `shardwise launch`, torchrun, srun or mpirun.": """
        CPUInformation ELASTIC_LOG_LINE_PREFIX_TEMPLATE_PYTORCH_VERSION PrepareForLaunch TORCH_LAUNCH_PARAMS
        check_cuda_p2p_ib_support get_cpu_distributed_information get_driver_version get_gpu_info override_numa_affinity
        prepare_deepspeed_cmd_env prepare_multi_gpu_env prepare_simple_launcher_cmd_env set_numa_affinity test_launch""",
    "it is of the inside of accelerate, which works otherwise here.": """CUDA_DISTRIBUTED_TYPES TENSOR_INT_TO_DTYPE
        TENSOR_TYPE_TO_INT TORCH_DISTRIBUTED_OPERATION_TYPES TORCH_SAFE_GLOBALS ThreadLocalSharedDict chained_operation
        gather_tensor_shape patch_optimizer_step verify_operation""",
}

_BIG_MODELING = """cpu_offload cpu_offload_with_hook disk_offload dispatch_model init_empty_weights init_on_device
    load_checkpoint_and_dispatch"""
_LAUNCHED = "debug_launcher notebook_launcher"
_DEEPSPEED = """DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper DeepSpeedSchedulerWrapper DummyOptim DummyScheduler
    HfDeepSpeedConfig get_active_deepspeed_plugin map_pytorch_optim_to_deepspeed"""
_MEMORY = "clear_device_cache find_executable_batch_size release_memory should_reduce_batch_size"
_VERSIONS = "compare_versions is_torch_version"
_STATE = (
    """AcceleratorState DistributedType GradientState PartialState ThreadLocalSharedDict do_nothing is_initialized"""
)

# Names of each; "is_*_available" stands for all of them.
MODULES: dict[str, str] = {
    "": f"""Accelerator AutocastKwargs DDPCommunicationHookType DataLoaderConfiguration DeepSpeedPlugin
        DistributedDataParallelKwargs DistributedType FullyShardedDataParallelPlugin GradScalerKwargs InitProcessGroupKwargs
        ParallelismConfig PartialState ProfileKwargs {_BIG_MODELING} {_LAUNCHED} find_executable_batch_size
        infer_auto_device_map is_rich_available load_checkpoint_in_model prepare_pippy skip_first_batches
        synchronize_rng_states""",
    "accelerator": "Accelerator",
    "big_modeling": f"{_BIG_MODELING} attach_layerwise_casting_hooks",
    "data_loader": """BatchSamplerShard DataLoaderAdapter DataLoaderDispatcher DataLoaderShard DataLoaderStateMixin
        IterableDatasetShard SeedableRandomSampler SkipBatchSampler SkipDataLoader get_sampler prepare_data_loader
        skip_first_batches""",
    "hooks": """AlignDevicesHook CpuOffload LayerwiseCastingHook ModelHook SequentialHook UserCpuOffloadHook add_hook_to_module
        attach_align_device_hook attach_align_device_hook_on_blocks attach_execution_device_hook remove_hook_from_module
        remove_hook_from_submodules""",
    "launchers": f"PrepareForLaunch {_LAUNCHED} test_launch",
    "local_sgd": "LocalSGD",
    "parallelism_config": "ParallelismConfig",
    "optimizer": "AcceleratedOptimizer move_to_device patch_optimizer_step",
    "scheduler": "AcceleratedScheduler",
    "state": _STATE,
    "utils.constants": """BETA_CP_AVAILABLE_PYTORCH_VERSION BETA_SP_AVAILABLE_DEEPSPEED_VERSION
        BETA_TP_AVAILABLE_PYTORCH_VERSION BETA_TP_AVAILABLE_TRANSFORMERS_VERSION CUDA_DISTRIBUTED_TYPES
        DEEPSPEED_MULTINODE_LAUNCHERS DTENSOR_PYTORCH_VERSION ELASTIC_LOG_LINE_PREFIX_TEMPLATE_PYTORCH_VERSION
        FSDP2_PYTORCH_VERSION FSDP2_STATE_DICT_TYPE FSDP_AUTO_WRAP_POLICY FSDP_BACKWARD_PREFETCH FSDP_MODEL_NAME
        FSDP_PYTORCH_VERSION FSDP_SHARDING_STRATEGY FSDP_STATE_DICT_TYPE MITA_PROFILING_AVAILABLE_PYTORCH_VERSION MODEL_NAME
        OPTIMIZER_NAME PROFILE_PATTERN_NAME RNG_STATE_NAME SAFE_MODEL_NAME SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME
        SAFE_WEIGHTS_PATTERN_NAME SAGEMAKER_PARALLEL_EC2_INSTANCES SAGEMAKER_PYTHON_VERSION SAGEMAKER_PYTORCH_VERSION
        SAGEMAKER_TRANSFORMERS_VERSION SAMPLER_NAME SCALER_NAME SCHEDULER_NAME STR_OPERATION_TO_FUNC
        SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING TORCH_DISTRIBUTED_OPERATION_TYPES TORCH_DYNAMO_MODES TORCH_LAUNCH_PARAMS
        WEIGHTS_INDEX_NAME WEIGHTS_NAME WEIGHTS_PATTERN_NAME XPU_PROFILING_AVAILABLE_PYTORCH_VERSION""",
    "utils.dataclasses": """AORecipeKwargs AutocastKwargs BaseEnum BnbQuantizationConfig ComputeEnvironment CustomDtype
        DDPCommunicationHookType DataLoaderConfiguration DeepSpeedPlugin DeepSpeedSequenceParallelConfig
        DistributedDataParallelKwargs DistributedType DynamoBackend EnumWithContains FP8BackendType FP8RecipeKwargs
        FullyShardedDataParallelPlugin GradScalerKwargs GradientAccumulationPlugin InitProcessGroupKwargs KwargsHandler
        LoggerType MODEL_CONFIGS_TO_MEGATRON_PARSERS MSAMPRecipeKwargs MegatronLMPlugin PrecisionType ProfileKwargs
        ProjectConfiguration RNGType SageMakerDistributedType TERecipeKwargs TensorInformation TorchContextParallelConfig
        TorchDynamoPlugin TorchTensorParallelConfig TorchTensorParallelPlugin add_model_config_to_megatron_parser
        get_module_class_from_name parse_bert_config parse_glm4_moe_config parse_gpt2_config parse_llama_config
        parse_t5_config""",
    "utils.deepspeed": _DEEPSPEED,
    "utils.environment": """CPUInformation are_libraries_initialized check_cuda_fp8_capability check_cuda_p2p_ib_support
        clear_environment convert_dict_to_env_variables get_cpu_distributed_information get_current_device_type
        get_driver_version get_gpu_info get_int_from_env override_numa_affinity parse_choice_from_env parse_flag_from_env
        patch_environment purge_accelerate_environment set_numa_affinity str_to_bool""",
    "utils.imports": "USE_TORCH_XLA deepspeed_required torchao_required is_*_available is_habana_gaudi1",
    "utils.memory": _MEMORY,
    "utils.modeling": """WEIGHTS_INDEX_NAME align_module_device calculate_maximum_sizes check_device_map check_device_same
        check_tied_parameters_in_config check_tied_parameters_on_same_device clean_device_map compute_module_sizes
        compute_module_total_buffer_size convert_file_size_to_int dtype_byte_size fallback_allocate find_tied_parameters
        get_balanced_memory get_grad_scaler get_max_layer_size get_max_memory get_mixed_precision_context_manager
        get_module_leaves get_module_size_with_ties get_non_persistent_buffers get_state_dict_from_offload
        get_state_dict_offloaded_model has_offloaded_params id_tensor_storage infer_auto_device_map is_peft_model
        load_checkpoint_in_model load_offloaded_weights load_state_dict named_module_tensors retie_parameters
        set_module_tensor_to_device""",
    "utils.operations": """CannotPadNestedTensorWarning ConvertOutputsToFp32 DistributedOperationException GatheredParameters
        TENSOR_INT_TO_DTYPE TENSOR_TYPE_TO_INT broadcast broadcast_object_list chained_operation concatenate
        convert_outputs_to_fp32 convert_to_fp32 copy_tensor_to_devices find_batch_size find_device gather gather_object
        gather_tensor_shape get_data_structure get_shape honor_type ignorant_find_batch_size initialize_tensors is_namedtuple
        is_tensor_information is_torch_tensor is_torch_xpu_tensor listify pad_across_processes pad_input_tensors
        recursively_apply reduce send_to_device slice_tensors verify_operation""",
    "utils.other": """TORCH_SAFE_GLOBALS check_os_kernel clean_state_dict_for_safetensors compile_regions
        compile_regions_deepspeed compile_regions_fsdp2 convert_bytes extract_model_from_parallel get_free_port
        get_model_tp_size get_module_children_bottom_up get_pretty_name has_compiled_regions has_repeated_blocks
        is_compiled_module is_port_in_use is_repeated_blocks load merge_dicts model_has_dtensor recursive_getattr save
        wait_for_everyone write_basic_config""",
    "utils.random": "set_seed synchronize_rng_state synchronize_rng_states",
    "utils.tqdm": "tqdm",
    "utils.versions": _VERSIONS,
}
# `accelerate.utils` itself offers what its modules do, but for what only they have; and what has no module here.
_ONLY_IN_MODULES = """BaseEnum CPUInformation ConvertOutputsToFp32 DistributedOperationException EnumWithContains
    MODEL_CONFIGS_TO_MEGATRON_PARSERS TENSOR_INT_TO_DTYPE TENSOR_TYPE_TO_INT TORCH_SAFE_GLOBALS USE_TORCH_XLA"""
_UTILS_ALONE = """AbstractTrainStep BertTrainStep GPTTrainStep MegatronEngine MegatronLMDummyDataLoader MegatronLMDummyScheduler
    MegatronLMOptimizerWrapper MegatronLMSchedulerWrapper OffloadedWeightsLoader ParallelismConfig PrefixedDataset
    PrepareForLaunch T5TrainStep apply_fp8_autowrap avg_losses_across_data_parallel_group contextual_fp8_autocast convert_model
    convert_model_to_fp8_ao disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading ensure_weights_retied
    extract_submodules_state_dict filter_first_and_last_linear_layers fsdp2_apply_ac fsdp2_canonicalize_names
    fsdp2_load_full_state_dict fsdp2_prepare_model fsdp2_switch_optimizer_parameters gather_across_data_parallel_groups
    get_fsdp2_grad_scaler has_4bit_bnb_layers has_ao_layers has_transformer_engine_layers install_xla load_and_quantize_model
    load_fsdp_model load_fsdp_optimizer load_offloaded_weight megatron_lm_initialize megatron_lm_prepare_data_loader
    megatron_lm_prepare_model_optimizer_scheduler megatron_lm_prepare_optimizer megatron_lm_prepare_scheduler merge_fsdp_weights
    offload_state_dict offload_weight prepare_deepspeed_cmd_env prepare_multi_gpu_env prepare_sagemager_args_inputs
    prepare_simple_launcher_cmd_env prepare_tpu save_fsdp_model save_fsdp_optimizer save_offload_index"""

ALIASES: dict[str, str] = {
    "logging": "run.logging",
    "losses": "tuning.losses",
    "memory": "run.memory",
    "plugins": "run.plugins",
    "tracking": "run.tracking",
}


class Row(NamedTuple):
    """One name. home: "folder.file:name", or None where it is refused, for the reason `why`; else that says how it is wider."""

    name: str
    home: str | None
    why: str = ""

    @property
    def verdict(self) -> str:
        """ "same", "wider" or "refused"."""
        return "refused" if self.home is None else "wider" if self.why else "same"


def _rows() -> dict[str, Row]:
    found = {}
    for home, words in HOMES.items():
        for word in words.split():
            here, _, name = word.partition(":")
            name = name or here
            found[name] = Row(name, f"{home}:{here}", WIDER.get(name, ""))
    for reason, words in REFUSED.items():
        for name in words.split():
            found[name] = Row(name, None, reason)
    return found


ROWS = _rows()


def _names(words: str) -> list[str]:
    listed = words.split()
    family = [name for name in ROWS if name.startswith("is_") and name.endswith("_available")]
    return sorted({*listed, *family} - {"is_*_available"}) if "is_*_available" in listed else sorted(set(listed))


NAMES: dict[str, list[str]] = {path: _names(words) for path, words in MODULES.items()}
_INSIDE = {name for path, names in NAMES.items() if path.startswith("utils.") for name in names}
NAMES["utils"] = sorted((_INSIDE - set(_ONLY_IN_MODULES.split())) | set(_UTILS_ALONE.split()))
