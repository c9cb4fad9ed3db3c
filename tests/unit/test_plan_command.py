"""`shardwise plan`: a table of plans, the YAML of the fastest that fits, and one sentence for each mistake."""

from __future__ import annotations

import json

import pytest

from shardwise.cli.main import run
from shardwise.cli.plan_machine import tokens_of
from shardwise.config.resolve import resolve
from shardwise.errors import ConfigError

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
MACHINE = ["--gpus", "2", "--gpu", "H100", "--host-memory", "64GB"]
SHORT = ["--sequence_length", "16"]


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def planned(capsys, *arguments: str) -> dict:
    assert run(["plan", *arguments, *MACHINE, *SHORT, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plans_are_in_a_table_the_fastest_that_fits_first(capsys, model):
    assert run(["plan", model, *MACHINE, *SHORT, "--tokens", "1B"]) == 0
    out = capsys.readouterr().out
    assert "2 GPUs, 2 to a machine; a GPU 80.0 GB, host 64.0 GB" in out
    assert "data sheet" in out
    assert "hours" in out
    found = planned(capsys, model, "--tokens", "1B")
    steps = [plan["step_s"] for plan in found["plans"]]
    assert steps[1:] == sorted(steps[1:])
    assert steps[0] <= 1.02 * min(steps)  # of those that take as long the one that is taken
    for plan in found["plans"]:
        assert sum(plan["parts_s"].values()) == pytest.approx(plan["step_s"], abs=1e-5)
        assert plan["tokens_per_s"] == pytest.approx(2 * 16 / plan["step_s"], rel=1e-3)
        assert plan["hours"] == pytest.approx(1e9 / plan["tokens_per_s"] / 3600, rel=1e-3)
    assert not any("nvme" in plan["offload_optimizer_device"] for plan in found["plans"])


def test_a_drive_brings_its_plans(capsys, model):
    found = planned(capsys, model, "--nvme", "1TB", "--drive", "5GB/s")
    assert found["terms"]["read"] == found["terms"]["write"] == 5e9
    assert any(plan["offload_param_device"] == "nvme" and plan["bytes"]["disk"] for plan in found["plans"])
    small = planned(capsys, model, "--nvme", "1kB")
    assert all(plan["shortages"] for plan in small["plans"] if plan["offload_optimizer_device"] == "nvme")


def test_what_flags_say_is_kept(capsys, model):
    found = planned(
        capsys, model, "--zero_stage", "3", "--offload_optimizer_device", "cpu", "--activation_checkpointing", "all"
    )
    assert found["plans"]
    for plan in found["plans"]:
        assert (plan["zero_stage"], plan["offload_optimizer_device"], plan["recompute"]) == (3, "cpu", True)
    eager = planned(capsys, model, "--dynamo_backend", "no", "--gpu_memory_budget", "none")
    assert not any(plan["compile"] or plan["budget_keeps"] for plan in eager["plans"])
    slow, quick = (planned(capsys, model, "--zero_stage", "2", "--link", rate) for rate in ("1GB/s", "50GB/s"))
    assert slow["plans"][-1]["step_s"] > quick["plans"][-1]["step_s"]
    cut = planned(capsys, model, "--gpu_memory_budget", "1kB")
    assert all(any("GPU" in text for text in plan["shortages"]) for plan in cut["plans"])


def test_the_fastest_plan_is_written_as_settings(capsys, model, tmp_path):
    path = tmp_path / "run.yaml"
    given = [
        "--zero_stage",
        "3",
        "--offload_param_device",
        "nvme",
        "--offload_optimizer_device",
        "nvme",
        "--nvme",
        "1TB",
    ]
    given += ["--offload_param_nvme_path", "/d", "--offload_optimizer_nvme_path", "/d", "--gradient_clipping", "1.0"]
    assert run(["plan", model, *MACHINE, *SHORT, *given, "--write", str(path)]) == 0
    assert f"--config_file {path}" in capsys.readouterr().out
    config = resolve({}, str(path)).config
    zero = config.zero
    assert (zero.zero_stage, zero.offload_param_device, zero.offload_param_nvme_path) == (3, "nvme", "/d")
    assert (zero.gradient_clipping, config.num_processes, config.mixed_precision) == (1.0, 2, "bf16")
    best = planned(capsys, model, *given)["plans"][0]
    assert (config.compiling is not None, config.engine.activation_checkpointing == "all") == (
        best["compile"],
        best["recompute"],
    )


def test_nothing_is_written_where_nothing_fits(capsys, model, tmp_path):
    path = tmp_path / "run.yaml"
    assert run(["plan", model, *SHORT, "--gpus", "2", "--gpu_memory", "1GB", "--write", str(path)]) == 2
    assert "no plan fits" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("more", [["--lora_r", "4"], ["--lora_r", "4", "--quantize", "4bit"], ["--optimizer", "Muon"]])
def test_adapters_codes_and_other_optimizers_are_planned(capsys, model, more):
    assert all(plan["step_s"] > 0 for plan in planned(capsys, model, *more)["plans"])


def test_machines_are_joined_by_the_network(capsys, model):
    several = ["--num_machines", "4", "--main_process_ip", "a", "--main_process_port", "1", "--zero_stage", "3"]
    slow, quick = (planned(capsys, model, *several, "--network", rate) for rate in ("1MB/s", "40GB/s"))
    assert slow["num_processes"] == 8
    assert slow["plans"][0]["step_s"] > quick["plans"][0]["step_s"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["./mdoel", *MACHINE], "./mdoel: there is no such file or directory"),
        (["MODEL"], "this machine has no GPU"),
        ([], "MODEL is missing"),
        (["MODEL", "--gpus", "8"], "--gpu NAME"),
        (["MODEL", "--gpus", "0", "--gpu", "H100"], "whole number"),
        (["MODEL", "--gpu", "H1000"], "is not known; known are"),
        (["MODEL", "--gpu_memory", "large"], "is not a size"),
        (["MODEL", *MACHINE, "--link", "25GB"], "is not a rate such as 25GB/s"),
        (["MODEL", *MACHINE, "--tokens", "many"], "is not a number of tokens"),
        (["MODEL", *MACHINE, "--sequence_length", "0"], "whole number"),
        (["MODEL", *MACHINE, "--use_cpu"], "shardwise estimate"),
        (["MODEL", *MACHINE, "--optimizer", "Adamm"], "Adamm"),
        (["--measure"], "nothing to measure"),
        (["--measure", *MACHINE], "measures this machine"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, model, arguments, told):
    assert run(["plan", *(model if word == "MODEL" else word for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_measured_terms_are_taken_on_this_machine(capsys, model, monkeypatch, tmp_path):
    for name, found in (("visible_gpus", 2), ("gpu_names", ["GPU 0: NVIDIA H200"]), ("gpu_memory_bytes", 141 << 30)):
        for module in ("plan", "plan_machine"):
            monkeypatch.setattr(f"shardwise.cli.{module}.{name}", lambda *_, found=found: found, raising=False)
    monkeypatch.setattr("shardwise.estimate.measuring.measured", lambda gpus, folder: {"matrix": 1e12, "up": 3e9})
    assert run(["plan", model, *SHORT, "--json", "--measure"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert (found["terms"]["matrix"], found["terms"]["up"]) == (1e12, 3e9)
    assert "2 terms measured on this machine" in found["notes"]
    assert planned(capsys, model)["terms"]["matrix"] != 1e12  # of a machine that is described


@pytest.mark.parametrize(("text", "count"), [("1B", 1e9), ("2.5M", 2.5e6), ("300", 300), ("1t", 1e12)])
def test_tokens_have_the_fields_letters(text, count):
    assert tokens_of(text) == count
    with pytest.raises(ConfigError):
        tokens_of("0B")
