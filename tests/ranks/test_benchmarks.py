"""The benchmark scripts run in their tiny form, so that they are found broken here and not on a lent GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rig.fresh import Ran, run_script, torchrun
from shardwise.estimate.collectives import collective_s, gather_s
from shardwise.estimate.terms import Terms

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.timeout(180)


def run(script: str, *options: str, ranks: int = 2) -> Ran:
    """Run a benchmark on gloo, as torchrun starts it."""
    return run_script(BENCHMARKS / script, ["--use-cpu", *options], torchrun(ranks))


def records(done: Ran | subprocess.CompletedProcess[str]) -> dict[str, dict]:
    """The JSON lines of a run, by engine."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["engine"]: line for line in lines}


def test_engines_train_one_case_to_the_same_losses() -> None:
    found = records(run("compare.py", "--case", "lora8b", "--tiny", "--rounds", "1", "--warmup", "1", "--steps", "3",
                        "--engines", "ddp,fsdp2,shardwise:3,shardwise:3+opt+param,shardwise:3+lora+recompute"))  # fmt: skip
    assert list(found) == ["ddp", "fsdp2", "shardwise:3", "shardwise:3+opt+param", "shardwise:3+lora+recompute"]
    first = found["ddp"]["losses"]
    for record in found.values():
        assert record["losses"] == pytest.approx(first, rel=5e-3)
        assert record["step_ms"]["min"] > 0
    assert found["shardwise:3"]["at_rest_bytes"]


def test_hook_overhead_is_given_per_unit() -> None:
    done = run(
        "hooks_overhead.py", "--layers", "2", "--steps", "2", "--warmup", "2", "--engines", "shardwise:3", ranks=1
    )
    assert set(records(done)["shardwise:3"]["added_us_per_unit"]) == {"forward", "backward"}


@pytest.mark.full
def test_two_checkouts_train_in_turns_to_the_same_losses() -> None:
    command = [sys.executable, str(BENCHMARKS / "duel.py"), "--old", str(ROOT), "--new", str(ROOT), "--nproc", "2"]
    options = ["--tiny", "--use-cpu", "--layers", "2", "--turns", "2", "--steps", "2", "--warmup", "1", "--bound", "99"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[0])
    assert len(found["ratio"]["of"]) == 2
    assert found["loss_difference"] == 0


def test_the_hosts_time_is_given_by_call() -> None:
    done = run("host_time.py", "--case", "bart", "--tiny", "--steps", "2", "--warmup", "2")
    record = records(done)["shardwise:3"]
    assert record["per_step"]["ShardedOptimizer.step"]["calls"] == 1
    assert 0 < record["per_step"]["Unit.gather"]["ms"] < record["step_ms"]
    assert record["threads"][0]["seconds"] >= 0


def test_messages_of_hosts_are_measured_in_turns_and_counted_in_a_step() -> None:
    script = BENCHMARKS / "host_messages.py"
    environment = {**torchrun(1)[0], "OMP_NUM_THREADS": "1"}
    modelled = run_script(script, ["--model"], [environment])
    lines = [json.loads(line) for line in modelled.stdout.splitlines() if line.startswith("{")]
    assert lines[-1]["hops"]["flags, hops"] == 14
    done = run_script(script, ["--ranks", "2", "--messages", "2", "--turns", "1"], [environment])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["message"] for line in lines] == ["flags", "number", "object"]
    assert all(line[way]["wall_us"] > 0 for line in lines for way in ("ring", "hops"))
    done = run_script(script, ["--steps", "--ranks", "2", "--turns", "1", "--engines", "shardwise:3"], [environment])
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert line["messages"] == {"flags": 2, "flags, without waiting": 1}


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("overlap")


def test_a_gather_under_compute_is_hidden_and_the_rest_exposed(overlap: ModuleType) -> None:
    def kernel(name: str, start: float, end: float, stream: int) -> dict:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": {"stream": stream}}

    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    summary = overlap.summarise([
        kernel("gemm", 0, 1000, 7),
        kernel(gather, 500, 2000, 13),  # 500 us under the first gemm, 250 under the second, 750 alone
        kernel("gemm", 1750, 3000, 7),
        kernel("gemm_of_another_stream", 1900, 2500, 8),  # counts once
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
    ])  # fmt: skip
    assert summary["gather_ms"] == 1.5
    assert summary["gather_hidden_ms"] == 0.75
    assert summary["gather_exposed_ms"] == 0.75
    assert summary["compute_ms"] == 2.25
    assert summary["span_ms"] == 3.0
    assert summary["idle_ms"] == 0.0


def test_a_copy_between_gpus_is_a_gather(overlap: ModuleType) -> None:
    copy = {"ph": "X", "cat": "gpu_memcpy", "ts": 0, "dur": 10}
    assert overlap.kind_of({**copy, "name": "Memcpy PtoP (Device -> Device)"}) == "gather"
    assert overlap.kind_of({**copy, "name": "Memcpy DtoD (Device -> Device)"}) == "copy"


@pytest.mark.full
def test_the_suite_runs_its_cases_and_shows_them_in_one_table(tmp_path: Path) -> None:
    words = ["ddp", "shardwise:3", "shardwise:3+loss"]
    options = ["--tiny", "--use-cpu", "--cases", "lora8b", "--engines", ",".join(words), "--rounds", "1"]
    command = [sys.executable, str(BENCHMARKS / "suite.py"), *options, "--warmup", "1", "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], env=environment,
                          capture_output=True, text=True, timeout=150, check=False)  # fmt: skip
    found = records(done)
    assert list(found) == words
    for record in found.values():
        assert record["losses"] == pytest.approx(found["ddp"]["losses"], rel=5e-3)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(words)
    shown = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("lora8b ")]
    assert shown == words


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("suite")


def test_the_suite_runs_every_engine_eager_and_compiled_and_deepspeed_where_it_is(suite: ModuleType) -> None:
    with_it = suite.engines_of("full1b", None, deepspeed=True, compiled="compile")
    without = suite.engines_of("full1b", None, deepspeed=False, compiled=None)
    assert {"deepspeed:3", "deepspeed:3+compile", "shardwise:3+compile", "fsdp2+compile"} <= set(with_it)
    assert not any(word.startswith("deepspeed") or "compile" in word for word in without)
    assert "shardwise:3+compile+budget+graphs" in with_it
    on_a_cpu = suite.engines_of("lora8b", None, deepspeed=False, compiled="aot")
    assert "shardwise:3+aot+budget+recompute" in on_a_cpu
    assert not any("+compile" in word or "+graphs" in word for word in on_a_cpu)


def test_the_ratio_is_to_the_fastest_peer_of_the_same_kind(suite: ModuleType) -> None:
    def record(engine: str, median: float) -> dict:
        return {"case": "bart", "engine": engine, "step_ms": {"median": median, "min": 1, "max": 2},
                "peak_bytes": {"allocated": 2e9}, "tokens_per_s": 5.0}  # fmt: skip

    runs = [record("ddp", 100), record("fsdp2", 200), record("ddp+compile", 50), record("shardwise:3", 90),
            record("shardwise:3+compile", 60)]  # fmt: skip
    ratios = {line.split()[1]: line.split()[5] for line in suite.table(runs).splitlines()[1:]}
    assert ratios["shardwise:3"] == "0.900"
    assert ratios["shardwise:3+compile"] == "1.200"


def trained(plan: str, folder: Path, *options: str, ranks: int = 2) -> dict:
    """The record of one plan's run of the script that user.py starts, with the settings that its launcher would give it."""
    environments = torchrun(ranks)
    if plan.startswith("shardwise"):
        plans = importlib.import_module("plans")
        precision = "no" if "no" in options else "bf16"
        accumulate = int(options[options.index("--accumulate") + 1]) if "--accumulate" in options else 1
        settings = plans.Settings(precision, accumulate, True, folder, folder)
        told = json.dumps(plans.configuration(plans.parse(plan), settings))
        environments = [{**each, "SHARDWISE_CONFIG": told} for each in environments]
    script = BENCHMARKS / "programs" / "train.py"
    told = ["--use-cpu", "--tiny", "--plan", plan, "--folder", str(folder), "--nvme", str(folder)]
    done = run_script(script, [*told, "--warmup", "2", "--steps", "2", *options], environments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (record,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return record


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("case", "plans", "options"),
    [
        pytest.param("bart", ("ddp", "shardwise:3"), (), marks=pytest.mark.full),
        pytest.param("full1b", ("ddp", "shardwise:2"), ("--free", "--accumulate", "2"), marks=pytest.mark.full),
        ("lora8b", ("fsdp2-torch+aot", "shardwise:3+opt+param+nvme"), ("--precision", "no")),
    ],
)
def test_a_users_script_has_the_same_losses_under_every_front_end(case, plans, options, tmp_path, on_path) -> None:
    if "ddp" in plans:
        pytest.importorskip("accelerate")
    found = {plan: trained(plan, tmp_path, "--case", case, *options) for plan in plans}
    first = next(iter(found.values()))
    for record in found.values():
        assert record["losses"] == pytest.approx(first["losses"], rel=5e-3)
        assert len(record["losses"]) == 4
        assert len(record["step_ms"]) == (1 if "--free" in options else 2)
        start = record["first_step_s"]
        parts = ("launch", "imports", "accelerator", "model", "prepare", "first step")
        assert start["from_start"] > start["from_accelerator"] > 0
        assert set(start) == {"from_start", "from_accelerator", *parts}


def test_saves_of_a_users_script_are_timed_call_by_call(tmp_path, on_path) -> None:
    record = trained("shardwise:3+opt", tmp_path, "--case", "lora8b", "--save-every", "2", "--saves", "2")
    assert len(record["save"]["call_ms"]) == 2
    assert record["save"]["first_call_ms"] > 0
    assert len(record["losses"]) == 2 + 4 + 2 + 4 + 4
    assert len(record["step_ms"]) == 8  # those without saves


@pytest.fixture
def user(on_path) -> ModuleType:
    return importlib.import_module("user")


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("shardwise:4", "a stage belongs to shardwise"),
        ("ddp+opt", "ddp has no option opt"),
        ("shardwise:3+nvme", r"\+nvme means nothing without \+opt or \+param"),
        ("shardwise:3+graphs", r"\+graphs means nothing without \+compile"),
        ("deepspeed:2+param", r"\+param means nothing below stage 3"),
        ("shardwise:0+opt", r"\+opt means nothing below stage 1"),
        ("shardwise:3+opt+int8states+bf16states", r"take \+bf16states or \+int8states"),
        ("fsdp", "no engine is called 'fsdp'"),
    ],
)
def test_a_word_that_is_no_plan_is_refused(word, error, user) -> None:
    with pytest.raises(ValueError, match=error):
        user.parse(word)


def test_plans_that_cannot_run_are_left_out_with_a_line(user, capsys) -> None:
    options = user.options_of(["--tiny", "--use-cpu", "--plans", "fsdp2,fsdp2-torch,shardwise:3", "--save-every", "5"])
    assert [plan.word.text for plan in user.chosen_plans(options)] == ["shardwise:3"]
    said = capsys.readouterr().out
    assert "lora8b, fsdp2: left out: accelerate" in said
    assert "lora8b, fsdp2-torch: left out: torch's loop of this benchmark neither accumulates nor saves" in said


def test_front_ends_that_are_not_installed_are_left_out_with_a_line(user, monkeypatch, capsys) -> None:
    for missing in (("accelerate", "deepspeed"), ("deepspeed",)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, gone=missing: None if name in gone else object())
        options = user.options_of(["--cases", "bart", "--plans", "ddp,deepspeed:3,shardwise:3"])
        kept = [plan.word.text for plan in user.chosen_plans(options)]
        assert kept == (["shardwise:3"] if "accelerate" in missing else ["ddp", "shardwise:3"])
    said = capsys.readouterr().out
    assert "bart, ddp: left out: accelerate is not installed" in said
    assert "bart, deepspeed:3: left out: deepspeed is not installed" in said


@pytest.mark.parametrize(
    "word", ["shardwise:0", "shardwise:3+opt+param+nvme+int8states", "shardwise:3+compile+budget+graphs"]
)
def test_the_yaml_file_of_a_plan_is_one_that_the_launcher_takes(word, user, tmp_path) -> None:
    from shardwise.config.check import checked

    said = user.configuration(user.parse(word), user.Settings("bf16", 2, False, tmp_path, tmp_path))
    config = checked(said)
    assert (config.zero.zero_stage, config.gradient_accumulation_steps, config.mixed_precision) == (
        int(word[10]),
        2,
        "bf16",
    )
    assert config.engine.optimizer_state_dtype == ("int8" if "int8" in word else "fp32")


def user_record(plan: str, ms: float, **more) -> dict:
    """What user.py writes of one run."""
    first = {"from_start": 9.0, "from_accelerator": 4.0}
    shared = {
        "case": "bart",
        "nproc": 2,
        "precision": "bf16",
        "accumulate": 1,
        "free": True,
        "tiny": False,
        "layers": None,
    }
    measured = {"median_ms": ms, "tokens_per_s_per_gpu": 5.0, "peak_bytes": {"allocated": 2e9, "reserved": 3e9}}
    measured |= {
        "host_rss_bytes": 4e9,
        "first_step_s": first,
        "losses": [2.0, 1.0],
        "device": "GPU",
        "torch": "2",
        "nccl": None,
    }
    return {
        "plan": plan,
        "command": "python benchmarks/user.py",
        "commit": "abc",
        "save_every": None,
        **shared,
        **measured,
        **more,
    }


def failed_record(plan: str, error: str) -> dict:
    kept = ("case", "nproc", "precision", "accumulate", "free", "tiny", "layers", "save_every", "command", "commit")
    return {**{key: value for key, value in user_record(plan, 0).items() if key in kept}, "plan": plan, "failed": error}


def test_the_table_of_a_users_script_has_medians_of_rounds_ratios_and_failures(user) -> None:
    save = {"stall_percent": 0.5, "drift_percent": 0.1, "call_ms": [30.0, 50.0]}
    runs = [user_record("ddp", 100), failed_record("fsdp2+cpu", "exit code 1: RuntimeError: no backend"),
            user_record("ddp", 104), user_record("shardwise:3", 51, losses=[2.0, 1.1], save=save)]  # fmt: skip
    lines = [" ".join(line.split()) for line in user.table(runs).splitlines()]
    assert lines[1] == "bart ddp 2 102.0 100.0 104.0 1.000 5 2.00 3.00 4.0 9.0 4.0 0.0e+00"
    assert lines[2] == "bart fsdp2+cpu FAILED exit code 1: RuntimeError: no backend"
    assert lines[3] == "bart shardwise:3 1 51.0 51.0 51.0 0.500 5 2.00 3.00 4.0 9.0 4.0 1.0e-01 0.50 40.0"


def test_the_readmes_table_says_which_commands_printed_it(user, tmp_path, capsys) -> None:
    lines = [
        user_record("ddp", 100),
        user_record("shardwise:3", 50),
        failed_record("fsdp2+cpu", "exit code 1: RuntimeError"),
    ]
    lines.append(
        user_record("shardwise:3", 70, free=False, command="python benchmarks/user.py --rounds 2", commit="def")
    )
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, some in zip(paths, (lines[:3], lines[3:]), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in some))
    assert user.main(["--markdown", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][1:5] == ["BART-large, LoRA on q and v, 2 x GPU, free-running", "`ddp`", "100", "1.00"]
    assert rows[3][1:5] == ["", "`shardwise:3`", "50", "0.50"]
    assert rows[4][1:5] == ["BART-large, LoRA on q and v, 2 x GPU", "`shardwise:3`", "70", "1.00"]
    assert "python benchmarks/user.py\npython benchmarks/user.py --rounds 2\n" in shown
    assert "Commit abc, def; torch 2" in shown
    assert "- `fsdp2+cpu`, BART-large" in shown


@pytest.mark.full
@pytest.mark.timeout(400)
def test_plans_take_turns_as_processes_of_their_own_and_a_failure_is_a_row(tmp_path: Path) -> None:
    plans = "fsdp2-torch,shardwise:3,shardwise:3+opt+nvme"
    (tmp_path / "file").touch()
    command = [
        sys.executable,
        str(BENCHMARKS / "user.py"),
        "--tiny",
        "--use-cpu",
        "--cases",
        "lora8b",
        "--plans",
        plans,
    ]
    command += ["--steps", "2", "--nvme", str(tmp_path / "file"), "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["plan"] for line in lines] == plans.split(",")
    assert lines[1]["losses"] == pytest.approx(lines[0]["losses"], rel=5e-3)
    assert "exit code 1" in lines[2]["failed"]
    assert done.stdout.splitlines()[-1].split()[:3] == ["lora8b", "shardwise:3+opt+nvme", "FAILED"]
    assert done.returncode == 1


@pytest.mark.full
def test_a_program_written_for_deepspeed_is_timed_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    options = ["--tiny", "--use-cpu", "--engines", "shardwise", "--cases", "lora8b", "--stages", "3"]
    command = [sys.executable, str(BENCHMARKS / "programs.py"), *options, "--warmup", "1", "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], env=environment,
                          capture_output=True, text=True, timeout=150, check=False)  # fmt: skip
    record = records(done)["shardwise"]
    assert record["deepspeed"].endswith("+shardwise")
    assert record["world_size"] == 2
    assert len(record["step_ms"]) == 2
    assert len(record["logged"]["loss"]) == len(record["logged"]["grad_norm"]) == 3
    assert record["first_step_done_s"] > record["first_step_begun_s"] > 0
    assert done.stdout.splitlines()[-1].split()[:4] == ["lora8b", "3", "shardwise", "1"]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("programs")


def test_the_table_of_programs_has_ratios_differences_and_failures(programs: ModuleType) -> None:
    def record(median: float, losses: list[float]) -> dict:
        return {"step_ms": [median], "peak_bytes": {"allocated": 2e9, "before": 3e9}, "first_step_done_s": 9.0,
                "logged": {"loss": losses, "grad_norm": [1.0, 1.0]}}  # fmt: skip

    series = [
        programs.Series("lora8b", 3, "deepspeed", [record(100, [4.0, 2.0])]),
        programs.Series("lora8b", 3, "shardwise", [record(50, [4.0, 2.1])]),
        programs.Series("lora8b", 2, "deepspeed", [], ["exit code 1: OutOfMemoryError: CUDA"]),
        programs.Series("lora8b", 2, "shardwise"),
    ]
    lines = programs.table(series).splitlines()
    assert " ".join(lines[2].split()) == "lora8b 3 shardwise 1 50.0 50.0 50.0 2.00 2.00 3.00 9.0 5.0e-02 0.0e+00"
    assert lines[3].endswith("FAILED exit code 1: OutOfMemoryError: CUDA")
    assert lines[4].endswith("not run: the budget is spent")


def test_a_failed_programs_last_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    last_words = importlib.import_module("processes").last_words
    output = (
        "step 1\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\ntorch.distributed.x.ChildFailedError: \n====\n"
    )
    assert last_words(output) == "[rank1]: torch.OutOfMemoryError: CUDA out of memory"
    assert last_words("one\ntwo\n") == "one | two"


def test_the_loss_benchmark_gives_a_line_for_each_form() -> None:
    done = run("loss.py", "--tiny", "--steps", "1", "--chunk", "8", ranks=1)
    assert done.returncode == 0, done.stderr[-2000:]
    forms = [json.loads(line)["form"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert forms == ["torch", "from_logits", "from_hidden"]


def test_a_checkpoint_is_adapters_and_their_states() -> None:
    done = run("checkpoint.py", "--case", "lora8b", "--tiny", "--every", "2", "--saves", "2")
    (found,) = records(done).values()
    assert found["bytes_of_masters_and_states"] < found["bytes"] < 2 * found["bytes_of_masters_and_states"] + 300_000
    assert len(found["call_ms"]["async"]) == 2


def test_the_estimate_is_what_a_run_holds() -> None:
    words = "shardwise:0,shardwise:2,shardwise:3,shardwise:3+opt+param"
    for record in records(run("estimate.py", "--case", "lora8b", "--tiny", "--engines", words)).values():
        sizes = record["at_rest_bytes"]
        assert 0 <= sizes["estimated"] - sizes["measured"] < 400  # step counts


@pytest.mark.parametrize(
    ("case", "forms"),
    [
        ("bart", ["ddp", "gathered", "ddp, again", "each call"] * 2),
        ("lora8b", ["whole", "gathered", "streamed gpu", "streamed cpu"]),
    ],
)
def test_every_way_to_hold_the_weights_generates_the_same_tokens(case: str, forms: list[str]) -> None:
    done = run("generation.py", "--case", case, "--tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["engine"] for line in lines] == forms
    assert all(line["same_tokens"] for line in lines)
    assert all(line["bound_tokens_per_s"] for line in lines if line["engine"] in ("whole", "streamed cpu"))


def test_a_model_built_in_shards_rests_in_the_bytes_that_were_predicted() -> None:
    (record,) = records(run("seventy.py", "--tiny")).values()
    sizes = record["at_rest_bytes"]
    assert sizes["measured"] == {row: count for row, count in sizes["estimated"].items() if row != "gradient"}
    assert record["losses"][-1] < record["losses"][0]


def test_a_4_bit_base_has_the_bytes_of_the_formula_and_the_losses_of_plain_layers() -> None:
    pytest.importorskip("bitsandbytes")
    done = run("quantised.py", "--tiny", "--rounds", "1", "--warmup", "1", "--steps", "3")
    found = records(done)
    assert found["shardwise:3"]["losses"] == pytest.approx(found["ddpamp"]["losses"], rel=1e-4)
    assert found["shardwise:3+opt+param"]["at_rest_bytes"]["frozen/cpu"] > 0
    assert "FAILED" not in done.stdout


def test_gathers_by_copy_engines_are_not_measured_on_cpus() -> None:
    done = run("gathers.py")
    assert "copy engines cannot gather here" in done.stdout
    assert done.returncode == 2


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="inductor needs a C++ compiler")
def test_rounding_is_given_for_eager_and_compiled_blocks() -> None:
    done = run("rounding.py", "--width", "64", "--layers", "1", "--steps", "5", ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))["losses"]
    assert losses["compiled"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["eager"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert "compiled: " in done.stdout


def test_losses_of_8_bit_gathers_are_near_those_of_exact_ones() -> None:
    done = run("compressed.py", "--tiny")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors, *found = lines
    assert errors["relative_rms"]["gaussian"] == pytest.approx(0.0073, rel=0.02)
    for exact, codes in (found[:2], found[2:]):
        assert (exact["gather_dtype"], codes["gather_dtype"]) == ("none", "int8")
        assert codes["losses"] != exact["losses"]
        assert codes["losses"] == pytest.approx(exact["losses"], rel=2e-3)
        assert exact["held_out"] == exact["held_out_in_passes"]


def test_losses_with_moments_as_codes_are_near_those_of_fp32() -> None:
    done = run("state_dtypes.py", "--tiny", ranks=1)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    errors, *runs, times = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert errors["update_error"]["both as bf16"][0] < 0.01
    assert errors["update_error"]["both as int8"][0] < 0.3
    exact, *coded = runs
    assert [one["optimizer_state_dtype"] for one in runs] == ["fp32", "bf16", "int8"]
    for one in coded:
        assert one["losses"] != exact["losses"]
        assert one["losses"] == pytest.approx(exact["losses"], rel=2e-3)
    assert all(row["median"] > 0 for row in times["step_ms"].values())


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def test_gathers_of_codes_send_half_over_machines_and_nothing_else_inside_of_one(scaling: ModuleType) -> None:
    terms = Terms(nvlink=100e9, network=1e9, launch=0.0, latency=0.0, network_latency=0.0, kernel=0.0)
    nbytes = 16 * 2**30
    assert gather_s(nbytes, 8, terms, codes=True) == collective_s(nbytes, 8, terms)
    exact, codes = (gather_s(nbytes, 16, terms, codes=codes) for codes in (False, True))
    arithmetic = (45 / 16 + 3) * nbytes / 2 / terms.memory
    assert codes - arithmetic == pytest.approx(exact * 65 / 128)
    case = scaling.CASES["lora8b"].tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames a property that PEFT reads
        exact, codes = (scaling.between_machines(case, 16, codes=codes) for codes in (False, True))
        assert 0.5 < codes / exact < 0.6
        assert scaling.between_machines(case, 8, codes=False) == 0


def test_the_model_of_scaling_is_near_what_two_ranks_were_measured_to_take(scaling: ModuleType) -> None:
    case = scaling.CASES["lora8b"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames a property that PEFT reads
        row = scaling.predict(case, 2, scaling.rate_of(case, 0.4845), Terms())
    assert row["step_ms"] == pytest.approx(516.7, rel=0.03)  # docs/log.md, 2026-11-22
    assert row["parts_ms"]["compute"] == pytest.approx(484.5, abs=0.1)


@pytest.fixture
def fsdp2(scaling: ModuleType) -> ModuleType:
    return importlib.import_module("scaling_fsdp2")


def test_fsdp2_pads_rows_and_ours_does_not(fsdp2: ModuleType) -> None:
    weights = [
        torch.nn.Parameter(torch.zeros(16, 4)),
        torch.nn.Parameter(torch.zeros(6)),
        torch.nn.Parameter(torch.zeros(())),
    ]
    assert fsdp2.padded(weights, 1) == 16 * 4 + 6 + 1
    assert fsdp2.padded(weights, 8) == 16 * 4 + 8 + 8
    assert fsdp2.padded(weights, 32) == 32 * 4 + 32 + 32


def test_the_model_of_fsdp2_has_one_lane_and_copies_out(scaling: ModuleType, fsdp2: ModuleType) -> None:
    terms = Terms(nvlink=1e9, slowing=0.0, launch=0.0, latency=0.0, memory=4e9)
    forward = [fsdp2.Pass(2.0, 10**9)] * 3  # over two ranks a gather takes 0.5 s, its copy-out 0.5 s
    step = fsdp2.fsdp2_step([*forward, *forward], 2, 0, terms)
    assert (step.compute, step.exposed_gathers) == (6 * 2.0 + 6 * 0.5, 0.5)
    # A reduction of 4 s behind each of two units of 1 s: the second waits for the first, and the end for the second.
    backward = [fsdp2.Pass(1.0, 0, 8 * 10**9)] * 2
    step = fsdp2.fsdp2_step(backward, 2, 0, terms)
    assert step.exposed_reductions == 3.0 + 4.0
    assert fsdp2.fsdp2_step(backward, 1, 0, terms).total == 2.0


@pytest.mark.parametrize("script", ["drive.py", "host_limits.py"])
def test_a_drive_and_a_host_are_measured(script, tmp_path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    more = ["--rounds", "1", "--use-cpu", "--folder", str(folders[1])] if script == "drive.py" else []
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--folder", str(folders[0]), "--mib", "16", *more],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if script == "drive.py":
        assert [line["way"] for line in lines] == ["write", "read"]
        assert all(line["tier_gb_per_s"] > 0 and line["in_place_gb_per_s"] > 0 for line in lines)
    else:
        assert {line["question"] for line in lines} >= {"AdamW on the host", "disk, write", "disk, read"}
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_whole_parameters_send_less_than_one_more_gather(scaling: ModuleType) -> None:
    wholes = importlib.import_module("wholes")
    for size in (2, 8):
        row = wholes.row(size)
        assert row["bytes_sent_by_a_rank_per_weight"] < row["of_one_more_all_gather"]
        assert row["operations_max_over_mean"] < 1.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames a property that PEFT reads
        model, blueprints = wholes.blueprints_of(wholes.CASES["full1b"])
        found = wholes.paddings(blueprints, 64)
    del model  # whose weights the blueprints speak of
    assert 0 <= found["elements"] < 0.02, found
