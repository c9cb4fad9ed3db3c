"""Which plan `estimate` recommends: the first that fits, in the order of what plans cost."""

from __future__ import annotations

import json

import pytest

from shardwise.cli.main import run
from shardwise.config.resolve import resolve
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import CONTEXT_NBYTES, Choice, Machine, Run, estimate
from shardwise.estimate.meta_model import build_meta_model
from shardwise.estimate.recommending import order_of, recommended
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
    best = recommended(model, run, Machine(2, found.peak(Tier.GPU) + CONTEXT_NBYTES, 1 << 50))
    assert best is not None
    order = list(order_of(run))
    assert order.index((best.choice, best.recomputes)) <= index
    assert best.found.peak(Tier.GPU) <= found.peak(Tier.GPU)
    assert recommended(model, run, Machine(2, CONTEXT_NBYTES, 1 << 50)) is None


def test_config_writes_what_estimate_recommends(capsys, monkeypatch, model_file, tmp_path):
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 2)
    path = tmp_path / "run.yaml"
    flags = ["--num_processes", "2", "--mixed_precision", "bf16"]
    for memory in (1 << 40, (3 << 29) + (150 << 20), (3 << 29) + (60 << 20)):
        monkeypatch.setattr("shardwise.cli.estimate.gpu_memory_bytes", lambda memory=memory: memory)
        assert run(["estimate", str(model_file), *flags, "--sequence_length", "256", "--json"]) == 0
        best = json.loads(capsys.readouterr().out)["recommended"]
        asked = ["--model", str(model_file), "--sequence_length", "256", "--default", "--config_file", str(path)]
        assert run(["config", *flags, *asked]) == 0
        out = capsys.readouterr().out
        if best is None:
            assert "no plan fits this machine" in out
            continue
        config = resolve({}, path).config
        assert config.zero.zero_stage == best["zero_stage"]
        assert config.zero.offload_optimizer_device == best["offload_optimizer_device"]
        assert config.zero.offload_param_device == best["offload_param_device"]
        assert config.engine.activation_checkpointing == ("auto" if best["recomputes"] else "none")
        assert f"recommends stage {best['zero_stage']}" in out


def test_a_model_that_is_not_there_is_one_line(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    assert run(["config", "--model", "./nowhere", "--default", "--config_file", str(path)]) == 2
    assert capsys.readouterr().err == "error: --model: ./nowhere: there is no such file or directory\n"
    assert not path.exists()
