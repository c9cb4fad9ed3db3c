"""Precedence: flag, YAML, default; and every value knows where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.config.machine import visible_gpus
from shardwise.config.resolve import resolve
from shardwise.errors import ConfigError

YAML = """\
distributed_type: DEEPSPEED
mixed_precision: bf16
rdzv_backend: c10d
num_processes: 4
deepspeed_config:
  zero_stage: 2
  gradient_accumulation_steps: 4
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


def test_a_flag_wins_over_yaml_and_yaml_over_the_default(file: str) -> None:
    found = resolve({"zero_stage": "3", "num_processes": "2"}, file)
    config = found.config
    assert (config.zero.zero_stage, config.num_processes) == (3, 2)
    assert (config.rdzv_backend, config.mixed_precision, config.gradient_accumulation_steps) == ("c10d", "bf16", 4)
    assert found.origin(("deepspeed_config", "zero_stage")) == "--zero_stage"
    assert found.origin(("rdzv_backend",)) == f"{file}:3"
    assert found.origin(("machine_rank",)) == "default"


def test_accumulation_can_be_left_to_the_script(file: str) -> None:
    assert resolve({"gradient_accumulation_steps": "auto"}, file).config.zero.gradient_accumulation_steps is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("NO", 0, False)),
        ({"zero_stage": "3"}, ("DEEPSPEED", 3, False)),
        ({"zero_stage": "1", "offload_optimizer_device": "cpu"}, ("DEEPSPEED", 1, False)),
        ({"gradient_accumulation_steps": "4"}, ("NO", 0, False)),
        ({"gradient_clipping": "1.0", "num_processes": "2"}, ("MULTI_GPU", 0, False)),
        ({"num_processes": "2", "use_cpu": True}, ("MULTI_CPU", 0, True)),
        ({"distributed_type": "MULTI_CPU", "num_processes": "2"}, ("MULTI_CPU", 0, True)),
        ({"distributed_type": "MULTI_GPU", "use_cpu": True}, ("MULTI_CPU", 0, True)),
    ],
)
def test_flags_alone_make_a_run(flags: dict[str, Any], expected: tuple[str, int, bool]) -> None:
    config = resolve(flags).config
    assert (config.distributed_type, config.zero.zero_stage, config.use_cpu) == expected


def test_use_deepspeed_alone_is_the_schemas_default_stage() -> None:
    assert resolve({}, use_zero=True).config.zero.zero_stage == 2


def test_a_zero_flag_turns_a_plain_file_into_a_zero_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n", encoding="utf-8")
    found = resolve({"zero_stage": "3"}, path)
    assert found.config.distributed_type == "DEEPSPEED"
    assert found.origin(("distributed_type",)) == "because --zero_stage was given"


def test_a_wrong_flag_is_named_as_typed(file: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"zero_stage": "5", "num_processes": "x", "offload_param_device": "cpu"}, file)
    assert str(error.value).splitlines() == [
        "--zero_stage: '5' is not one of 0, 1, 2, 3",
        "--num_processes: 'x' is not a whole number",
    ]


def test_a_flag_that_the_file_contradicts_is_an_error(file: str) -> None:
    with pytest.raises(ConfigError, match="--offload_param_device: cpu needs zero_stage 3"):
        resolve({"offload_param_device": "cpu"}, file)


def test_legacy_fp16_gives_way_to_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("distributed_type: NO\nfp16: true\n", encoding="utf-8")
    assert resolve({}, path).config.mixed_precision == "fp16"
    assert resolve({"mixed_precision": "bf16"}, path).config.mixed_precision == "bf16"


def test_the_type_follows_from_the_zero_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("deepspeed_config:\n  zero_stage: 3\n", encoding="utf-8")
    assert resolve({}, path).config.distributed_type == "DEEPSPEED"


@pytest.mark.parametrize(
    ("present", "variable", "gpu_ids", "expected"),
    [
        (0, "0,1", None, 0),
        (4, None, None, 4),
        (4, "0,2", None, 2),
        (4, "", None, 0),
        (4, "-1", None, 0),
        (4, "0,9,1", None, 1),
        (4, "GPU-aa,GPU-bb", None, 2),
        (4, "0", "1,2,3", 3),
        (4, "0", "all", 1),
        (None, None, None, None),
        (None, "0,1", None, 2),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(
    monkeypatch: pytest.MonkeyPatch,
    present: int | None,
    variable: str | None,
    gpu_ids: str | None,
    expected: int | None,
) -> None:
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: present)
    environ = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert visible_gpus(gpu_ids, environ) == expected
