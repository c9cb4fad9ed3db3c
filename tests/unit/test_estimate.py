"""The command's promises: bytes from a configuration file alone, every plan in a table, and whether it fits."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rig.tiny import tiny
from shardwise.cli.main import run
from shardwise.config.sections import EngineConfig
from shardwise.estimate.bytes import CHOICES, Choice, Machine, Run, estimate
from shardwise.estimate.meta_model import Adapters, build_meta_model, quantise
from shardwise.plan.blueprint import codes_nbytes, divide
from shardwise.plan.plan import Plan, Tier
from shardwise.plan.precision import Precision
from shardwise.plan.units import find_units
from shardwise.zero.build import BUCKET_NBYTES
from shardwise.zero.sharded import UNIT_NBYTES

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 0)


def up(value, multiple):
    return math.ceil(value / multiple) * multiple


def test_a_model_of_70b_parameters_is_estimated_without_memory(tmp_path):
    path = tmp_path / "large.json"
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    path.write_text(json.dumps({**SHAPE, **large, "num_attention_heads": 64, "num_key_value_heads": 8}))
    model = build_meta_model(str(path), adapters=Adapters(16))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    found = estimate(model, Choice(3), Run(world_size=2, precision=Precision.named("bf16")))
    weights = 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found.nbytes["frozen", Tier.GPU] == pytest.approx(weights / 2, rel=1e-3)


def test_compressed_gathers_take_the_codes_of_one_unit_more_where_a_group_lies_on_several_machines(config_file):
    model = build_meta_model(str(config_file))

    def gathered(local_processes, gather_dtype="int8", **run):
        options = EngineConfig(gather_dtype=gather_dtype)
        run = {"world_size": 4, "precision": Precision.named("bf16"), "options": options, **run}
        return estimate(model, Choice(3), Run(local_processes=local_processes, **run)).nbytes[
            "gathered units", Tier.GPU
        ]

    exact = gathered(2, "none")
    blueprints = divide(
        find_units(model, unit_nbytes=UNIT_NBYTES),
        Plan.from_stage(3),
        Precision.named("bf16"),
        bucket_nbytes=BUCKET_NBYTES,
    )
    assert gathered(2) == exact + max(codes_nbytes(blueprint.packings(4)) for blueprint in blueprints)
    assert gathered(4) == gathered(8) == exact
    assert gathered(2, shard_group=2) == gathered(2, "none", shard_group=2)
    assert gathered(3, shard_group=2) > gathered(3, "none", shard_group=2)  # one of the groups straddles


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 4), ("bf16", 2), ("int8", 1 + 4 / 256)])
def test_moments_off_the_device_rest_in_their_dtype(config_file, dtype, each):
    model = build_meta_model(str(config_file))

    def optimizer(device: str, *, cuda: bool = True) -> int:
        run = Run(world_size=2, options=EngineConfig(optimizer_state_dtype=dtype), cuda=cuda)
        found = estimate(model, Choice(2, device), run).nbytes
        return sum(nbytes for (row, _), nbytes in found.items() if row == "optimizer")

    masters = (
        sum(p.numel() for p in model.parameters()) / 2
    )  # fp32 weights, of which the masters are copies off the device
    assert optimizer("cpu") == pytest.approx(masters * (4 + 2 * each), rel=1e-3)
    assert optimizer("nvme") == optimizer("nvme", cuda=False) == optimizer("cpu")
    assert optimizer("cpu", cuda=False) == pytest.approx(masters * 12, rel=1e-3)
    assert optimizer("none") == pytest.approx(masters * 12, rel=1e-3)


def test_groups_hold_what_as_many_ranks_alone_would(capsys, config_file):
    model = build_meta_model(str(config_file))
    for stage in range(4):
        grouped = estimate(model, Choice(stage), Run(world_size=8, shard_group=2, accumulates=True))
        assert grouped == estimate(model, Choice(stage), Run(world_size=2, accumulates=True))
    mixed = estimate(model, Choice(3), Run(world_size=8, shard_group=2, all_own=True))
    pair, all_of = (estimate(model, Choice(3), Run(world_size=n)) for n in (2, 8))
    for role, like in (("parameter", pair), ("frozen", pair), ("gradient", all_of), ("optimizer", all_of)):
        assert mixed.nbytes.get((role, Tier.GPU), 0) == pytest.approx(like.nbytes.get((role, Tier.GPU), 0), rel=0.02)
    machines = [
        "--use_cpu",
        "--num_processes",
        "8",
        "--num_machines",
        "4",
        "--main_process_ip",
        "a",
        "--main_process_port",
        "1",
    ]
    assert run(["estimate", str(config_file), *machines, "--zero_stage", "3", "--shard_group", "machine"]) == 0
    assert "8 process(es), 2 on this machine, 4 copies of 2 ranks; AdamW" in capsys.readouterr().out
    hpz = ["--zero_stage", "3", "--shard_group", "machine", "--optimizer_shard_group", "world"]
    assert run(["estimate", str(config_file), *machines, *hpz]) == 0
    assert "4 copies of 2 ranks (at stage 3: weights alone; gradients and states over all)" in capsys.readouterr().out
    assert run(
        ["estimate", str(config_file), "--use_cpu", "--num_processes", "8", "--zero_stage", "3", "--shard_group", "3"]
    )
    assert "3 does not divide the 8 processes" in capsys.readouterr().err


def test_every_plan_is_in_the_table_with_what_stands_against_it(capsys, config_file):
    assert run(["estimate", str(config_file), "--use_cpu", "--num-processes", "2", "--zero-stage", "3"]) == 0
    out = capsys.readouterr().out
    for choice in CHOICES:
        assert sum(line.strip().startswith(f"{choice}  ") for line in out.splitlines()) == 1
    assert "stage 3, bytes of one rank" in out
    assert "yes" in out


def test_the_numbers_are_there_as_json_too(capsys, config_file):
    arguments = ["--zero_stage", "3", "--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"]
    arguments += ["--lora_r", "4", "--mixed_precision", "bf16", "--num_processes", "3", "--use_cpu", "--json"]
    assert run(["estimate", str(config_file), *arguments, "--sequence_length", "16", "--micro_batch_size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_processes"] == 3
    assert found["plan"]["bytes"]["frozen/cpu"] > 0
    assert found["plan"]["bytes"]["activations/gpu"] > 0
    assert found["plan"]["shortages"] == []
    assert len(found["plans"]) == len(CHOICES)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no/such/model/file.json"], "there is no such file"),
        (["."], "this directory has no config.json"),
        (["CONFIG", "--lora_r", "0"], "--lora_r: '0' is not a whole number of 1 or more"),
        (["CONFIG", "--quantize", "4bit"], "add --lora_r"),
        (["CONFIG", "--quantize", "3bit", "--lora_r", "4"], "not one of 8bit, 4bit"),
        (["CONFIG", "--lora_r", "4", "--target_modules", "no_such"], "target_modules no_such"),
        (["CONFIG", "--zero_stage", "7"], "--zero_stage: '7' is not one of"),
    ],
)
def test_a_mistake_is_an_error_line(capsys, monkeypatch, tmp_path, config_file, arguments, text):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    command = [str(config_file) if word == "CONFIG" else word for word in arguments]
    assert run(["estimate", *command, "--use_cpu"]) == 2
    assert text in capsys.readouterr().err


def test_a_file_that_is_no_configuration_is_an_error(capsys, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"no": "model"}')
    assert run(["estimate", str(path), "--use_cpu"]) == 2
    assert "not the configuration of a model" in capsys.readouterr().err


def test_quantised_weights_count_codes_and_scales():
    for bits, expected in (("8bit", 40 * 128 + 4 * 40), ("4bit", 40 * 128 // 2 + 80 + 4)):
        linear = torch.nn.Linear(128, 40, bias=False, device="meta").requires_grad_(False)
        quantise(linear, bits)
        assert sum(p.numel() * p.element_size() for p in linear.parameters()) == expected


def test_a_quantised_base_rests_in_fewer_bytes_and_its_head_stays(config_file):
    run_ = Run(world_size=2, precision=Precision.named("bf16"))
    found = {}
    for bits in (None, "8bit", "4bit"):
        model = build_meta_model(str(config_file), adapters=Adapters(4), quantize=bits)
        found[bits] = estimate(model, Choice(3), run_).nbytes["frozen", Tier.GPU]
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert found["4bit"] < found["8bit"] < found[None]


_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_FAMILIES = {
    "MistralConfig": {**_SMALL, "num_key_value_heads": 2},
    "Qwen2Config": {**_SMALL, "num_key_value_heads": 2},
    "Qwen2MoeConfig": {**_SMALL, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "GemmaConfig": {**_SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "T5Config": {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "BertConfig": _SMALL,
    "ViTConfig": _SMALL,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", _FAMILIES)
def test_every_family_has_every_plan_with_and_without_adapters(tmp_path, family):
    import transformers

    getattr(transformers, family)(**_FAMILIES[family]).save_pretrained(tmp_path)
    run_ = Run(world_size=2, precision=Precision.named("bf16"))
    whole, adapted, coded = (
        [estimate(build_meta_model(str(tmp_path), adapters=adapters, quantize=bits), c, run_) for c in CHOICES]
        for adapters, bits in ((None, None), (Adapters(4), None), (Adapters(4), "4bit"))
    )
    for full, lora, few in zip(whole, adapted, coded, strict=True):
        assert sum(lora.rest(tier) for tier in Tier) < sum(full.rest(tier) for tier in Tier)
        assert sum(few.rest(tier) for tier in Tier) < sum(lora.rest(tier) for tier in Tier)


def test_bytes_on_the_disk_are_those_that_the_cpu_would_hold():
    with torch.device("meta"):
        model = tiny("llama", "lora")
    run_ = Run(world_size=2, cuda=False)
    host, disk = (estimate(model, Choice(3, tier, tier), run_) for tier in ("cpu", "nvme"))
    for role in ("frozen", "parameter", "optimizer"):
        assert disk.nbytes[role, Tier.NVME] == host.nbytes[role, Tier.CPU]
    assert disk.nbytes["gradient", Tier.CPU] == host.nbytes["gradient", Tier.CPU]


def test_a_higher_stage_rests_in_fewer_bytes():
    with torch.device("meta"):
        model = tiny("llama", "full")
    rests = [estimate(model, Choice(stage), Run(world_size=4)).rest(Tier.GPU) for stage in range(4)]
    assert rests == sorted(rests, reverse=True)
    # Gradients rest with the optimizer that they are for, so stage 2 differs from 1 only while micro-batches add up.
    several = [estimate(model, Choice(stage), Run(world_size=4, accumulates=True)) for stage in (1, 2)]
    assert several[1].peak(Tier.GPU) < several[0].peak(Tier.GPU)


def test_a_shortage_names_the_memory_and_both_sizes():
    with torch.device("meta"):
        model = tiny("llama", "full")
    run_ = Run(world_size=2, local_processes=2)
    found = estimate(model, Choice(3, "cpu"), run_)
    assert Machine(2, 80 << 30, 64 << 30).shortages(found, run_) == []
    assert Machine(1, 80 << 30, 64 << 30).shortages(found, run_) == ["2 processes, 1 GPUs"]
    (text,) = Machine(2, 1 << 30, 64 << 30).shortages(found, run_)
    assert text.startswith("GPU: ")
    (text,) = Machine(2, 80 << 30, 1 << 30).shortages(found, run_)
    assert text.startswith("host: ")


def test_the_model_may_be_a_directory_and_an_encoder_decoder(tmp_path):
    config = tiny("bart").config
    config.save_pretrained(tmp_path)
    model = build_meta_model(str(tmp_path))
    assert type(model).__name__ == "BartForConditionalGeneration"
    found = estimate(model, Choice(2), Run(world_size=3))
    tied = sum(p.numel() for p in model.parameters())
    assert found.nbytes["parameter", Tier.GPU] >= up(4 * tied, 128)
