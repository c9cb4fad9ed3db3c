"""One tiny model of each architecture that the library is tried on, its batches, and how it is asked to generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 67
LENGTH = 8

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    **_TOKENS,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "dropout": 0.0,
    "init_std": 0.1,
    "decoder_start_token_id": 2,
    **_TOKENS,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Kind:
    """model: the class in transformers; config: its config's class and settings; inputs: what a batch is made of.

    generates: the name of the input that `generate` takes, or None.
    """

    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    generates: str | None = None


def _tokens(samples: int, source: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=source)


def _causal(samples: int, source: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(samples, source)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def _pairs(samples: int, source: torch.Generator) -> dict[str, Tensor]:
    return _causal(samples, source) | {"labels": _tokens(samples, source, 5)}


def _speech(samples: int, source: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(samples, 8, 40, generator=source), "labels": _tokens(samples, source, 5)}


def _images(samples: int, source: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(samples, 3, 16, 16, generator=source),
        "labels": torch.randint(0, 5, (samples,), generator=source),
    }


ZOO: dict[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", _DECODER, _causal, "input_ids"),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", _DECODER, _causal, "input_ids"),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", _DECODER, _causal, "input_ids"),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 8}, _causal, "input_ids"),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _DECODER | _EXPERTS | {"shared_expert_intermediate_size": 24},
        _causal,
        "input_ids",
    ),
    "qwen3_moe": Kind(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _DECODER | _EXPERTS | {"head_dim": 8}, _causal, "input_ids"
    ),
    "gemma": Kind("GemmaForCausalLM", "GemmaConfig", _DECODER | {"head_dim": 8}, _causal, "input_ids"),
    "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", _DECODER | {"head_dim": 8}, _causal, "input_ids"),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        | _TOKENS,
        _causal,
        "input_ids",
    ),
    "t5": Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        _pairs,
        "input_ids",
    ),
    "bart": Kind(
        "BartForConditionalGeneration",
        "BartConfig",
        _PAIR | {"max_position_embeddings": 64, "forced_eos_token_id": None},
        _pairs,
        "input_ids",
    ),
    "whisper": Kind(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _PAIR
        | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
        # Its own rules for which tokens may come; the real ones lie outside of a tiny vocabulary.
        | {"begin_suppress_tokens": None, "suppress_tokens": None},
        _speech,
        "input_features",
    ),
    "bert": Kind(
        "BertForMaskedLM",
        "BertConfig",
        _ENCODER | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0},
        _causal,
    ),
    "vit": Kind(
        "ViTForImageClassification",
        "ViTConfig",
        _ENCODER | {"image_size": 16, "patch_size": 4, "num_labels": 5},
        _images,
    ),
}


def config_of(name: str) -> Any:
    import transformers

    kind = ZOO[name]
    config = getattr(transformers, kind.config)(**kind.settings)
    config._attn_implementation = "eager"
    return config


def class_of(name: str) -> Any:
    import transformers

    return getattr(transformers, ZOO[name].model)


def batches_of(name: str, count: int, samples: int, seed: int = 14) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return [ZOO[name].inputs(samples, source) for _ in range(count)]


def with_all_linear_lora(model: nn.Module, seed: int = 13) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"))
