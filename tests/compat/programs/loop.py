"""A loop with accelerate, as its users write it; each case has another DeepSpeedPlugin, or none."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, set_seed
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

# case -> the plugin's arguments; None for DDP.
ZERO: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "z1": {"zero_stage": 1},
    "z2": {"zero_stage": 2},
    "z3": {"zero_stage": 3, "zero3_save_16bit_model": True},
    "z2cpu": {"zero_stage": 2, "offload_optimizer_device": "cpu"},
    "z3cpu": {
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "zero3_save_16bit_model": True,
    },
}


def make_model(lora: bool) -> Any:
    set_seed(7)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 64, (32, 12), generator=source)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(case: str, folder: str) -> dict[str, Any]:
    """Two epochs with a checkpoint between them, to which the run goes back; then whole weights, files and tokens."""
    lora, zero = case.endswith("-lora"), ZERO[case.removesuffix("-lora")]
    plugin = None
    if zero is not None:
        plugin = DeepSpeedPlugin(gradient_accumulation_steps=2, gradient_clipping=0.5, **zero)
    accelerator = Accelerator(gradient_accumulation_steps=2, deepspeed_plugin=plugin, cpu=plugin is None)
    model = make_model(lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(batches(), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    found: dict[str, Any] = {"losses": [], "norms": [], "rates": []}

    def epoch(keep: dict[str, Any]) -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    keep["norms"].append(float(norm))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            keep["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
            keep["rates"].append(scheduler.get_last_lr()[0])

    epoch(found)
    accelerator.save_state(f"{folder}/{case}")
    first = {"losses": [], "norms": [], "rates": []}
    epoch(first)
    accelerator.load_state(f"{folder}/{case}")
    again = {"losses": [], "norms": [], "rates": []}
    epoch(again)
    found["after"], found["resumed_as_was"] = (
        first,
        first["losses"] == again["losses"] and first["norms"] == again["norms"],
    )
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        found["sums"] = {name: float(value.double().abs().sum()) for name, value in state.items()}
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(f"{folder}/{case}-out", is_main_process=accelerator.is_main_process, state_dict=state)
    model.eval()
    with torch.no_grad():
        prompt = batches()[accelerator.process_index]["input_ids"][None, :4].to(accelerator.device)
        tokens = plain.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    found["tokens"] = tokens.tolist()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return found
