"""What do optimizers of whole parameters (Muon, Adafactor, LAMB) cost in messages and balance? Arithmetic; nothing is run.

    python benchmarks/wholes.py [--ranks 2 4 8 16 64]

The matrices are those of the blocks of a Llama with 8 billion weights. Of an element whose owner is another rank eight bytes
travel to it (fp32 master and gradient) and four back. Beside it: what one more all-gather of 16-bit weights would bring a rank,
and the operations of Newton-Schulz, 5 steps of 4 m n^2 + 2 n^3 for a matrix of m x n (n the shorter side), at a rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from shardwise.plan.layout import Layout
from shardwise.step.wholes import cost_of, owners_of

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


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    for size in parser.parse_args(argv).ranks:
        print(json.dumps({"benchmark": "wholes", "kind": "model", **row(size)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
