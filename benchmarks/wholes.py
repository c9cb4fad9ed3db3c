"""What do optimizers of whole parameters (Muon, Adafactor, LAMB) cost in messages and balance? Arithmetic; nothing is run.

    python benchmarks/wholes.py [--ranks 2 4 8 16 64]
    python benchmarks/wholes.py --padding           of the four cases of compare.py, of all their buffers at stage 3, cut at
                                                    elements as they are, and as other layouts would cut each
    python benchmarks/wholes.py --states            of the same cases: the fullest rank's states over the mean, by optimizer

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
from torch import nn

from cases import CASES, Case
from shardwise.estimate.named import named
from shardwise.estimate.states import States
from shardwise.estimate.steppers import steppers_of
from shardwise.plan.blueprint import Blueprint, divide, padding
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


def blueprints_of(case: Case) -> tuple[nn.Module, list[Blueprint]]:
    """Of stage 3 with bf16 weights that compute. The model is on the meta device, and must live as long."""
    model = case.build(torch.device("meta"))
    units = find_units(model, unit_nbytes=UNIT_NBYTES)
    return model, divide(units, Plan.from_stage(3), Precision.named("bf16"), bucket_nbytes=BUCKET_NBYTES)


def paddings(blueprints: Sequence[Blueprint], size: int) -> dict[str, float]:
    """By layout: of the bytes of all buffers over `size` ranks, what is none of a tensor's, in parts of the tensors'."""
    found = {"elements": padding(blueprints, size)}
    for name, pieces_of in LAYOUTS.items():
        held = tensors = 0
        for blueprint in blueprints:
            for members in (blueprint.frozen, blueprint.trainable):
                sizes = [(tuple(m.parameter.shape), m.dtype.itemsize) for m in members]
                tensors += sum(math.prod(shape) * itemsize for shape, itemsize in sizes)
                held += size * fullest(
                    [piece for one in sizes for piece in pieces_of(*one)], size, whole=name == "whole"
                )
        found[name] = held / tensors - 1
    return found


def by_rows(shape: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    rows = shape[0] if len(shape) > 1 else 1
    return [(rows, math.prod(shape) // rows * itemsize)]


def by_blocks(shape: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    return [(-(-math.prod(shape) // 256), 256 * itemsize)]


def as_one(shape: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    return [(1, math.prod(shape) * itemsize)]


# (how many, bytes of each) of what is never cut in a tensor.
LAYOUTS = {"blocks of 256": by_blocks, "rows": by_rows, "whole": as_one}


def fullest(pieces: Sequence[tuple[int, int]], size: int, *, whole: bool) -> int:
    """The bytes of a rank's part of one buffer: every rank's is as large as the fullest. pieces: (how many, bytes of each).

    In order, as many as fit before the next rank's begin; whole tensors in any order, the largest first to the emptiest rank.
    """
    if whole:
        load = [0] * size
        for _, nbytes in sorted(pieces, key=lambda piece: -piece[1]):
            load[load.index(min(load))] += nbytes
        return max(load)
    total, least = sum(n * each for n, each in pieces), max((each for _, each in pieces), default=0)
    low, high = max(least, -(-total // size)), total + least
    while low < high:
        room = (low + high) // 2
        low, high = (low, room) if _ranks_for(pieces, room) <= size else (room + 1, high)
    return low


def _ranks_for(pieces: Sequence[tuple[int, int]], room: int) -> int:
    ranks, free = 1, room
    for count, each in pieces:
        left = count - min(count, free // each)
        free -= (count - left) * each
        while left:
            ranks, taken = ranks + 1, min(left, room // each)
            left, free = left - taken, room - taken * each
    return ranks


def states(model: nn.Module, blueprints: Sequence[Blueprint], size: int) -> dict[str, object]:
    """By optimizer: how its states are spread over `size` ranks."""
    found: dict[str, object] = {}
    for name in ("AdamW", "Muon", "Adafactor", "AdamW8bit"):
        spread = States(blueprints, steppers_of(model, named(name)), size, cuda=True)
        mean = sum(spread.totals) / size
        found[name] = {"bytes": max(spread.totals), "over_mean": round(max(spread.totals) / mean, 4)}
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--padding", action="store_true")
    parser.add_argument("--states", action="store_true")
    options = parser.parse_args(argv)
    if options.padding or options.states:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
        for name in ("bart", "lora8b", "full1b", "full8b"):
            model, blueprints = blueprints_of(CASES[name])
            for size in options.ranks:
                of = paddings(blueprints, size) if options.padding else states(model, blueprints, size)
                kind = "padding" if options.padding else "states"
                row_of = {k: round(v, 7) if isinstance(v, float) else v for k, v in of.items()}
                print(
                    json.dumps({"benchmark": "wholes", "kind": kind, "case": name, "ranks": size, **row_of}), flush=True
                )
        return 0
    for size in options.ranks:
        print(json.dumps({"benchmark": "wholes", "kind": "model", **row(size)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
