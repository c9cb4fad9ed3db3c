"""A transformers model without values: from a hub id, a directory or a configuration file, with adapters, quantised or not.

Everything is on the meta device, so that a model of any size is built in a second and takes no memory. What is built is the
model that a script would train: PEFT itself adds the adapters, and quantised weights are replaced by codes and scales.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from ..errors import ConfigError
from ..files.documents import printed, read_configuration
from .hub import check_path, unreachable

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Elements that share a scale in NF4, and scales that share one of the second level.
_BLOCK_4BIT, _BLOCK_OF_SCALES = 64, 256


@dataclass(frozen=True)
class Adapters:
    """LoRA as PEFT's LoraConfig takes it. targets: module names, or ("all-linear",). saved: modules trained whole besides."""

    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    saved: tuple[str, ...] = ()


def build_meta_model(
    name: str, *, dtype: str | None = None, adapters: Adapters | None = None, quantize: str | None = None
) -> nn.Module:
    """The model `name` on the meta device, with `requires_grad` as it would be trained.

    name:     a hub id, a directory with a config.json, or a configuration file.
    dtype:    fp32, bf16 or fp16, of the loaded weights; None takes what the configuration says (fp32 if nothing).
    adapters: freeze all but these; None trains every weight.
    quantize: "8bit" or "4bit"; frozen linear weights as codes and scales. Needs adapters.
    Raises ConfigError if the model cannot be found or built, or transformers or PEFT is missing.
    """
    if quantize not in (None, "8bit", "4bit"):
        raise ConfigError(f"quantize is {quantize!r}; it is one of 8bit, 4bit.")
    if quantize is not None and adapters is None:
        raise ConfigError(f"quantize {quantize}: quantised weights cannot be trained; ask for adapters too (lora_r).")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it is one of {', '.join(_DTYPES)}.")
    config = _config(name)
    said = getattr(config, "dtype", None)
    loaded = _DTYPES[dtype] if dtype else said if isinstance(said, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = _model(name, config, loaded)
        if adapters is not None:
            model = _with_adapters(model, adapters)
    if quantize is not None:
        quantise(model, quantize)
    return model


def small_decoder(device: str) -> nn.Module:
    """A Llama of four small blocks, in training mode: the host does for it what it does for a large one."""
    transformers = _transformers()
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    with torch.device(device):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.train()


def quantise(model: nn.Module, bits: str) -> None:
    """Put codes and scales in the place of every frozen linear weight but the head's. An estimate of what libraries keep.

    8bit: one byte a weight and an fp32 scale for each output row (LLM.int8, arXiv 2208.07339).
    4bit: half a byte a weight, a byte of scale for each 64 weights and an fp32 one for each 256 scales: NF4 with double
          quantisation (QLoRA, arXiv 2305.14314).
    """
    skipped = {id(head) for head in heads_of(model)}
    for module in model.modules():
        # GPT-2 has its linear layers as transformers' Conv1D, whose weight lies the other way round.
        turned = type(module).__name__ == "Conv1D"
        weight = module._parameters.get("weight") if turned or isinstance(module, nn.Linear) else None
        if weight is None or weight.requires_grad or id(module) in skipped:
            continue
        rows, numel = weight.shape[1 if turned else 0], weight.numel()
        codes = numel if bits == "8bit" else -(-numel // 2)
        module.weight = _bytes(codes)
        if bits == "8bit":
            module.register_parameter("scales", _bytes(4 * rows))
            continue
        scales = -(-numel // _BLOCK_4BIT)
        module.register_parameter("scales", _bytes(scales))
        module.register_parameter("scales_of_scales", _bytes(4 * -(-scales // _BLOCK_OF_SCALES)))


def _bytes(count: int) -> Parameter:
    # Bytes also for fp32 scales: the engine casts floating weights to the compute dtype, and must not do so with these.
    return Parameter(torch.empty(count, dtype=torch.uint8, device="meta"), requires_grad=False)


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The layers behind the last block that give logits, also inside of adapters."""
    askable: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    found = [module.get_output_embeddings() for module in askable]
    inner = [getattr(head, "base_layer", None) for head in found if head is not None]
    return [module for module in (*found, *inner) if isinstance(module, nn.Module)]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is not installed; it builds the model: pip install transformers") from None
    return transformers


def _config(name: str) -> Any:
    transformers = _transformers()
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{name}: this directory has no config.json")
    if path.exists() and not path.is_dir():
        values = read_configuration(path, ConfigError)
        try:
            return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        except Exception as error:  # of whatever kind transformers has for a value of a wrong type
            raise ConfigError(f"{name}: not the configuration of a model: {_one_line(error)}") from error
    if path.is_dir():
        read_configuration(path / "config.json", ConfigError)  # with limits, which transformers has not
    check_path(name)
    why = None if path.is_dir() else unreachable()
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=why is not None)
    except Exception as error:  # as above
        if why is not None:
            raise ConfigError(
                f"{name}: there is no such directory here, {why}, and nothing of that name is in its cache"
            ) from error
        raise ConfigError(f"{name}: no configuration can be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """What it says: all of a short text, the first line of a long one, in front of it the kind where that is needed."""
    lines = str(error).strip().splitlines()
    whole = " ".join(" ".join(lines).split())
    text = whole if len(whole) < 200 or not lines else lines[0]
    return printed(text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}")


def _model(name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    transformers = _transformers()
    kinds = [getattr(transformers, kind, None) for kind in getattr(config, "architectures", None) or ()]
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    try:
        for kind in kinds:
            if kind is not None:
                model: nn.Module = kind._from_config(config, dtype=dtype)
                return model.train()
        for chosen in (auto, transformers.AutoModel):
            if type(config) in chosen._model_mapping:
                model = chosen.from_config(config, dtype=dtype)
                return model.train()
    except Exception as error:  # as in _config
        raise ConfigError(f"{name}: transformers cannot build the model: {_one_line(error)}") from error
    raise ConfigError(f"{name}: transformers knows no model for a {type(config).__name__}")


def _with_adapters(model: nn.Module, adapters: Adapters) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("peft is not installed; it adds the adapters: pip install peft") from None
    targets: str | list[str] = list(adapters.targets)
    if adapters.targets == ("all-linear",):
        targets = "all-linear"
    wanted = LoraConfig(r=adapters.rank, target_modules=targets, modules_to_save=list(adapters.saved) or None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT calls transformers by old names, and has advice for training
            adapted: nn.Module = get_peft_model(model, wanted)
    except ValueError as error:
        raise ConfigError(f"target_modules {', '.join(adapters.targets)}: {error}") from None
    # PEFT takes a name that none of the model's has, and saves nothing more for it.
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in adapters.saved:
        if name.rpartition(".")[2] not in ends:
            raise ConfigError(f"modules_to_save {name}: the model has no module of that name")
    return adapted
