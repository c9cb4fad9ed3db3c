"""Enumerations of accelerate: words that scripts compare with, or give to an Accelerator. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, EnumMeta, StrEnum
from typing import Any


class EnumWithContains(EnumMeta):
    """Lets `"wandb" in LoggerType` ask for a value."""

    def __contains__(cls, item: object) -> bool:
        return any(item in (member, member.value) for member in cls._members())

    def _members(cls) -> Iterator[Any]:
        return iter(cls)


class BaseEnum(StrEnum, metaclass=EnumWithContains):
    """Members are their texts: they are equal to them, and print as them."""

    @classmethod
    def list(cls) -> list[str]:
        """The values."""
        return [str(member.value) for member in cls]


class LoggerType(BaseEnum):
    """The trackers that `log_with` knows by name; ALL are those whose packages are installed."""

    ALL = "all"
    AIM = "aim"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    COMETML = "comet_ml"
    MLFLOW = "mlflow"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"


class PrecisionType(BaseEnum):
    """For `mixed_precision`, where fp8 is refused."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


class RNGType(BaseEnum):
    """For `rng_types`, which takes torch, cuda and generator."""

    TORCH = "torch"
    CUDA = "cuda"
    MLU = "mlu"
    SDAA = "sdaa"
    MUSA = "musa"
    NPU = "npu"
    XLA = "xla"
    XPU = "xpu"
    HPU = "hpu"
    NEURON = "neuron"
    GENERATOR = "generator"


class DynamoBackend(BaseEnum):
    """For `dynamo_backend`, which takes the backends of config/compiling.py."""

    NO = "NO"
    EAGER = "EAGER"
    AOT_EAGER = "AOT_EAGER"
    INDUCTOR = "INDUCTOR"
    AOT_TS_NVFUSER = "AOT_TS_NVFUSER"
    NVPRIMS_NVFUSER = "NVPRIMS_NVFUSER"
    CUDAGRAPHS = "CUDAGRAPHS"
    OFI = "OFI"
    FX2TRT = "FX2TRT"
    ONNXRT = "ONNXRT"
    TENSORRT = "TENSORRT"
    AOT_TORCHXLA_TRACE_ONCE = "AOT_TORCHXLA_TRACE_ONCE"
    TORCHXLA_TRACE_ONCE = "TORCHXLA_TRACE_ONCE"
    IPEX = "IPEX"
    TVM = "TVM"
    HPU_BACKEND = "HPU_BACKEND"
    NEURON = "NEURON"


class DDPCommunicationHookType(BaseEnum):
    """For DistributedDataParallelKwargs, which takes "no" and refuses the others."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


class ComputeEnvironment(BaseEnum):
    """For a configuration file, where SageMaker is refused."""

    LOCAL_MACHINE = "LOCAL_MACHINE"
    AMAZON_SAGEMAKER = "AMAZON_SAGEMAKER"


class CustomDtype(Enum):
    """Types of weights below a byte, for their sizes."""

    FP8 = "fp8"
    INT4 = "int4"
    INT2 = "int2"
