"""The files' promises: each mistake has its line, what is written is read back, and accelerate reads it too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.check import checked
from shardwise.config.deepspeed_json import read_deepspeed_json
from shardwise.config.resolve import resolve
from shardwise.config.schema import Config
from shardwise.config.yaml_file import default_file, read_yaml, to_file_values, to_yaml, write_yaml
from shardwise.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY.parent / "shared" / "guide" / "ds_zero3_cpu.yaml"


def save(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def failure(path: str, flags: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve(flags or {}, path)
    return str(error.value).splitlines()


def test_each_mistake_has_its_line(tmp_path: Path) -> None:
    path = save(
        tmp_path / "run.yaml",
        "distributed_type: DEEPSPEED\nmixed_precision: no\nmixed_precison: bf16\ndeepspeed_config:\n"
        "  zero_stge: 2\n  zero_stage: 5\n  offload_optimizer_device: disk\nnum_processes: eight\n",
    )
    assert failure(path) == [
        f"{path}:3: mixed_precison: unknown key; did you mean mixed_precision?",
        f"{path}:5: deepspeed_config.zero_stge: unknown key; did you mean zero_stage?",
        f"{path}:6: deepspeed_config.zero_stage: 5 is not one of 0, 1, 2, 3",
        f"{path}:7: deepspeed_config.offload_optimizer_device: 'disk' is not one of none, cpu, nvme",
        f"{path}:8: num_processes: 'eight' is not a whole number",
    ]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("a: b: c\n", ":1: is not YAML: mapping values are not allowed here (column 5)"),
        ("a: [1\nb: 2\n", "is not YAML"),
        ("num_processes: 1\nnum_processes: 2\n", ":2: num_processes: occurs twice; first in line 1"),
        ("deepspeed_config:\n  zero_stage: 1\n  zero_stage: 2\n", "zero_stage: occurs twice; first in line 2"),
        ("- a\n- b\n", ":1: the file is not a mapping of keys to values"),
        ("", ": is empty"),
        ("a: !!python/object:os.system x\n", "is not YAML"),
        ("a: \x00\n", "is not YAML"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, end: str) -> None:
    path = save(tmp_path / "run.yaml", text)
    (line,) = failure(path)
    assert line.startswith(path)
    assert end in line


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert failure(str(tmp_path / "no.yaml")) == [f"{tmp_path / 'no.yaml'}: there is no such file"]
    assert failure(str(tmp_path)) == [f"{tmp_path}: is a directory, not a file"]


@pytest.mark.skipif(not GUIDE.exists(), reason="the guide's file lies beside the repository only")
def test_the_guides_file_is_taken_unchanged() -> None:
    found = resolve({}, GUIDE)
    assert found.config.zero.zero_stage == 3
    assert found.origin(("deepspeed_config", "zero_stage")) == f"{GUIDE}:9"
    assert found.notes == [], "every setting of it has its effect"


CONFIGS = [
    checked({"distributed_type": "NO"}),
    checked({"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2}),
    checked(
        {
            "distributed_type": "DEEPSPEED",
            "num_processes": 8,
            "num_machines": 2,
            "machine_rank": 1,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 29500,
            "mixed_precision": "bf16",
            "gpu_ids": "0,1,2,3",
            "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu", "gradient_accumulation_steps": 4},
        }
    ),
    checked({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "gradient_clipping": 0.5}}),
    checked({"shardwise_config": {"prefetch_units": 2, "units": ["Block"]}}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_written_is_read_back(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "deep" / "run.yaml"
    write_yaml(config, path)
    again = resolve({}, path).config
    assert to_file_values(again) == to_file_values(config)
    assert again.zero.zero_stage == config.zero.zero_stage
    assert again.engine == config.engine
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yaml"]


def test_default_engine_settings_are_not_written() -> None:
    assert "shardwise_config" not in to_yaml(Config())
    assert "shardwise_config" in to_yaml(CONFIGS[-1])


def test_accelerate_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    paths = []
    for index, config in enumerate(CONFIGS[:-1]):
        path = tmp_path / f"{index}.yaml"
        write_yaml(config, path)
        paths.append(str(path))
    code = (
        "import sys, json\nfrom accelerate.commands.config.config_args import ClusterConfig\n"
        "for path in sys.argv[1:]:\n"
        "    c = ClusterConfig.from_yaml_file(path)\n"
        "    print(json.dumps([c.distributed_type.value, c.num_processes, c.deepspeed_config.get('zero_stage')]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["NO", 1, None],
        ["MULTI_CPU", 2, None],
        ["DEEPSPEED", 8, 3],
        ["DEEPSPEED", -1, 2],
    ]


def test_the_default_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_file() == Path("/cache/huggingface/shardwise/default_config.yaml")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert default_file() == Path("/hf/shardwise/default_config.yaml")


DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu"},
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2},
    "bf16": {"enabled": False},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": 2,
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 10,
}


def test_a_deepspeed_file_means_the_same_here(tmp_path: Path) -> None:
    path = save(tmp_path / "ds.json", json.dumps(DEEPSPEED, indent="\t"))
    found = resolve({"deepspeed_config_file": path})
    config = found.config
    assert config.distributed_type == "DEEPSPEED"
    assert (config.zero.zero_stage, config.zero.offload_param_device, config.zero.gradient_clipping) == (3, "cpu", None)
    assert config.zero.zero3_save_16bit_model
    assert (config.mixed_precision, config.gradient_accumulation_steps) == ("fp16", 2)
    assert (config.engine.loss_scale.initial, config.engine.loss_scale.static) == (4096.0, None)
    assert (config.engine.train_batch_size, config.engine.micro_batch_size) == (16, None)
    assert found.origin(("deepspeed_config", "zero_stage")) == f"{path}:3: zero_optimization.stage"
    assert config.engine.loss_scale.growth_interval == 1000
    assert config.zero.zero3_init_flag
    hysteresis, clipping, note = found.notes
    assert "gradient_clipping is auto" in clipping
    assert "falls at every overflow" in hysteresis
    assert "overlap_comm" in note
    assert "steps_per_print" in note


def test_a_deepspeed_file_without_clipping_says_what_deepspeed_would_do(tmp_path: Path) -> None:
    path = save(tmp_path / "ds.json", json.dumps({"zero_optimization": {"stage": 1}}))
    assert any("clip at 1.0" in note for note in resolve({"deepspeed_config_file": path}).notes)
    assert not resolve({"deepspeed_config_file": path, "gradient_clipping": "1"}).notes


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer: {'params': {'lr': 1}} is not an object with the key type"),
        ({"scheduler": "WarmupLR"}, "scheduler: 'WarmupLR' is not an object with the key type"),
        ({"scheduler": {"type": "WarmupLR", "parms": {}}}, "is not an object with the keys type and params"),
        ({"zero_optimisation": {"stage": 3}}, "unknown key; did you mean zero_optimization?"),
        ({"zero_optimization": {"stge": 3}}, "zero_optimization.stge: unknown key; did you mean stage?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4 is not one of"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            "offload_param.device: 'disk' is not",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "not an object with the key device"),
        ({"zero_optimization": 3}, "3 is not an object"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "quantized reductions are not supported"),
        ({"zero_optimization": {"zero_quantized_weights": "yes"}}, "'yes' is not true or false"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            "frozen weights are not kept as codes; zero_quantized_weights sends them and trained ones so",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "cannot both"),
        ({"fp16": {"enabled": "yes"}}, "is not true, false or 'auto'"),
        ({"gradient_clipping": "much"}, "gradient_clipping: 'much' is not a number"),
    ],
)
def test_what_a_deepspeed_file_may_not_say(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    path = save(tmp_path / "ds.json", json.dumps(content))
    with pytest.raises(ConfigError) as error:
        resolve({"deepspeed_config_file": path})
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}:1: ")
    assert text in line


def of_json(tmp_path: Path, content: dict[str, Any], **flags: str) -> Any:
    return resolve({"deepspeed_config_file": save(tmp_path / "ds.json", json.dumps(content)), **flags})


def test_a_loss_scale_counts_in_a_run_of_fp16_alone(tmp_path: Path) -> None:
    content = {"fp16": {"enabled": "auto", "loss_scale_window": 500}, "bf16": {"enabled": "auto"}}
    assert of_json(tmp_path, content).config.engine.loss_scale.growth_interval == 2000
    assert of_json(tmp_path, content, mixed_precision="bf16").config.mixed_precision == "bf16"
    assert of_json(tmp_path, content, mixed_precision="fp16").config.engine.loss_scale.growth_interval == 500
    told = of_json(tmp_path, {"bf16": {"enabled": True, "loss_scale": 0}}).notes
    assert any("bf16.loss_scale: no effect" in note for note in told)


def test_deepspeeds_other_spellings_are_taken(tmp_path: Path) -> None:
    zero = {"stage": 3, "gather_16bit_weights_on_model_save": True, "max_live_parameters": 1e9, "cpu_offload": True}
    found = of_json(
        tmp_path, {"zero_optimization": zero, "_comment": "mine", "seq_parallel_communication_data_type": "fp32"}
    )
    assert found.config.zero.zero3_save_16bit_model
    assert found.config.zero.offload_optimizer_device == "cpu"


def test_quantised_weights_of_a_deepspeed_file_are_compressed_gathers(tmp_path: Path) -> None:
    def read(**section: Any) -> Any:
        return of_json(tmp_path, {"zero_optimization": {"stage": 3, **section}})

    assert read(zero_quantized_weights=True).config.engine.gather_dtype == "int8"
    assert read(zero_quantized_weights=False).config.engine.gather_dtype == "none"
    assert read(zero_quantized_nontrainable_weights=False).config.engine.gather_dtype == "none"
    both = read(zero_quantized_weights=True, zero_quantized_nontrainable_weights=True)
    assert both.config.engine.gather_dtype == "int8"
    assert any("frozen weights are sent as codes, as in DeepSpeed, and rest as they are" in note for note in both.notes)


def test_a_device_below_its_stage_is_a_note_in_a_file_and_an_error_as_a_flag(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    assert any("offload_param: no effect at stage 2" in note for note in of_json(tmp_path, content).notes)
    text = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n  offload_param_device: cpu\n"
    found = resolve({}, save(tmp_path / "run.yaml", text))
    assert found.config.zero.offload_param_device == "none"
    assert any("offload_param_device: cpu has no effect at zero_stage 2" in note for note in found.notes)
    assert any("would clip at 1.0" in note for note in found.notes)
    with pytest.raises(ConfigError, match="needs zero_stage 3"):
        resolve({"zero_stage": "2", "offload_param_device": "cpu"})


def test_files_for_something_else_are_told_what_does_it_here(tmp_path: Path) -> None:
    fsdp = "distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: {}\n  fsdp_offload_params: true\n"
    for strategy, words in (
        ("FULL_SHARD", "zero_stage: 3, offload"),
        ("SHARD_GRAD_OP", "zero_stage: 2"),
        ("NO_SHARD", "MULTI_GPU"),
    ):
        with pytest.raises(ConfigError, match=f"what its fsdp_config does is .*{words}"):
            resolve({}, save(tmp_path / "fsdp.yaml", fsdp.format(strategy)))
    text = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n  bf16: {enabled: true}\n"
    with pytest.raises(ConfigError, match=r"bf16: is a key of DeepSpeed's JSON"):
        resolve({}, save(tmp_path / "keys.yaml", text))
    found = resolve({}, save(tmp_path / "tpu.yaml", "downcast_bf16: true\nmixed_precision: bf16\n"))
    assert any("downcast_bf16: has no effect" in note for note in found.notes)


def test_what_a_file_says_of_others_beside_one_process_has_no_effect(tmp_path: Path) -> None:
    text = "distributed_type: 'NO'\nnum_processes: 8\nfsdp_config:\n  fsdp_sharding_strategy: 1\ntpu_name: a\ntpu_env: []\n"
    path = save(tmp_path / "single_gpu.yaml", text)
    found = resolve({}, path)
    assert found.config.distributed_type == "NO"
    assert found.config.num_processes == 1
    for name in ("num_processes: 8", "fsdp_config", "tpu_name"):
        assert any(note.startswith(f"{name}") and "has no effect beside" in note for note in found.notes), name
    assert not any("tpu_env" in note for note in found.notes)
    assert resolve({"num_processes": "4"}, path).config.num_processes == 4  # a flag is meant
    with pytest.raises(ConfigError, match="fsdp_config"):
        resolve({}, save(tmp_path / "several.yaml", text.replace("'NO'", "MULTI_GPU")))


def test_an_error_of_a_file_names_its_place_once(tmp_path: Path) -> None:
    for text in ("debug: false\ndebug: true\n", "- a\n", ""):
        path = save(tmp_path / "once.yaml", text)
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert str(caught.value).count(str(path)) == 1
        assert "is not YAML" not in str(caught.value)


def test_under_deepspeeds_name_its_sections_are_the_scripts(tmp_path: Path) -> None:
    content = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "shardwise": {"fast_lora": True}}
    path = save(tmp_path / "ds.json", json.dumps({**content, "zero_optimization": {"stage": 2}}))
    found = resolve({"deepspeed_config_file": path}, as_deepspeed=True)
    assert found.config.zero.zero_stage == 2
    assert not any("clip" in note for note in found.notes)


def test_a_deepspeed_file_is_found_beside_the_yaml_that_names_it(tmp_path: Path) -> None:
    save(tmp_path / "ds.json", json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    path = save(
        tmp_path / "run.yaml", "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    )
    assert resolve({}, path).config.zero.zero_stage == 1
    clash = save(tmp_path / "clash.yaml", Path(path).read_text() + "  zero_stage: 2\n")
    (line,) = failure(clash)
    assert line.startswith(f"{clash}:4: deepspeed_config.zero_stage: 2 contradicts 1 of {tmp_path / 'ds.json'}:1")
    assert resolve({"zero_stage": "3"}, path).config.zero.zero_stage == 3


@pytest.mark.parametrize("text", ["{", '{"a": 1,}', "[]"])
def test_broken_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = save(tmp_path / "ds.json", text)
    with pytest.raises(ConfigError) as error:
        resolve({"deepspeed_config_file": path})
    assert len(str(error.value).splitlines()) == 1
    assert "JSON" in str(error.value)


def test_the_bf16_of_deepspeed_may_be_left_to_the_launcher(tmp_path: Path) -> None:
    path = save(tmp_path / "ds.json", json.dumps({"bf16": {"enabled": "auto"}, "gradient_clipping": 0.5}))
    read = read_deepspeed_json(path)
    assert "mixed_precision" not in read.values
    found = resolve({"deepspeed_config_file": path, "mixed_precision": "bf16"})
    assert (found.config.mixed_precision, found.config.zero.gradient_clipping) == ("bf16", 0.5)


def test_lines_are_kept_for_every_level(tmp_path: Path) -> None:
    file = read_yaml(save(tmp_path / "run.yaml", "# comment\na:\n  b:\n    c: 1\nd: 2\n"))
    assert file.lines == {("a",): 2, ("a", "b"): 3, ("a", "b", "c"): 4, ("d",): 5}
