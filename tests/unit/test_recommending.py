"""Which plan `plan`, `estimate` and `config` recommend: the fastest that fits, or the first in the order of what plans cost."""

from __future__ import annotations

import json

import pytest

from shardwise.cli.main import run
from shardwise.cli.questions import OF_THE_PLAN
from shardwise.config.resolve import resolve
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import CONTEXT_NBYTES, Choice, Machine, Run, estimate
from shardwise.estimate.meta_model import build_meta_model
from shardwise.estimate.recommending import first_that_fits, order_of
from shardwise.plan.plan import Tier
from shardwise.plan.precision import Precision

SHAPE = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 512},
    **{"intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return path


@pytest.fixture(scope="module")
def model(model_file):
    return build_meta_model(str(model_file))


def test_plans_are_tried_from_the_nearest_place_outwards():
    plain = list(order_of(Run()))
    assert plain[:3] == [(Choice(2), False), (Choice(3), False), (Choice(2, "cpu"), False)]
    assert plain[-1] == (Choice(3, "nvme", "nvme"), False)
    assert next(order_of(Run(accumulates=True))) == (Choice(1), False)
    both = list(order_of(Run(batch=Batch(1, 8))))
    assert both[:4] == [(Choice(2), False), (Choice(3), False), (Choice(2), True), (Choice(3), True)]
    always = list(order_of(Run(batch=Batch(1, 8, checkpointing=True))))
    assert {recomputes for _, recomputes in always} == {True}
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 5])
def test_the_first_that_fits_is_taken_as_memory_shrinks(model, index):
    run = Run(world_size=2, local_processes=2, precision=Precision.named("bf16"), batch=Batch(4, 1024))
    choice, recomputes = list(order_of(run))[index]
    found = estimate(model, choice, Run(**{**vars(run), "batch": Batch(4, 1024, recomputes)}))
    best = first_that_fits(model, run, Machine(2, found.peak(Tier.GPU) + CONTEXT_NBYTES, 1 << 50))
    assert best is not None
    order = list(order_of(run))
    assert order.index((best.choice, best.way.recompute)) <= index
    assert best.estimate.peak(Tier.GPU) <= found.peak(Tier.GPU)
    assert first_that_fits(model, run, Machine(2, CONTEXT_NBYTES, 1 << 50)) is None


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100 80GB HBM3"], ids=["by_order", "by_time"])
def test_config_writes_what_estimate_recommends(capsys, monkeypatch, model_file, tmp_path, gpu):
    """And what `plan` finds the fastest, where it knows the GPU."""
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 2)
    path, planned = tmp_path / "run.yaml", tmp_path / "planned.yaml"
    flags = ["--num_processes", "2", "--mixed_precision", "bf16"]
    found = []
    for memory in (1 << 40, 1850 << 20, 1600 << 20):
        for module in ("model_run", "plan_machine"):
            monkeypatch.setattr(f"shardwise.cli.{module}.gpu_memory_bytes", lambda memory=memory: memory)
        monkeypatch.setattr("shardwise.cli.plan_machine.gpu_names", lambda: [gpu, gpu] if gpu else [])
        assert run(["estimate", str(model_file), *flags, "--sequence_length", "256", "--json"]) == 0
        best = json.loads(capsys.readouterr().out)["recommended"]
        asked = ["--model", str(model_file), "--sequence_length", "256", "--default", "--config_file", str(path)]
        assert run(["config", *flags, *asked]) == 0
        out = capsys.readouterr().out
        if best is None:
            assert "no plan fits this machine" in out
            continue
        config = resolve({}, path).config
        found.append(config.zero)
        assert config.zero.zero_stage == best["zero_stage"]
        assert config.zero.offload_optimizer_device == best["offload_optimizer_device"]
        assert config.zero.offload_param_device == best["offload_param_device"]
        assert (config.engine.activation_checkpointing != "none") == best["recomputes"]
        assert (config.compiling is not None) == best["compiles"]
        assert f"stage {best['zero_stage']}" in out
        assert (best["step_s"] is None) == (gpu is None)
        if gpu is None:
            continue
        where = ["--sequence_length", "256", "--nvme", "1TB", "--write", str(planned)]
        assert run(["plan", str(model_file), *flags, *where]) == 0
        capsys.readouterr()
        of_plan = resolve({}, planned).config
        for name in OF_THE_PLAN:
            values = [
                getattr(getattr(one, section), name, None)
                for one in (config, of_plan)
                for section in ("zero", "engine")
            ]
            assert values[:2] == values[2:], name
        assert of_plan.dynamo_backend == config.dynamo_backend
    assert len(found) == 2


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100 80GB HBM3"], ids=["by_order", "by_time"])
def test_a_budget_of_bytes_bounds_every_recommendation(capsys, monkeypatch, model_file, gpu):
    """As a GPU of that size does, for `estimate` as for `plan`."""
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 2)
    monkeypatch.setattr("shardwise.cli.plan_machine.gpu_names", lambda: [gpu, gpu] if gpu else [])
    flags = ["--num_processes", "2", "--mixed_precision", "bf16", "--sequence_length", "256", "--json"]

    def found(memory: int | None, *more: str) -> tuple[dict, list]:
        for module in ("model_run", "plan_machine"):
            monkeypatch.setattr(f"shardwise.cli.{module}.gpu_memory_bytes", lambda: memory)
        assert run(["estimate", str(model_file), *flags, *more]) == 0
        facts = json.loads(capsys.readouterr().out)
        return facts["recommended"], [plan["shortages"] for plan in facts["plans"]]

    whole = found(1 << 40)
    small = found(1600 << 20)
    assert small != whole
    assert found(1 << 40, "--gpu_memory_budget", "1600MiB") == small
    if gpu is None:
        assert found(None, "--gpu_memory_budget", "1600MiB") == small


def test_a_model_that_is_not_there_is_one_line(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    assert run(["config", "--model", "./nowhere", "--default", "--config_file", str(path)]) == 2
    assert capsys.readouterr().err == "error: --model: ./nowhere: there is no such file or directory\n"
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_r", "0"], "--lora_r: '0' is not"),
        (["--quantize", "3bit"], "--quantize: '3bit' is not"),
        (["--quantize", ""], "--quantize: '' is not"),
        (["--sequence_length", "-1"], "--sequence_length: '-1' is not"),
    ],
)
def test_a_wrong_flag_of_the_model_is_refused_and_nothing_is_written(capsys, model_file, tmp_path, flags, words):
    path = tmp_path / "run.yaml"
    assert run(["config", "--model", str(model_file), *flags, "--default", "--config_file", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target_modules", "q_proj"], "--target_modules: has no effect without --lora_r"),
        (["--modules_to_save", "lm_head"], "--modules_to_save: has no effect without --lora_r"),
        (["--lora_r", "4", "--modules_to_save", "nowhere"], "modules_to_save nowhere: the model has no module"),
    ],
)
def test_what_adapters_would_not_heed_is_refused(capsys, model_file, flags, words):
    assert run(["estimate", str(model_file), *flags]) == 2
    assert words in capsys.readouterr().err
