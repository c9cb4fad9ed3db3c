"""`launch --as-deepspeed`: the run's settings in the variables by which accelerate and transformers learn of DeepSpeed.

A script that says nothing of ZeRO, such as a plain Trainer's, gets the launcher's settings by them; one that brings a DeepSpeed
configuration of its own is read as accelerate reads it. What the variables have no word for, `shardwise_config`, reaches
`shardwise.compat` in SHARDWISE_CONFIG as in every run.
"""

from __future__ import annotations

from pathlib import Path

from ..config.deepspeed_json import find_json
from ..config.offloads import Directories, directories_of
from ..config.schema import Config
from ..errors import ConfigError
from . import worker


def variables(config: Config, beside: str | None = None) -> dict[str, str]:
    """What each process gets besides `SHARDWISE_CONFIG`. beside: the YAML file, from whose directory its JSON is found.

    Raises ConfigError for what DeepSpeed's settings have no room for.
    """
    found = {worker.AS_DEEPSPEED: "1", "ACCELERATE_MIXED_PRECISION": config.mixed_precision}
    if config.use_cpu:
        found["CUDA_VISIBLE_DEVICES"] = ""  # accelerate has no CPU run with DeepSpeed: it takes the GPUs that it sees
    if config.distributed_type != "DEEPSPEED":
        return found
    zero = config.zero
    for name in ("offload_optimizer_nvme_path", "offload_param_nvme_path"):
        if len(paths := directories_of(getattr(zero, name))) > 1:
            raise ConfigError(
                f"{name}: {', '.join(paths)} are several paths, and DeepSpeed's settings, by which --as-deepspeed tells the "
                "script, have room for one. Give one path, or launch without --as-deepspeed."
            )
    found |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero.zero_stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": zero.offload_optimizer_device,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": zero.offload_param_device,
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero.zero3_init_flag).lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": str(zero.zero3_save_16bit_model).lower(),
    }
    said: dict[str, object] = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": zero.gradient_accumulation_steps,
        "ACCELERATE_GRADIENT_CLIPPING": zero.gradient_clipping,
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": _single(zero.offload_optimizer_nvme_path),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": _single(zero.offload_param_nvme_path),
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": ",".join(zero.deepspeed_moe_layer_cls_names or ()) or None,
    }
    if zero.deepspeed_config_file is not None:
        said["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = Path(find_json(zero.deepspeed_config_file, beside)).absolute()
    return found | {name: str(value) for name, value in said.items() if value is not None}


def _single(path: Directories | None) -> str | None:
    return next(iter(directories_of(path)), None)
