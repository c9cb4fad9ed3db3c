"""What shardwise promises, held on GPUs with NCCL. One run of worker.py does the work; each test reads its rows."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from rig.one_gpu import command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of one run of the worker, over two processes; on one GPU that takes some 15 minutes."""
    path = tmp_path_factory.mktemp("gpu") / "rows.json"
    worker = Path(__file__).with_name("worker.py")
    done = subprocess.run(
        [*command(worker), "--json", str(path)], capture_output=True, text=True, timeout=1400, check=False
    )
    print(done.stdout[-8000:])
    assert path.exists(), f"the worker ended with {done.returncode}:\n{done.stderr[-4000:]}"
    found = json.loads(path.read_text())
    if done.returncode and all(row["ok"] for row in found):
        pytest.fail(f"the worker ended with {done.returncode} after {len(found)} checks:\n{done.stderr[-4000:]}")
    return found


def failures(rows: list[dict], kind: str) -> list[str]:
    """The failed rows of a kind, as text. At least one row of that kind must be there."""
    of_kind = [row for row in rows if row["kind"].startswith(kind)]
    assert of_kind, f"the worker ran no {kind} check"
    return [
        f"{row['name']}: loss {row['loss']}, weight {row['weight']} {row['note']}" for row in of_kind if not row["ok"]
    ]


def test_every_plan_gives_the_curve_of_one_process_in_fp32(rows: list[dict]) -> None:
    assert not failures(rows, "parity fp32")


def test_every_plan_gives_the_curve_of_one_process_in_bf16(rows: list[dict]) -> None:
    assert not failures(rows, "parity bf16")


def test_offloading_gives_the_bits_of_a_run_that_does_not(rows: list[dict]) -> None:
    assert not failures(rows, "offload")


def test_copy_engines_give_the_bits_of_collectives(rows: list[dict]) -> None:
    assert not failures(rows, "peers")


def test_stepping_and_publishing_in_groups_gives_the_bits_of_one_call(rows: list[dict]) -> None:
    assert not failures(rows, "groups")


def test_ranks_on_different_routes_train_as_a_plain_model(rows: list[dict]) -> None:
    assert not failures(rows, "routes")


def test_three_runs_give_the_same_bits(rows: list[dict]) -> None:
    assert not failures(rows, "repeat")


def test_pinned_memory_is_of_the_exact_size(rows: list[dict]) -> None:
    assert not failures(rows, "pinned")


def test_a_model_built_on_the_device_without_memory_has_the_numbers_of_an_ordinary_build(rows: list[dict]) -> None:
    assert not failures(rows, "built")


def test_what_only_a_device_can_do_wrong_is_done_right(rows: list[dict]) -> None:
    assert not failures(rows, "hazard")


def test_delays_on_any_stream_change_no_bit(rows: list[dict]) -> None:
    assert not failures(rows, "stress")
