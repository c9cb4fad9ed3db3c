"""The models and batches that every benchmark runs: four cases at the size people train, and a tiny form of each.

A case is a shape, a batch, and what is trained. Weights are random: speed and bytes do not depend on their values, and
no file has to be read. A model is built straight on its device in its final dtype, so that 8B parameters take seconds;
the same seed gives every rank and every engine the same weights. This file knows nothing of engines or timing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

_ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WEIGHT_SEED = 20240


@dataclass(frozen=True)
class Case:
    """One model, one batch per rank, and what is trained of it.

    shape:         keywords of the transformers config (LlamaConfig or BartConfig).
    lora_rank:     rank of the adapters, or None when every weight is trained.
    rows, length:  sequences per rank and step, tokens per sequence.
    checkpointing: recompute every block in backward (non-reentrant).
    nf4:           the linear layers but the head are bitsandbytes' in 4 bits, with doubly quantised scales.
    blocks:        class names of the repeated block; one of them is one unit of sharding.
    """

    name: str
    family: str
    shape: dict[str, Any]
    rows: int
    length: int
    blocks: tuple[str, ...]
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ()
    checkpointing: bool = False
    learning_rate: float = 1e-4
    nf4: bool = False
    tiny_shape: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens per rank and step, as the model sees them (for an encoder-decoder: those of one side)."""
        return self.rows * self.length

    def tiny(self) -> Case:
        """The same structure in a few hundred kilobytes, for a CPU."""
        return replace(
            self,
            shape={**self.shape, **self.tiny_shape},
            rows=2,
            length=16,
            lora_rank=None if self.lora_rank is None else 4,
        )

    def with_layers(self, layers: int) -> Case:
        """The same model with another number of blocks."""
        names = ("encoder_layers", "decoder_layers") if self.family == "bart" else ("num_hidden_layers",)
        return replace(self, shape={**self.shape, **dict.fromkeys(names, layers)})

    def build(self, device: torch.device, adapter_dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model on `device`, in training mode, with `requires_grad` set on what is trained.

        With adapters the base is bf16, and the adapters are `adapter_dtype` (fp32 is PEFT's default; bf16 holds the
        same values, since PEFT makes them in the base's dtype first). Without adapters the weights are fp32: every
        engine then computes in bf16 from fp32 masters.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaConfig

        torch.manual_seed(_WEIGHT_SEED)
        dtype = torch.float32 if self.lora_rank is None else torch.bfloat16
        with torch.device(device):
            if self.family == "bart":
                model = AutoModelForSeq2SeqLM.from_config(BartConfig(**self.shape), dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_config(LlamaConfig(**self.shape), dtype=dtype)
        model.config.use_cache = False
        if self.nf4:
            _quantise(model, device)
        if self.checkpointing:
            # transformers 5.20 renamed it and warns on the old name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if self.lora_rank is not None:
            model = self._with_adapters(model, device, adapter_dtype)
        return model.to(device).train()

    def _with_adapters(self, model: nn.Module, device: torch.device, adapter_dtype: torch.dtype) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        task = "SEQ_2_SEQ_LM" if self.family == "bart" else "CAUSAL_LM"
        config = LoraConfig(
            task_type=task,
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            lora_dropout=0.0,
            target_modules=list(self.lora_targets),
        )
        with torch.device(device):
            return get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == torch.float32)

    def batch(self, step: int, rank: int, device: torch.device) -> dict[str, Tensor]:
        """Random tokens of (rows, length), int64; the same for every engine, other ones per rank; four in turn.

        Four batches, not endless new ones, so that the loss can fall and the curves of the engines mean something.
        """
        generator = torch.Generator().manual_seed(7919 * rank + step % 4)
        high = int(self.shape["vocab_size"])
        size = (self.rows, self.length)
        ids = torch.randint(10, high, size, generator=generator)
        labels = torch.randint(10, high, size, generator=generator) if self.family == "bart" else ids.clone()
        return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _quantise(model: Any, device: torch.device) -> None:
    """Put bitsandbytes' 4-bit layers in the place of the linear ones but the head, one after another, on `device`."""
    import bitsandbytes

    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or linear is model.get_output_embeddings():
            continue
        kind = {"compress_statistics": True, "quant_type": "nf4"}
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind
        )
        whole = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **kind)
        layer.weight = whole.to(device)  # quantises it there
        model.set_submodule(path, layer)
    model.is_loaded_in_4bit = True  # PEFT asks


def _llama(**shape: Any) -> dict[str, Any]:
    return {
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        **shape,
    }


_LLAMA_TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA_8B = _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
_LLAMA_1B = _llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True)
_BART_LARGE = {
    "vocab_size": 50265,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "attn_implementation": "sdpa",
}
_BART_TINY = {
    "vocab_size": 320,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
_LLAMA_BLOCK = ("LlamaDecoderLayer",)

CASES = {
    case.name: case
    for case in (
        Case(
            "bart",
            "bart",
            _BART_LARGE,
            rows=8,
            length=64,
            blocks=("BartEncoderLayer", "BartDecoderLayer"),
            lora_rank=8,
            lora_targets=("q_proj", "v_proj"),
            tiny_shape=_BART_TINY,
        ),
        Case(
            "lora8b",
            "llama",
            _LLAMA_8B,
            rows=2,
            length=2048,
            blocks=_LLAMA_BLOCK,
            lora_rank=16,
            lora_targets=_ALL_LINEARS,
            checkpointing=True,
            tiny_shape=_LLAMA_TINY,
        ),
        Case(
            "full1b",
            "llama",
            _LLAMA_1B,
            rows=4,
            length=1024,
            blocks=_LLAMA_BLOCK,
            learning_rate=1e-5,
            tiny_shape=_LLAMA_TINY,
        ),
        Case(
            "full8b",
            "llama",
            _LLAMA_8B,
            rows=2,
            length=2048,
            blocks=_LLAMA_BLOCK,
            checkpointing=True,
            learning_rate=1e-5,
            tiny_shape=_LLAMA_TINY,
        ),
    )
}


def pick_case(name: str, *, tiny: bool, layers: int | None) -> Case:
    """The case called `name`, tiny and with another number of blocks if asked."""
    case = CASES[name].tiny() if tiny else CASES[name]
    return case if layers is None else case.with_layers(layers)
