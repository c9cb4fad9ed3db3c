"""How much a model computes for a token, and how much a device could: what MFU (model FLOPs utilisation) is made of.

    operations per token = 6 x trained + 4 x frozen matrix weights + 12 x layers x width x sequence length

Arithmetic and a table; what cannot be known is a sentence that says why. Source: PaLM (arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

# Operations a second of dense products, by a word of the device's name; of several that occur, the longest counts.
# (bf16 and fp16, TF32). From the vendors' data sheets, which often print the sparse number, twice this.
_TERA = 1e12
PEAKS: Mapping[str, tuple[float | None, float | None]] = {
    "A100": (312, 156),
    "A800": (312, 156),
    "A10": (125, 62.5),
    "A10G": (70, 35),
    "A30": (165, 82),
    "A40": (149.7, 74.8),
    "B200": (2250, 1125),
    "GH200": (989.4, 494.7),
    "H100": (989.4, 494.7),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417.5),
    "H200": (989.4, 494.7),
    "H800": (989.4, 494.7),
    "L4": (121, 60),
    "L40": (181, 90.5),
    "L40S": (362, 183),
    "RTX 3090": (71, 35.6),
    "RTX 4090": (165.2, 82.6),
    "T4": (65, None),
    "V100": (125, None),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def peak_of(device: str, dtype: torch.dtype, *, tf32: bool) -> tuple[float | None, str]:
    """Operations a second that a device can do in dense products of `dtype`, and where that is from, or why it is None.

    device: its name as torch.cuda has it. tf32: whether products of fp32 may be computed so.
    """
    words = device.replace("-", " ").split()
    found = [name for name in PEAKS if all(word in words for word in name.split())]
    if not found:
        return None, f"the peak of {device!r} is not known; give peak_flops="
    halves, thirty_two = PEAKS[max(found, key=len)]
    if dtype in (torch.bfloat16, torch.float16):
        peak, kind = halves, "16 bits"
    elif dtype == torch.float32 and tf32:
        peak, kind = thirty_two, "TF32"
    else:
        peak, kind = None, str(dtype).removeprefix("torch.")
    if peak is None:
        return None, f"the peak of {device!r} in {kind} is not known; give peak_flops="
    return peak * _TERA, f"dense products in {kind} of {device}"


@dataclass(frozen=True)
class Work:
    """What a model computes for a token.

    weights:           numbers in all parameters. trained, frozen: in matrices that are multiplied.
    layers, width:     of the attention; 0 where the model does not say, which leaves its part out.
    per_token:         operations, as a script has given them; then nothing else counts.
    unknown:           why there is no number, or None.
    """

    weights: int
    trained: int
    frozen: int
    layers: int = 0
    width: int = 0
    per_token: float | None = None
    unknown: str | None = None

    def of_token(self, sequence_length: float) -> float | None:
        """Operations for a token in a sequence of this length, forward and backward."""
        if self.per_token is not None:
            return self.per_token
        if self.unknown is not None:
            return None
        return 6 * self.trained + 4 * self.frozen + 12 * self.layers * self.width * sequence_length

    def formula(self) -> str:
        """How `of_token` comes about, with its numbers."""
        if self.per_token is not None:
            return f"{self.per_token:g} operations per token (flops_per_token=)"
        if self.unknown is not None:
            return f"not known: {self.unknown}"
        attention = f"12 x {self.layers} layers x {self.width} wide x sequence length"
        if not self.layers:
            attention = "nothing for attention, for the model has no config that says its layers and width"
        return f"6 x {self.trained:,} trained + 4 x {self.frozen:,} frozen matrix weights + {attention}"


Shapes = Mapping[str, tuple[int, ...]]


def work_of(model: nn.Module, shapes: Shapes | None = None, per_token: float | None = None) -> Work:
    """What `model` computes for a token.

    shapes:    of whole parameters by name, where the model has them in shards.
    per_token: operations, where the script knows better.
    """
    shapes = shapes or {}
    weights = 0
    matrices = {True: 0, False: 0}
    multiplied = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        shape = shapes.get(name, tuple(parameter.shape))
        numel = prod(shape)
        sides = (getattr(owner, "in_features", None), getattr(owner, "out_features", None))
        if name.endswith("weight") and all(isinstance(side, int) for side in sides):
            numel = prod(sides)  # type: ignore[arg-type]  # also where the weight itself is codes
        weights += numel
        if id(parameter) in multiplied and (len(shape) > 1 or numel != prod(shape)):
            matrices[parameter.requires_grad] += numel
    layers, width, unknown = _attention(getattr(model, "config", None))
    return Work(weights, matrices[True], matrices[False], layers, width, per_token, unknown)


def _attention(config: Any) -> tuple[int, int, str | None]:
    """(layers, width of attention, why nothing can be said) of a transformers config, or of anything else."""
    if config is None:
        return 0, 0, None
    if getattr(config, "is_encoder_decoder", False):
        return 0, 0, "an encoder and a decoder read different sequences; give flops_per_token="
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    if any(isinstance(getattr(text, name, None), int) and getattr(text, name) > 1 for name in _EXPERTS):
        return 0, 0, "a token passes only some of the experts; give flops_per_token="
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        return 0, 0, None
    head, hidden = getattr(text, "head_dim", None), getattr(text, "hidden_size", None)
    width = heads * head if isinstance(head, int) else hidden
    return (layers, width, None) if isinstance(width, int) else (0, 0, None)
