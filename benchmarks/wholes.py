"""What do optimizers of whole parameters (Muon, Adafactor, LAMB) cost in messages and balance? Arithmetic; nothing is run.

    python benchmarks/wholes.py [--ranks 2 4 8 16 64]
    python benchmarks/wholes.py --padding           of the four cases of compare.py, of all their buffers at stage 3

The matrices are those of the blocks of a Llama with 8 billion weights. Of an element whose owner is another rank eight bytes
travel to it (fp32 master and gradient) and four back. Beside it: what one more all-gather of 16-bit weights would bring a rank,
and the operations of Newton-Schulz, 5 steps of 4 m n^2 + 2 n^3 for a matrix of m x n (n the shorter side), at a rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence

import torch

from cases import CASES, Case
from shardwise.plan.blueprint import divide
from shardwise.plan.layout import Layout
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.plan.units import find_units
from shardwise.step.wholes import cost_of, owners_of
from shardwise.zero.build import BUCKET_NBYTES
from shardwise.zero.sharded import UNIT_NBYTES

SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
BLOCKS = 32
RATE = 600e12  # assumed: bf16 products of such sizes on an H200


def newton_schulz(shape: Sequence[int]) -> int:
    """Operations: X X^T, its square, and a product with X, five times."""
    return 5 * 2 * cost_of(shape)


def row(size: int) -> dict[str, object]:
    layout = Layout.pack([(str(n), shape, math.prod(shape)) for n, shape in enumerate(SHAPES)], size, 32)
    held: list[dict[int, int]] = [{} for _ in SHAPES]
    for place in range(size):
        for piece in layout.pieces(place):
            held[piece.slot][place] = piece.numel
    load, shapes = [0] * size, SHAPES * BLOCKS
    owners = owners_of([cost_of(shape) for shape in shapes], held * BLOCKS, load)
    sent, operations, elements = [0] * size, [0] * size, [0] * size
    for owner, shape, lies in zip(owners, shapes, held * BLOCKS, strict=True):
        operations[owner] += newton_schulz(shape)
        elements[owner] += math.prod(shape)
        for place, numel in lies.items():
            sent[place] += numel if place != owner else 0
    weights = sum(elements)
    return {
        "ranks": size,
        "elements_that_travel": round(sum(sent) / weights, 3),
        "bytes_sent_by_a_rank_per_weight": round(12 * max(sent) / weights, 3),
        "of_one_more_all_gather": round(2 * (1 - 1 / size), 3),
        "operations_max_over_mean": round(max(operations) * size / sum(operations), 3),
        "states_max_over_mean": round(max(elements) * size / weights, 3),
        "padding": round(layout.numel / sum(math.prod(shape) for shape in SHAPES) - 1, 6),
        "newton_schulz_ms": round(1000 * max(operations) / RATE, 1),
    }


def padding(case: Case, size: int) -> float:
    """Of the bytes of all buffers at stage 3 over `size` ranks, the share that is none of a tensor's."""
    model = case.build(torch.device("meta"))
    units = find_units(model, unit_nbytes=UNIT_NBYTES)
    held = tensors = 0
    for blueprint in divide(units, Plan.from_stage(3), Precision.named("bf16"), bucket_nbytes=BUCKET_NBYTES):
        if blueprint.frozen:
            held += blueprint.frozen_layout(size).numel
        if blueprint.trainable:
            held += blueprint.trainable_layout(size).numel * blueprint.dtype.itemsize
        tensors += sum(m.parameter.numel() * m.dtype.itemsize for m in (*blueprint.frozen, *blueprint.trainable))
    return held / tensors - 1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--padding", action="store_true")
    options = parser.parse_args(argv)
    if options.padding:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
        for name in ("bart", "lora8b", "full1b", "full8b"):
            shares = {str(size): round(padding(CASES[name], size), 7) for size in options.ranks}
            print(json.dumps({"benchmark": "wholes", "kind": "padding", "case": name, "by_ranks": shares}))
        return 0
    for size in options.ranks:
        print(json.dumps({"benchmark": "wholes", "kind": "model", **row(size)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
