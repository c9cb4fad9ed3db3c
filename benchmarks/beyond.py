"""Does a model train whose 16-bit weights are several times larger than the GPU's memory, and in how many bytes?

    python benchmarks/beyond.py --card 24 --times 3           LoRA on weights of 72 GB, with the GPU cut down to 24 GB
    python benchmarks/beyond.py --card 24 --times 3 --nvme /mnt/drive
    python benchmarks/beyond.py --tiny --use-cpu

Random weights, ZeRO-3 on the ranks there are, base and optimizer in host memory (or files), adapters on the device. The
model never exists whole: its shards are filled block by block. Prints one JSON line: bytes at rest by role and tier, the
peak on the device, seconds to build, seconds of each step beside what copying the weights twice takes, and the losses of
one batch that is trained again and again, which must fall. Exit code 1 if they do not, or if the peak exceeds the card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from cases import CASES, Case
from place import Place
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero.sharded import ShardedModel
from shardwise.zero.sources import MadeBy, Source

_TILE = 1 << 22


class Tiled:
    """Values of one weight: one random tile over and over, of the spread that the width asks for; drawn in no time."""

    tile: Tensor | None = None
    made_by: MadeBy = "each rank"

    def __init__(self, parameter: Parameter, zero: bool) -> None:
        self.dtype = parameter.dtype
        self.scale = 0.0 if zero else float(parameter.shape[-1]) ** -0.5 if parameter.ndim > 1 else 1.0
        self.constant = parameter.ndim == 1

    def read(self, begin: int, end: int) -> Tensor:
        if self.constant or self.scale == 0.0:
            return torch.full((end - begin,), self.scale, dtype=self.dtype)
        if Tiled.tile is None:
            Tiled.tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0))
        tile = (Tiled.tile * self.scale).to(self.dtype)
        first = begin % _TILE
        repeats = -(-(first + end - begin) // _TILE)
        return tile.repeat(repeats)[first : first + end - begin]

    def facts(self) -> list[Tensor]:
        return []

    def adopt(self, facts: object) -> None:
        pass


def build(case: Case, layers: int) -> tuple[nn.Module, dict[int, Source]]:
    """The model without memory, and where its values come from. Its rotary frequencies are real."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    case = case.with_layers(layers)
    model = case.build(torch.device("meta"), adapter_dtype=torch.bfloat16)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, LlamaRotaryEmbedding):
                setattr(module, name, LlamaRotaryEmbedding(model.config))
    sources: dict[int, Source] = {id(p): Tiled(p, "lora_B" in name) for name, p in model.named_parameters()}
    return model, sources


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--card", type=float, default=24.0, help="GB of the card that is emulated")
    parser.add_argument("--times", type=float, default=3.0, help="size of the weights, in cards")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--nvme", help="a directory: the base rests there instead of in host memory")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args()
    place = Place.join(use_cpu=options.use_cpu)
    card = int(options.card * 1e9)
    if place.cuda:
        torch.cuda.set_per_process_memory_fraction(card / torch.cuda.get_device_properties(place.device).total_memory)
    case = CASES["lora8b"].tiny() if options.tiny else CASES["lora8b"]
    wide = {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_key_value_heads": 8}
    if not options.tiny:
        case.shape.update(wide)
    one = sum(p.numel() for p in build(case, 1)[0].parameters())
    block = sum(p.numel() for p in build(case, 2)[0].parameters()) - one
    layers = 3 if options.tiny else max(1, round((options.times * card / 2 - (one - block)) / block))
    started = time.perf_counter()
    model, sources = build(case, layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    tier = "nvme" if options.nvme else "cpu"
    sharded = ShardedModel(
        model,
        plan=Plan.from_stage(3, offload_optimizer="cpu", offload_param=tier),
        ranks=place.ranks,
        precision=Precision.named("bf16"),
        sources=sources,
        nvme_paths={"param": options.nvme} if options.nvme else None,
    )
    stepper = ShardedOptimizer(optimizer, [sharded], gradient_clipping=1.0)
    built = time.perf_counter() - started
    ids = torch.randint(10, int(case.shape["vocab_size"]), (1, 16 if options.tiny else options.tokens))
    ids = ids.to(place.device)
    losses, seconds = [], []
    for _ in range(options.steps):
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(round(time.perf_counter() - begin, 2))
    peak = torch.cuda.max_memory_allocated(place.device) if place.cuda else 0
    ledger = {**{f"{r}/{t}": n for (r, t), n in sharded.ledger().items()}}
    moments = {f"moments/{t}": n for (_, t), n in stepper.ledger().items()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    record = {
        "layers": layers,
        "frozen_bytes": weights,
        "times_the_card": round(weights / card, 2),
        "at_rest_bytes": {**ledger, **moments},
        "peak_bytes": peak,
        "build_s": round(built, 1),
        "step_s": seconds,
        "losses": [round(loss, 4) for loss in losses],
        "world_size": place.world_size,
        "device": torch.cuda.get_device_name(place.device) if place.cuda else "cpu",
    }
    if place.rank == 0:
        print(json.dumps(record), flush=True)
    sharded.release() if options.tiny else sharded.engine.stores.close()
    return 0 if losses[-1] < losses[0] and peak <= card else 1


if __name__ == "__main__":
    sys.exit(main())
