"""Programs written for DeepSpeed beside themselves under DDP: two processes, fp32, every logged number.

The programs are in `programs/`, and run unchanged: under `shardwise launch` alone as DDP, with --as-deepspeed under ZeRO.
Every case of a test run shares one run of two processes, because most of a run is its imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rig.guide import GUIDE

PROGRAMS = Path(__file__).parent / "programs"
ENTRY = "from shardwise.cli.main import main; main()"

COVER = ["loop:z2", "loop:z3", "loop:z3cpu-lora", "trainer:z2", "trainer:z3", "trainer:plain"]
COVER += ["trainer:z3ds", "trainer:z3-pretrained", "trainer:z3no16-adafactor", "seq2seq:z3"]
FULL = ["loop:z1", "loop:z2cpu", "loop:z3cpu", "loop:z3-lora", "loop:z2-lora", "trainer:z1", "trainer:z2cpu"]
FULL += [
    "seq2seq:z2",
    "seq2seq:z3cpu",
    "trainer:z3cpu",
    "trainer:z3cpu-lora",
    "trainer:z2-lora",
    "trainer:z3-lora",
    "trainer:z3dsds",
    "trainer:z2-pretrained",
    "trainer:z3-adafactor",
]
TRL = ["z3-sft", "z3-sft-lora", "z3-sft-large", "z3-dpo", "z3-dpo-lora", "z3-dpopre", "z3-reward", "z3-grpo"]
TRL += ["z2-sft", "z2-dpo", "z2-grpo", "z3cpu-sft", "z3cpu-grpo-lora"]
TRL += ["z2-kto", "z3-kto-lora", "z3cpu-kto", "z2-rloo", "z3-rloo", "z3cpu-rloo", "z3-rloo-lora"]
TRL_COVER = ["z3-kto"]  # in `make test`


def _launch(folder: Path, cases: list[str], *flags: str) -> None:
    _run_program([str(PROGRAMS / "run.py"), str(folder), *cases], "--num_processes", "2", *flags)


def _run_program(command: list[str], *flags: str) -> str:
    """Under `shardwise launch` on the CPU. What it printed."""
    launch = [sys.executable, "-c", ENTRY, "launch", "--use_cpu", *flags, *command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=550, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def _reference(case: str) -> str:
    program, _, rest = case.partition(":")
    _, _, kind = rest.partition("-")
    return f"{program}:ddp{'-' + kind if kind else ''}"


def _run(folder: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    sys.path.insert(0, str(PROGRAMS))
    try:
        import loop
        import preference
    finally:
        sys.path.remove(str(PROGRAMS))
    for program, make_model in (("trainer", loop.make_model), ("preference", preference.make_model)):
        (folder / program).mkdir()
        make_model(False).save_pretrained(folder / program / "base")
    preference.pairs().to_json(folder / "preference" / "pairs.jsonl")
    _launch(folder, sorted({_reference(case) for case in cases}))
    _launch(folder, cases, "--as-deepspeed", "--zero_stage", "3", "--zero3_save_16bit_model", "true")
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def cover(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("cover")
    also = [f"preference:{case}" for case in TRL_COVER] if find_spec("trl") is not None else []
    return folder, _run(folder, COVER + also)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("full")
    return folder, _run(folder, FULL)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("trl")
    return _run(tmp_path_factory.mktemp("trl"), [f"preference:{case}" for case in TRL])


def _close(found: list[float], expected: list[float], tolerance: float) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= tolerance * abs(other), (found, expected)


def _check_loop(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["resumed_as_was"]
    for mine, theirs in ((found, expected), (found["after"], expected["after"])):
        _close(mine["losses"], theirs["losses"], 1e-5)
        _close(mine["norms"], theirs["norms"], 1e-4)
        assert mine["rates"] == theirs["rates"]
    assert found["tokens"] == expected["tokens"]
    assert found["sums"].keys() == expected["sums"].keys()
    names = sorted(found["sums"])
    _close([found["sums"][n] for n in names], [expected["sums"][n] for n in names], 1e-5)


def _check_trainer(case: str, found: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    assert found["resumed_as_was"]
    assert len(found["log"]) == len(expected["log"]) == 8
    names = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-4}
    # A schedule of DeepSpeed's engine has stepped when Trainer logs the rate; DeepSpeed's own formula is another rate.
    if "ds" not in case:
        names["learning_rate"] = 0.0
    if "dsds" in case:
        rates = [row["learning_rate"] for row in found["log"] if "loss" in row]
        assert rates == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025], abs=1e-12)
        return
    for name, tolerance in names.items():
        numbers = [[row[name] for row in rows["log"] if name in row] for rows in (found, expected)]
        _close(numbers[0], numbers[1], tolerance)
    if case.startswith("z3no16"):
        return  # no weights are written, only the engine's checkpoints
    reference = f"ddp{'-' + case.partition('-')[2] if '-' in case else ''}"
    written = sorted((folder / "trainer" / reference / "final").glob("*.safetensors"))
    assert written
    for path in written:
        theirs, mine = load_file(path), load_file(folder / "trainer" / case / "final" / path.name)
        assert mine.keys() == theirs.keys()
        assert all((mine[n].float() - theirs[n].float()).abs().max() <= 1e-5 for n in mine)
    if case.endswith("pretrained") and case.startswith("z3"):
        assert found["deferred"] >= 15  # every matrix; transformers' own way has all of them on each rank
    if case == "plain":
        assert found["stage"] == 3


def _check_seq2seq(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tolerance in {"loss": 1e-5, "grad_norm": 1e-4, "eval_loss": 1e-5}.items():
        numbers = [[row[name] for row in rows["log"] if name in row] for rows in (found, expected)]
        _close(numbers[0], numbers[1], tolerance)
    _close([found["after"]], [expected["after"]], 1e-5)  # of the best model, which is not the last
    for name in ("best", "tokens", "sums"):
        assert found[name] == expected[name], name


def _check_preference(results: dict[str, dict[str, Any]], case: str) -> None:
    found = results[f"preference-{case}"]["log"]
    expected = results[f"preference-ddp-{case.partition('-')[2]}"]["log"]
    # Differences of nearly equal log probabilities, such as a reward's margin, are compared by their absolute size; and
    # RLOO's loss, in which advantages of about one cancel, by theirs.
    least = {"loss": 1.0} if "rloo" in case else {}
    for name, tolerance in {
        "loss": 1e-5,
        "grad_norm": 1e-4,
        "kl": 1e-4,
        "rewards/margins": 1e-4,
        "reward": 0.0,
    }.items():
        for mine, theirs in zip(found, expected, strict=True):
            if name in theirs:
                size = max(abs(theirs[name]), least.get(name, 1e-2))
                assert abs(mine[name] - theirs[name]) <= tolerance * size, (name, mine, theirs)


def _check(runs: tuple[Path, dict[str, dict[str, Any]]], case: str) -> None:
    folder, results = runs
    found, expected = results[case.replace(":", "-")], results[_reference(case).replace(":", "-")]
    if case.startswith("loop"):
        _check_loop(found, expected)
    elif case.startswith("seq2seq"):
        _check_seq2seq(found, expected)
    else:
        _check_trainer(case.partition(":")[2], found, expected, folder)


@pytest.mark.parametrize("case", COVER)
def test_a_program_for_deepspeed_has_ddps_numbers(cover, case):
    _check(cover, case)


@pytest.mark.full
@pytest.mark.parametrize("case", FULL)
def test_every_kind_of_program_has_ddps_numbers(full, case):
    _check(full, case)


@pytest.mark.full
@pytest.mark.parametrize("case", TRL)
def test_trls_trainers_have_ddps_numbers(preferences, case):
    _check_preference(preferences, case)


@pytest.mark.parametrize("case", TRL_COVER)
def test_one_of_trls_trainers_has_ddps_numbers(cover, case):
    pytest.importorskip("trl")
    _check_preference(cover[1], case)


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_the_script_of_pefts_guide_learns_its_messages(tmp_path, processes):
    examples = Path(__file__).resolve().parents[2] / "examples"
    config = tmp_path / "ds_zero3_cpu.yaml"
    config.write_text(GUIDE)
    command = [str(PROGRAMS / "guide.py"), str(tmp_path)]
    command += [str(examples / "base_model" / "seq2seq"), str(examples / "data" / "train.csv")]
    _run_program(command, "--as-deepspeed", "--config_file", str(config), "--num_processes", str(processes))
    assert json.loads((tmp_path / "guide.json").read_text()) == {"accuracy": 100.0, "zero3": True}
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) > 20
    assert all(tensor.numel() and tensor.abs().sum() > 0 for tensor in adapter.values())
