"""What does a loss in chunks cost in time, and what does it save at its peak? The head and the loss alone, on one device.

    python benchmarks/loss.py --case full1b
    python benchmarks/loss.py --case full1b --tiny --use-cpu

Prints a JSON line for each form: torch's own on fp32 logits as transformers computes it, `cross_entropy` from logits, and
`head_cross_entropy` from hidden states. A step is forward and backward of head and loss, the forms in turn. Exits with 1 if
their losses disagree. On a CPU peaks are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import CASES, pick_case
from place import Place
from shardwise.tuning.losses import CHUNK_TOKENS, cross_entropy, head_cross_entropy

LOSS_BOUND = 1e-4


def main(argv: list[str]) -> int:
    """Measure; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=sorted(set(CASES) - {"bart"}), default="full1b")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--frozen", action="store_true", help="the head is not trained, as under LoRA")
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, help="tokens at a time")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(argv)
    place = Place.join(use_cpu=options.use_cpu)
    try:
        return measure(options, place)
    finally:
        place.leave()


def measure(options: argparse.Namespace, place: Place) -> int:
    case = pick_case(options.case, tiny=options.tiny, layers=None)
    tokens, width, words = case.tokens, case.shape["hidden_size"], case.shape["vocab_size"]
    torch.manual_seed(1)
    settings = {"device": place.device, "dtype": torch.bfloat16}
    head = nn.Linear(width, words, bias=False, **settings).requires_grad_(not options.frozen)
    hidden = torch.randn(tokens, width, **settings).requires_grad_()
    labels = torch.randint(0, words, (tokens,), device=place.device)
    forms: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: F.cross_entropy(head(hidden).float(), labels),
        "from_logits": lambda: cross_entropy(head(hidden), labels, chunk=options.chunk),
        "from_hidden": lambda: head_cross_entropy(hidden, head, labels, chunk=options.chunk),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}
    for number in range(options.steps + 2):
        for name, form in forms.items():
            hidden.grad = head.weight.grad = None
            place.synchronize()
            if place.cuda:
                torch.cuda.reset_peak_memory_stats(place.device)
                base = torch.cuda.memory_allocated(place.device)
            began = time.perf_counter()
            loss = form()
            loss.backward()
            place.synchronize()
            if number >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - began) * 1000)
            if place.cuda:
                peaks[name] = torch.cuda.max_memory_allocated(place.device) - base
            losses[name] = float(loss.detach())
    for name in forms:
        record = {
            "form": name,
            "case": case.name,
            "tokens": tokens,
            "hidden": width,
            "vocabulary": words,
            "chunk": options.chunk,
            "head": "frozen" if options.frozen else "trained",
            "step_ms": {"median": statistics.median(times[name]), "min": min(times[name]), "max": max(times[name])},
            "peak_bytes": peaks.get(name),
            "loss": losses[name],
        }
        place.say(json.dumps({**record, **place.facts()}))
    apart = max(abs(loss - losses["torch"]) / losses["torch"] for loss in losses.values())
    place.say(f"losses at most {apart:.1e} apart, relative, bound {LOSS_BOUND:.0e}")
    return 0 if apart <= LOSS_BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
