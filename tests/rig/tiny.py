"""Models small enough that 20 training steps take a second, with the structures of the large ones.

All are made from a config with a fixed seed, so every process makes the same weights. Sizes are odd on purpose (a
vocabulary of 61, three layers): nothing divides evenly by 2 or 3 ranks.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

VOCABULARY = 61
LENGTH = 8

ModelName = Literal["llama", "tied", "bart"]
Tuning = Literal["full", "lora", "lora+save"]


def tiny_llama(tied: bool = False, layers: int = 3, seed: int = 11) -> Any:
    """A LlamaForCausalLM of 3 layers and hidden size 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def tiny_bart(seed: int = 12) -> Any:
    """A BartForConditionalGeneration of 2 + 2 layers: encoder, decoder and head share one embedding."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=44,
        decoder_ffn_dim=44,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        attn_implementation="eager",
    )
    return BartForConditionalGeneration(config)


def tiny(name: ModelName, tuning: Tuning = "full") -> Any:
    """The model of that name, in training mode; wrapped by peft unless `tuning` is "full"."""
    model = tiny_bart() if name == "bart" else tiny_llama(tied=name == "tied")
    model.config.use_cache = False
    if tuning != "full":
        model = with_lora(model, save=tuning == "lora+save")
    return model.train()


def with_lora(model: Any, save: bool = False, seed: int = 13) -> Any:
    """`model` with adapters on q and v; with `save`, some modules of it are trained whole as well.

    The ranks are on both sides of the share under which the engine keeps adapters whole (plan.WHOLE_ADAPTER_SHARE):
    8 is sharded in a sharded plan, 2 is not.
    """
    from peft import LoraConfig, get_peft_model

    bart = model.config.model_type == "bart"
    saved = (["layernorm_embedding"] if bart else ["lm_head"]) if save else None
    config = LoraConfig(
        r=2 if save else 8,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=saved,
        task_type="SEQ_2_SEQ_LM" if bart else "CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that a saved head of a tied model is no longer tied: meant here
        return get_peft_model(model, config)


def checkpointed(model: Any, reentrant: bool) -> Any:
    """`model` with transformers' activation checkpointing on, as a script turns it on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5 renames the call, 4 has only this name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if not all(weight.requires_grad for weight in model.parameters()):
        model.enable_input_require_grads()  # re-entrant checkpointing needs an input with a gradient
    return model


def batches(name: ModelName, count: int, samples: int, seed: int = 14) -> list[dict[str, Tensor]]:
    """`count` global batches of `samples` sequences; every sequence has the same number of unmasked targets."""
    source = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = torch.randint(3, VOCABULARY, (samples, LENGTH), generator=source)
        labels = torch.randint(3, VOCABULARY, (samples, 5), generator=source) if name == "bart" else tokens
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return made


def share(batch: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Rank `rank`'s equal part of a batch: samples rank, rank + world_size, and so on, as a sharded loader does."""
    return {name: value[rank::world_size].contiguous() for name, value in batch.items()}


def step_alone(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], world_size: int
) -> list[float]:
    """One step over all ranks' parts of a batch, in one process. Each rank's loss."""
    losses = []
    for rank in range(world_size):
        loss = model(**share(batch, rank, world_size)).loss
        (loss / world_size).backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
    return losses


def micro_batches(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """`batch` in `count` equal parts of consecutive samples."""
    parts = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: value[i] for name, value in parts.items()} for i in range(count)]


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name, each once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
