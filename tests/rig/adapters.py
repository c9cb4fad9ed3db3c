"""Every method of peft on a tiny model: one configuration for each of `PeftType`, and variants that save something else."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

QV = ["q_proj", "v_proj"]


def tiny_base(tied: bool = False) -> Any:
    """A LlamaForCausalLM of two layers and width 16: sizes that blocks and subspaces of all methods divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(21)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Normed(nn.Module):
    """Layers with running statistics, as adapters of vision models train them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(22)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


# PeftType -> settings of its configuration. A name with a colon is a variant that saves something else.
SETTINGS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "P_TUNING:LSTM": {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING:projection": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3, "num_frozen_tokens": 1},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "LORA": {"r": 2, "target_modules": QV},
    "LORA:dora": {"r": 2, "target_modules": QV, "use_dora": True},
    "LORA:bias": {"r": 2, "target_modules": QV, "bias": "all", "lora_bias": True},
    "LORA:embeddings": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "LORA:head": {"r": 2, "target_modules": QV, "modules_to_save": ["lm_head"]},
    "LORA:tokens": {"r": 2, "target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "LORA:experts": {"r": 2, "target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
    "ADALORA": {"init_r": 3, "target_r": 2, "target_modules": QV, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 1, "target_modules": QV},
    "BOFT": {"boft_block_size": 4, "target_modules": QV},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "IA3": {"target_modules": [*QV, "down_proj"], "feedforward_modules": ["down_proj"]},
    "BEFT": {"target_modules": QV},
    "LILY": {"r": 2, "num_B": 2, "target_modules": QV},
    "LOHA": {"r": 2, "target_modules": QV},
    "LOKR": {"r": 2, "target_modules": QV},
    "OFT": {"oft_block_size": 4, "target_modules": QV},
    "POLY": {"r": 2, "target_modules": QV, "n_tasks": 2, "n_skills": 2},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VERA": {"r": 2, "target_modules": QV},
    "VERA:seed": {"r": 2, "target_modules": QV, "save_projection": False},
    "FROD": {"target_modules": QV},
    "PVERA": {"r": 2, "target_modules": QV},
    "FOURIERFT": {"n_frequency": 5, "target_modules": QV},
    "GLORA": {"r": 2, "target_modules": QV},
    "XLORA": {"hidden_size": 16, "xlora_depth": 1, "adapters": {}},
    "HRA": {"r": 2, "target_modules": QV},
    "VBLORA": {"r": 2, "num_vectors": 5, "vector_length": 4, "topk": 2, "target_modules": QV},
    "VBLORA:topk": {
        "r": 2, "num_vectors": 5, "vector_length": 4, "topk": 2, "target_modules": QV, "save_only_topk_weights": True,
    },
    "UNILORA": {"r": 2, "theta_d_length": 8, "target_modules": QV},
    "UNILORA:indices": {"r": 2, "theta_d_length": 8, "target_modules": QV, "save_indices": True},
    "MISS": {"r": 2, "target_modules": QV},
    "RANDLORA": {"r": 4, "target_modules": QV},
    "ROAD": {"group_size": 4, "target_modules": QV},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5], "target_modules": ["embed_tokens"]},
    "HIRA": {"r": 2, "target_modules": QV},
    "SHIRA": {"r": 2, "target_modules": QV},
    "C3A": {"block_size": 4, "target_modules": QV},
    "WAVEFT": {"n_frequency": 5, "target_modules": QV},
    "OSF": {"effective_rank": 2, "target_modules": QV},
    "DELORA": {"r": 2, "target_modules": QV},
    "GRALORA": {"r": 4, "gralora_k": 2, "target_modules": QV},
    "TINYLORA": {"r": 2, "u": 3, "target_modules": QV},
    "TINYLORA:seed": {"r": 2, "u": 3, "target_modules": QV, "save_projection": False},
    "PSOFT": {"r": 2, "target_modules": QV},
    "PEANUT": {"r": 2, "target_modules": QV},
    "SHADOW": {"shadow_num_hidden_layers": 1},
    "SUPERTUNING": {"target_modules": QV, "r": 2},
    "DEFT": {"r": 2, "target_modules": QV},
}  # fmt: skip


def config_of(method: str, folder: str | None = None) -> Any:
    """The configuration of a name in SETTINGS. folder: where X-LoRA finds the adapters that it mixes."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PeftType[method.split(":", maxsplit=1)[0]]
    settings = {"task_type": "CAUSAL_LM", **SETTINGS[method]}
    if kind is PeftType.XLORA:
        settings["adapters"] = {str(n): f"{folder}/mixed/{n}" for n in range(2)}
    if kind is PeftType.ADAPTION_PROMPT:
        settings["target_modules"] = "self_attn"
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings)


def adapted(method: str, adapters: tuple[str, ...] = ("default",), folder: str | None = None) -> Any:
    """A tiny model with the named adapters of that method, the first one active; no value of theirs is one of a fresh one."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(23)
        model = get_peft_model(tiny_base(), config_of(method, folder), adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, config_of(method, folder))
    stir(model)
    return model


def stir(model: nn.Module, seed: int = 24) -> None:
    """Move every floating weight a little: adapters begin as zeros, which files could lose without a difference."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
