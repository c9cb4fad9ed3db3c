"""Which is nearer to fp32 when a LoRA begins to train: eager bf16, or bf16 compiled by inductor?

    python benchmarks/rounding.py --layers 6                              the shape of lora8b on one GPU
    python benchmarks/rounding.py --use-cpu --width 1024 --layers 2       smaller, on a CPU with a C++ compiler

No engine is involved: one process, plain torch and PEFT, AdamW on fp32 copies of the adapters, the same batches and seeds. Four
batches in turn; what counts is the loss from the fifth step on, when a batch is seen again. Prints a JSON line and a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from cases import CASES, Case

FORMS = ("fp32", "eager", "compiled")


def main(argv: Sequence[str]) -> int:
    """Train the three forms; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, help="hidden size; heads, vocabulary and batch become small with it")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    case = replace(CASES["lora8b"].with_layers(options.layers), checkpointing=False)
    if options.width:
        small = {
            "hidden_size": options.width,
            "intermediate_size": 2 * options.width,
            "vocab_size": 2000,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        }
        case = replace(case, shape={**case.shape, **small}, rows=1, length=128)
    device = torch.device("cpu" if options.use_cpu else "cuda")
    losses = {form: train(form, case, device, options.steps) for form in FORMS}
    print(json.dumps({"layers": options.layers, "shape": case.shape, "losses": losses}))
    print(f"{'step':<6}" + "".join(f"{form:>12}" for form in FORMS))
    for step in range(options.steps):
        print(f"{step:<6}" + "".join(f"{losses[form][step]:>12.5f}" for form in FORMS))
    seen_again = range(4, options.steps)
    for form in FORMS[1:]:
        apart = sum(abs(losses[form][i] - losses["fp32"][i]) for i in seen_again) / max(1, len(seen_again))
        print(f"{form}: {apart:.2e} from fp32 in the mean, once a batch is seen again")
    return 0


def train(form: str, case: Case, device: torch.device, steps: int) -> list[float]:
    """The loss of each step."""
    model = case.build(device, torch.bfloat16)
    if form == "fp32":
        model = model.float()
    if form == "compiled":
        for module in model.modules():
            if type(module).__name__ in case.blocks:
                module.compile()
    masters = {p: p.detach().float().clone() for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(masters.values()), lr=case.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**case.batch(step, 0, device)).loss
        loss.backward()
        for parameter, master in masters.items():
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
