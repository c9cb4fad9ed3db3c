"""One process of plain torch: what every plan must reproduce. It walks over the batches of all ranks by itself.

fp32: the global batch in one forward, autograd and the user's optimizer: no line is shared with the engine.
bf16: weights in bf16 compute, each rank's batch apart, gradients averaged and kept in fp32, fp32 masters stepped and
cast back: the recipe that the engine promises, so that what remains between the two is the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20
LEARNING_RATE = 1e-3
ROWS, LENGTH, VOCABULARY = 4, 32, 512

Batch = dict[str, Tensor]


@dataclass
class Curve:
    """losses: the mean over ranks and micro-batches, per step. weights: the trained ones at the end, fp32 on the CPU.

    norms: the global gradient norm before clipping, per step; empty without clipping.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    norms: list[float]


def build_model(trains: str, device: torch.device, layers: int = 4, hidden: int = 128) -> nn.Module:
    """A Llama in fp32 with seeded weights. trains: "lora", or "full": all weights, the head tied to the embedding."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=trains == "full",
        attn_implementation="eager",  # the only attention whose backward repeats bit by bit
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    if trains == "lora":
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=linears))
        # PEFT starts lora_B at zero, which leaves lora_A without a gradient: start away from it.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.to(device).train()


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute every block in backward, non-reentrant."""
    # transformers 5.20 renamed the method and warns on the old name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def batch_of(step: int, micro: int, rank: int, device: torch.device) -> Batch:
    """The tokens of one rank and micro-batch: (ROWS, LENGTH), int64, no padding. Five steps' worth, in turn."""
    generator = torch.Generator().manual_seed(10_000 * (step % 5) + 100 * micro + rank)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids.clone()}


def adamw(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of both sides. eps: above rounding noise, so that Adam does not blow up what cancels."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01, eps=1e-6, fused=True)


def optimizer_named(name: str, parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> torch.optim.Optimizer:
    """adamw, half (that of every other parameter), or one that steps whole ones: adafactor, or muon, of matrices alone."""
    if name == "adamw":
        return adamw(parameters)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "half":
        return adamw(trained[::2])
    if name == "muon":
        return torch.optim.Muon(trained, lr=LEARNING_RATE, weight_decay=0.01)
    return torch.optim.Adafactor(trained, lr=10 * LEARNING_RATE, weight_decay=0.01)


def train_alone(
    trains: str,
    precision: str,
    world_size: int,
    device: torch.device,
    *,
    accumulation: int = 1,
    clip: float | None = None,
    optimizer: str = "adamw",
) -> Curve:
    """Train for STEPS steps on the batches of `world_size` ranks."""
    train = _train_fp32 if precision == "no" else _train_bf16
    return train(trains, world_size, device, accumulation, clip, optimizer)


def _train_fp32(
    trains: str, world_size: int, device: torch.device, accumulation: int, clip: float | None, named: str
) -> Curve:
    model = build_model(trains, device)
    optimizer = optimizer_named(named, model.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        seen = []
        for micro in range(accumulation):
            parts = [batch_of(step, micro, rank, device) for rank in range(world_size)]
            whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            loss = model(**whole).loss
            (loss / accumulation).backward()
            seen.append(loss.detach())
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(seen).mean())
    weights = {name: p.detach().float().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return Curve(torch.stack(losses).tolist(), weights, [float(norm) for norm in norms])


def _train_bf16(
    trains: str, world_size: int, device: torch.device, accumulation: int, clip: float | None, named: str
) -> Curve:
    model = build_model(trains, device)
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer_named(named, list(masters.values()))
    losses, norms = [], []
    for step in range(STEPS):
        seen = []
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in range(accumulation):
            for rank in range(world_size):
                loss = model(**batch_of(step, micro, rank, device)).loss
                (loss / accumulation).backward()
                seen.append(loss.detach().float())
                for name, parameter in trained.items():
                    assert parameter.grad is not None
                    masters[name].grad.add_(parameter.grad.float(), alpha=1 / world_size)  # type: ignore[union-attr]
                    parameter.grad = None
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(masters.values(), clip))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
        losses.append(torch.stack(seen).mean())
    weights = {name: master.detach().cpu() for name, master in masters.items()}
    return Curve(torch.stack(losses).tolist(), weights, [float(norm) for norm in norms])
