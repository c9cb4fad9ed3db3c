"""No rank ever holds the model: resident memory and bytes read while a model is built and loaded, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from rig.ends import free_port, rank_variables

PROGRAM = Path(__file__).with_name("loading_memory.py")
# What a rank holds besides its shard and two units: freed blocks that malloc keeps, a bound for the objects of the model,
# gloo's buffers. Measured on 2 and 3 ranks: see docs/design/loading.md.
CONSTANT = 32 << 20


def _run(size: int, *arguments: str) -> list[dict]:
    port = free_port()
    ranks = []
    for rank in range(size):
        environment = {**os.environ, **rank_variables(rank, size, port)}
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


def _check(found: list[dict], *, bytes_read: bool = True) -> None:
    size = len(found)
    assert found[0]["equal"]
    for rank, facts in enumerate(found):
        bound = facts["model"] / size + 2 * facts["unit"] + CONSTANT
        print(
            f"rank {rank} of {size}: { ({k: v / 2**20 for k, v in facts.items() if k != 'equal'}) } MiB, {bound / 2**20=}"
        )
        assert facts["peak"] <= bound, (rank, facts)
        assert facts["model"] > 250e6
        if bytes_read:
            assert abs(facts["read"] - facts["model"] / size) <= 0.05 * facts["model"] / size, facts


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_building_takes_a_shard_two_units_and_a_constant(size):
    found = _run(size, "build", "-")
    _check(found, bytes_read=False)
    assert all(facts["read"] == 0 for facts in found)


def _save(folder, **options):
    from loading_memory import config
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    model = LlamaForCausalLM(config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_loading_takes_a_shard_two_units_and_a_constant_and_reads_its_share(size, tmp_path):
    _save(tmp_path, max_shard_size="100MB")
    _check(_run(size, "load", str(tmp_path)))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_file_of_torch_save_takes_no_more_and_reads_its_share(size, zipped, tmp_path):
    model = _save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    _check(_run(size, "load", str(tmp_path)))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_what_cannot_be_read_in_stretches_is_read_by_one_rank_and_sent(size, tmp_path):
    state = {name: value.t().contiguous() for name, value in _save(tmp_path).state_dict().items()}
    torch.save(state, tmp_path / "transposed.bin")
    _check(_run(size, "transposed", str(tmp_path)))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_quantising_reads_a_share_of_the_checkpoint(size, tmp_path):
    pytest.importorskip("bitsandbytes")
    _save(tmp_path)
    found = _run(size, "quantised", str(tmp_path))
    assert found[0]["equal"]
    for facts in found:
        print({key: value / 2**20 for key, value in facts.items()})
        assert abs(facts["read"] - facts["file"] / size) <= 0.05 * facts["file"] / size, facts
