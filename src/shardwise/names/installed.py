"""Which packages and devices are there: the `is_..._available` of accelerate. Nothing is imported to find out a package.

Devices that torch does not know by itself (MLU, MUSA, NPU, ...) are not there for shardwise, which trains on CUDA and the CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config.variables import patch_environment

if TYPE_CHECKING:
    from packaging.version import Version

STR_OPERATION_TO_FUNC: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def compare_versions(library_or_version: str | Version, operation: str, requirement_version: str) -> bool:
    """Whether an installed library (by name), or a version, is `operation` (such as ">=") a version.

    Raises ValueError for another operation, and importlib's PackageNotFoundError.
    """
    from packaging.version import parse

    if operation not in STR_OPERATION_TO_FUNC:
        raise ValueError(f"`operation` must be one of {list(STR_OPERATION_TO_FUNC)}, received {operation}")
    if isinstance(library_or_version, str):
        library_or_version = parse(importlib.metadata.version(library_or_version))
    return STR_OPERATION_TO_FUNC[operation](library_or_version, parse(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """As `compare_versions` of torch."""
    return compare_versions("torch", operation, version)


def _has(module: str, *distributions: str) -> bool:
    """Whether `module` can be imported, and is of an installed distribution: of `module`'s name where none is given."""
    if importlib.util.find_spec(module) is None:
        return False
    for name in distributions or (module,):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _asks(module: str, *distributions: str) -> Callable[[], bool]:
    def available() -> bool:
        return _has(module, *distributions)

    available.__doc__ = f"Whether the package {module} is installed."
    return available


is_amdsmi_available = _asks("amdsmi")
is_boto3_available = _asks("boto3")
is_clearml_available = _asks("clearml")
is_comet_ml_available = _asks("comet_ml")
is_datasets_available = _asks("datasets")
is_deepspeed_available = _asks("deepspeed")
is_dvclive_available = _asks("dvclive")
is_import_timer_available = _asks("import_timer")
is_lomo_available = _asks("lomo_optim")
is_matplotlib_available = _asks("matplotlib")
is_mlflow_available = _asks("mlflow", "mlflow", "mlflow-skinny")
is_msamp_available = _asks("msamp", "ms-amp")
is_pandas_available = _asks("pandas")
is_peft_available = _asks("peft")
is_pynvml_available = _asks("pynvml", "pynvml", "nvidia-ml-py")
is_pytest_available = _asks("pytest")
is_sagemaker_available = _asks("sagemaker")
is_schedulefree_available = _asks("schedulefree")
is_swanlab_available = _asks("swanlab")
is_timm_available = _asks("timm")
is_torchdata_available = _asks("torchdata")
is_torchvision_available = _asks("torchvision")
is_tqdm_available = _asks("tqdm")
is_trackio_available = _asks("trackio")
is_transformer_engine_available = _asks("transformer_engine", "transformer-engine")
is_transformers_available = _asks("transformers")
is_triton_available = _asks("triton")
is_wandb_available = _asks("wandb")


def _at_least(package: str, version: str) -> Callable[[], bool]:
    def available() -> bool:
        return _has(package) and compare_versions(package, ">=", version)

    available.__doc__ = f"Whether the package {package} is installed, {version} or newer."
    return available


is_4bit_bnb_available = _at_least("bitsandbytes", "0.39.0")
is_8bit_bnb_available = _at_least("bitsandbytes", "0.37.2")
is_torchao_available = _at_least("torchao", "0.6.1")
is_torchdata_stateful_dataloader_available = _at_least("torchdata", "0.8.0")


def _absent(what: str) -> Callable[..., bool]:
    def available(*args: Any, **kwargs: Any) -> bool:
        return False

    available.__doc__ = f"False: shardwise does not use {what}."
    return available


is_habana_gaudi1 = _absent("Gaudi")
is_hpu_available = _absent("HPUs")
is_megatron_lm_available = _absent("Megatron-LM")
is_mlu_available = _absent("MLUs")
is_musa_available = _absent("MUSA")
is_neuron_available = _absent("Neuron")
is_npu_available = _absent("NPUs")
is_pippy_available = _absent("pipelines")
is_rich_available = _absent("rich's tracebacks")
is_sdaa_available = _absent("SDAA")
is_torch_xla_available = _absent("XLA")
is_transformer_engine_mxfp8_available = _absent("MXFP8")
is_xccl_available = _absent("XCCL")
is_xpu_available = _absent("XPUs")


def is_aim_available() -> bool:
    """Whether the package aim is installed, older than 4."""
    return _has("aim") and compare_versions("aim", "<", "4.0.0")


def is_bnb_available(min_version: str | None = None) -> bool:
    """Whether bitsandbytes is installed, `min_version` or newer where one is given."""
    return _has("bitsandbytes") and (min_version is None or compare_versions("bitsandbytes", ">=", min_version))


def is_bitsandbytes_multi_backend_available() -> bool:
    """Whether bitsandbytes is installed and says that it has several backends; imports it."""
    if not is_bnb_available():
        return False
    return "multi_backend" in getattr(importlib.import_module("bitsandbytes"), "features", set())


def is_tensorboard_available() -> bool:
    """Whether tensorboard or tensorboardX is installed."""
    return _has("tensorboard") or _has("tensorboardX")


def is_cuda_available() -> bool:
    """Whether a CUDA device is there, asked without touching it."""
    import torch

    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return bool(torch.cuda.is_available())


def is_rocm_available() -> bool:
    """Whether torch is built for ROCm, and a device is there."""
    import torch

    return torch.version.hip is not None and bool(torch.cuda.is_available())


def is_mps_available(min_version: str = "1.12") -> bool:
    """Whether torch has Apple's Metal, which shardwise does not train on."""
    import torch

    return is_torch_version(">=", min_version) and torch.backends.mps.is_available() and torch.backends.mps.is_built()


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether the device computes in bf16; a CPU does."""
    import torch

    return bool(torch.cuda.is_bf16_supported()) if is_cuda_available() else True


def is_fp16_available() -> bool:
    """True: CUDA devices and CPUs compute in fp16."""
    return True


def is_fp8_available() -> bool:
    """Whether a library for fp8 is installed; shardwise does not use one."""
    return is_msamp_available() or is_transformer_engine_available() or is_torchao_available()


def is_weights_only_available() -> bool:
    """True: every torch that shardwise works with has `weights_only`."""
    return is_torch_version(">=", "2.4.0")


def is_numpy_available(min_version: str = "1.25.0") -> bool:
    """Whether numpy is `min_version` or newer."""
    return compare_versions("numpy", ">=", min_version)


def is_torch_distributed_available() -> bool:
    """True: shardwise needs it."""
    return True


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Those of these modules that are imported."""
    return [name for name in library_names if name in sys.modules]
