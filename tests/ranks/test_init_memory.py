"""No rank ever holds the model: resident memory and bytes read while a model is built and loaded, in fresh processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("loading_memory.py")
# What a rank holds besides its shard and two units: freed blocks that malloc keeps, a bound for the objects of the model,
# gloo's buffers. Measured on 2 and 3 ranks: see docs/design/loading.md.
CONSTANT = 32 << 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(size: int, *arguments: str) -> list[dict]:
    port = str(_free_port())
    ranks = []
    for rank in range(size):
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=240)
            assert rank.returncode == 0, err
            results.append(json.loads(out.strip().splitlines()[-1]))
    finally:
        for rank in ranks:
            rank.kill()
    return results


def _check(found: list[dict]) -> None:
    size = len(found)
    for rank, facts in enumerate(found):
        bound = facts["model"] / size + 2 * facts["unit"] + CONSTANT
        print(
            f"rank {rank} of {size}: { ({k: v / 2**20 for k, v in facts.items() if k != 'equal'}) } MiB, {bound / 2**20=}"
        )
        assert facts["peak"] <= bound, (rank, facts)
        assert facts["model"] > 250e6


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_building_takes_a_shard_two_units_and_a_constant(size):
    found = _run(size, "build", "-")
    _check(found)
    assert found[0]["equal"]
    assert all(facts["read"] == 0 for facts in found)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_loading_takes_a_shard_two_units_and_a_constant_and_reads_its_share(size, tmp_path):
    from loading_memory import config
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LlamaForCausalLM(config()).save_pretrained(tmp_path, max_shard_size="100MB")
    found = _run(size, "load", str(tmp_path))
    _check(found)
    assert found[0]["equal"]
    for facts in found:
        assert abs(facts["read"] - facts["model"] / size) <= 0.05 * facts["model"] / size, facts
