"""One rank of the measurement in test_init_memory.py; a program of its own, so that nothing was in memory before.

    python loading_memory.py {build|load|transposed|quantised} FOLDER

Prints one JSON line: bytes of the whole model, of the largest unit, by how much the resident memory grew at its peak, bytes
of tensors that were read from files, and a digest of this rank's weights.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig, LlamaForCausalLM

from shardwise.building.deferred_tensors import sources_of
from shardwise.building.loading import building
from shardwise.files.reader import Bytes
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.ranks.ranks import Ranks
from shardwise.zero.sharded import ShardedModel

SEED = 21


def config(hidden: int = 768, layers: int = 8, vocabulary: int = 8000) -> LlamaConfig:
    """69 M weights: 275 MB in fp32, in eight blocks of 28 MB, an embedding and a head of 25 MB."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2048 * hidden // 768,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since `forget_peak`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def model_of(task: str, folder: str) -> Any:
    """transposed: a script's own loading of a file that holds every matrix the other way round."""
    if task == "load":
        return LlamaForCausalLM.from_pretrained(folder)
    if task == "quantised":
        from transformers import BitsAndBytesConfig

        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.float32)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config())
    if task == "transposed":
        state = torch.load(Path(folder) / "transposed.bin")
        model.load_state_dict({name: value.t() for name, value in state.items()})
    return model


def make(task: str, folder: str, ranks: Ranks) -> ShardedModel:
    with building():
        model = model_of(task, folder)
    model.requires_grad_(task != "quantised")
    return ShardedModel(
        model, plan=Plan.from_stage(3), ranks=ranks, precision=Precision.named("no"), sources=sources_of(model)
    )


def values_of(parameter: Any) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    return [parameter, state.absmax, state.state2.absmax, state.offset] if state is not None else [parameter]


def main(task: str, folder: str) -> None:
    ranks = Ranks.join(use_cpu=True)
    torch.set_num_threads(1)
    with building():  # what the libraries load when they are first used is not the model's
        small = LlamaForCausalLM(config(64, 2, 100))
    ShardedModel(
        small, plan=Plan.from_stage(3), ranks=ranks, precision=Precision.named("no"), sources=sources_of(small)
    ).release()
    del small
    before = resident("VmRSS")
    forget_peak()
    sharded = make(task, folder, ranks)
    peak = resident("VmHWM") - before
    read = Bytes.read
    weights = dict(sharded.model.named_parameters())
    units: dict[str, int] = {}
    for unit in sharded.units:
        for buffer in unit.buffers:
            if buffer is not None:
                units[unit.name] = units.get(unit.name, 0) + buffer.whole.numel() * buffer.dtype.itemsize
    expected = None
    if ranks.rank == 0:
        expected = dict(model_of(task, folder).named_parameters())
    equal = True
    for unit in sharded.units:
        members = [m for b in unit.buffers for m in b.members]
        with sharded.gathered([m.parameter for m in members]):
            if expected is not None:
                for member in [m for m in members if m.name in expected]:
                    pairs = zip(values_of(member.parameter), values_of(expected[member.name]), strict=True)
                    equal = equal and all(torch.equal(found, wanted) for found, wanted in pairs)
    found = {
        "model": sum(p.numel() * p.element_size() for p in weights.values()),
        "file": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
        "unit": max(units.values()),
        "peak": peak,
        "read": read,
        "equal": equal,
    }
    ranks.barrier()
    ranks.leave()
    print(json.dumps(found), flush=True)
    os._exit(0)  # what is measured is over; gloo's threads now and then abort a process that ends with them


if __name__ == "__main__":
    main(*sys.argv[1:])
