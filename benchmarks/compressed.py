"""What do gathers as 8-bit codes change: the weights of a pass, and the loss of a small Llama that is trained with them?

    torchrun --nproc_per_node 2 benchmarks/compressed.py --use-cpu
    torchrun --nproc_per_node 2 benchmarks/compressed.py --use-cpu --tiny

The ranks are told that they sit on machines of their own. A byte-level Llama learns this repository's documents by plain torch.
Then the engine trains it on the sources, all of it and as LoRA, exactly and with `gather_dtype: int8`, on the same batches. The
loss of a training step is of the weights that compute; the held-out loss at the end is of the exact ones, in `gathered`, and of
those that compute. Prints a JSON line for each and two tables. No timing.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from place import Place
from shardwise.config.sections import EngineConfig
from shardwise.plan.compressed import Packing
from shardwise.plan.plan import Plan
from shardwise.plan.precision import LossScaler, Precision
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero.compressed import dequantise, quantise
from shardwise.zero.sharded import ShardedModel

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH = 4, 128  # of a rank's batch
GATHERS = ("none", "int8")


def main(argv: Sequence[str]) -> int:
    """Print the error of the codes, then the losses; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a smaller model, and few steps")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learned", type=int, default=300, help="steps of the base model, before")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    width, layers = (32, 1) if options.tiny else (128, 4)
    steps, learned = (6, 4) if options.tiny else (options.steps, options.learned)
    place = Place.join(use_cpu=options.use_cpu)
    ranks = place.ranks
    ranks.machines = tuple(range(ranks.world_size))
    errors = {name: relative_error(weights) for name, weights in drawn().items()}
    base = Training(place, build(width, layers)).learn(text("docs", ".md"), learned)
    errors |= {f"the base's {name}": value for name, value in of_model(base).items()}
    place.say(json.dumps({"benchmark": "compressed", "relative_rms": errors, **place.facts()}))
    sources, found = text("src", ".py"), {}
    for tuning in ("full", "lora"):
        for gather_dtype in GATHERS:
            model = build(width, layers)
            model.load_state_dict(base.state_dict())
            record = Training(place, adapted(model) if tuning == "lora" else model).tune(sources, steps, gather_dtype)
            found[tuning, gather_dtype] = record
            said = {"benchmark": "compressed", "tuning": tuning, "gather_dtype": gather_dtype, **record}
            place.say(json.dumps({**said, **place.facts()}))
    for name, value in errors.items():
        place.say(f"{name:<40}{100 * value:>8.3f}%")
    shown = sorted({1, 2, *range(10, steps + 1, 10), steps})
    place.say(f"{'loss at step':<28}" + "".join(f"{step:>9}" for step in shown) + f"{'held out':>11}{'passes':>9}")
    for (tuning, gather_dtype), record in found.items():
        losses = "".join(f"{record['losses'][step - 1]:>9.4f}" for step in shown)
        place.say(
            f"{tuning + ', ' + gather_dtype:<28}{losses}{record['held_out']:>11.4f}{record['held_out_in_passes']:>9.4f}"
        )
    return 0


# Weights.


def relative_error(weights: Tensor) -> float:
    """Of a flat tensor in bf16: the root of the mean square of what codes change, over that of the weights."""
    packing = Packing(weights.numel(), 1)
    part = torch.empty(packing.nbytes, dtype=torch.uint8)
    back = torch.empty_like(weights)
    quantise(weights, packing, part)
    dequantise(part, packing, back)
    return float((back.double() - weights.double()).norm() / weights.double().norm())


def drawn() -> dict[str, Tensor]:
    """Kinds of weights, a million of each."""
    source = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1 << 20, generator=source)
    tails = gaussian / (torch.randn(4, 1 << 20, generator=source).square().mean(0).sqrt())
    outliers = gaussian.clone()
    outliers[:: 1 << 10] *= 20
    found = {
        "gaussian": gaussian,
        "uniform": torch.rand(1 << 20, generator=source) - 0.5,
        "Student's t, 4 degrees": tails,
        "gaussian, one of 1024 20 times as large": outliers,
    }
    return {name: (0.02 * values).bfloat16() for name, values in found.items()}


def of_model(model: nn.Module) -> dict[str, float]:
    """The largest error of its weights by kind."""
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        kind = "norms" if "norm" in name else "embedding and head" if "embed" in name or "head" in name else "linears"
        error = relative_error(parameter.detach().bfloat16().cpu().view(-1))
        found[kind] = max(found.get(kind, 0.0), error)
    return found


# A model and its text.


def build(width: int, layers: int) -> nn.Module:
    """A Llama over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=width, intermediate_size=3 * width, **shape))


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA on all linears."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linears))


def text(folder: str, ending: str) -> Tensor:
    """The files of a folder of this repository, in the order of their names, as bytes."""
    files = sorted((ROOT / folder).rglob(f"*{ending}"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


class Training:
    """Of one model, of which each rank has a copy. The last tenth of a text is held out."""

    def __init__(self, place: Place, model: nn.Module) -> None:
        self.place = place
        self.model = model.to(place.device)

    def batch(self, source: Tensor, step: int, rank: int, *, held_out: bool = False) -> dict[str, Tensor]:
        cut = len(source) * 9 // 10
        part = source[cut:] if held_out else source[:cut]
        generator = torch.Generator().manual_seed(1_000_000 * held_out + 1000 * step + rank)
        begins = torch.randint(len(part) - LENGTH, (ROWS,), generator=generator).tolist()
        tokens = torch.stack([part[begin : begin + LENGTH] for begin in begins]).long().to(self.place.device)
        return {"input_ids": tokens, "labels": tokens}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.model(**batch).loss
        return found

    def learn(self, source: Tensor, steps: int) -> nn.Module:
        """Train in fp32 by plain torch, all ranks the same."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.0)
        for step in range(steps):
            self.loss(self.batch(source, step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.model

    def tune(self, source: Tensor, steps: int, gather_dtype: str) -> dict[str, Any]:
        """Train by the engine at stage 3 in bf16; the losses are means over the ranks."""
        place, ranks = self.place, self.place.ranks
        trained = [p for p in self.model.parameters() if p.requires_grad]
        lora = len(trained) < len(list(self.model.parameters()))
        optimizer = torch.optim.AdamW(trained, lr=2e-3 if lora else 3e-4, weight_decay=0.0)
        precision = Precision.named("bf16")
        options = EngineConfig.model_validate({"gather_dtype": gather_dtype})
        sharded = ShardedModel(self.model, plan=Plan.from_stage(3), ranks=ranks, precision=precision, options=options)
        stepper = ShardedOptimizer(optimizer, [sharded], scaler=LossScaler.for_precision(precision))
        losses = []
        for step in range(steps):
            loss = self.loss(self.batch(source, step, place.rank))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(self._mean(loss))
        with torch.no_grad():
            in_passes = self._held_out(source)
            with sharded.gathered():
                exact = self._held_out(source)
        assert not stepper.step_was_skipped
        sharded.release()
        return {"losses": losses, "held_out": exact, "held_out_in_passes": in_passes}

    def _held_out(self, source: Tensor) -> float:
        found = [self._mean(self.loss(self.batch(source, i, self.place.rank, held_out=True))) for i in range(16)]
        return sum(found) / len(found)

    def _mean(self, loss: Tensor) -> float:
        value = loss.detach().double()
        self.place.ranks.all_reduce(value, "mean")
        return float(value)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
