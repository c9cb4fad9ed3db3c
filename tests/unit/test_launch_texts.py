"""What `shardwise launch` says, word for word: of settings that it takes (`--dry_run`), and of those that it refuses.

    python -m pytest tests/unit/test_launch_texts.py --write-data

writes tests/data/launch_texts.json anew. A machine of 64 cores and, where a case says so, GPUs is played; the test's folder
is DIR, this Python PYTHON. Of what is taken, the first case has the whole text, and others how theirs differs from it.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rig.guide import GUIDE
from shardwise.cli.main import run

DATA = Path(__file__).resolve().parents[1] / "data" / "launch_texts.json"
FILES = {
    "train.py": "raise SystemExit(0)\n",
    "guide.yaml": GUIDE.replace("num_processes: 1", "num_processes: 2")
    .replace("use_cpu: false", "use_cpu: true")
    .replace("rdzv_backend: static\nsame_network: true\n", ""),
    "engine.yaml": """\
distributed_type: DEEPSPEED
use_cpu: true
num_processes: 2
mixed_precision: fp16
deepspeed_config: {zero_stage: 3, offload_param_device: nvme, offload_param_nvme_path: drive}
shardwise_config:
  reduce_dtype: bf16
  prefetch_units: 2
  gather_with: nccl
  units: [Block, Layer]
  gpu_memory_budget: 24GB
  generation_memory_budget: none
  collective_timeout_s: 60
  loss_chunk_tokens: 512
  fast_lora: true
  activation_checkpointing: auto
  loss_scale: {initial: 1024, growth_interval: 10}
""",
    "accelerate.yaml": "distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\ngpu_ids: 0,1\n",
    "zero.json": """\
{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
 "bf16": {"enabled": true}, "gradient_clipping": 0.5, "gradient_accumulation_steps": 4,
 "train_micro_batch_size_per_gpu": 2}
""",
    "odd.json": '{"zero_optimization": {"stage": 3, "stge": 1}, "fp16": {"enabled": true}, "bf16": {"enabled": true}}\n',
    "broken.json": '{"zero_optimization": \n',
    "broken.yaml": "num_processes: [2\n",
    "list.yaml": "- 1\n- 2\n",
    "unknown.yaml": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stge: 3\nnum_process: 2\n",
    "fsdp.yaml": "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\ntpu_name: v4\n",
    "twice.yaml": "use_cpu: true\nuse_cpu: false\n",
    "kinds.yaml": "use_cpu: maybe\nnum_processes: eight\nmixed_precision: fp8\ndeepspeed_config: 3\n",
}
CPU = "--use_cpu"
TWO = "--use_cpu --num_processes 2"
MACHINES = "--num_machines 2 --num_processes 4 --main_process_ip 10.0.0.7 --main_process_port 29500"
# The number of GPUs, and the command; the script follows.
TAKEN: tuple[tuple[int, str], ...] = (
    (0, CPU),
    (0, TWO),
    *((0, f"{TWO} --zero_stage {stage}") for stage in range(4)),
    (0, f"{TWO} --zero_stage 2 --offload_optimizer_device cpu"),
    (0, f"{TWO} --zero_stage 3 --offload_optimizer_device cpu --offload_param_device cpu"),
    (
        0,
        f"{TWO} --zero_stage 3 --offload_optimizer_device nvme --offload_param_device nvme "
        "--offload_optimizer_nvme_path a --offload_param_nvme_path b",
    ),
    (0, f"{TWO} --zero_stage 3 --mixed_precision bf16 --reduce_dtype bf16 --prefetch_units 0"),
    (0, f"{TWO} --zero_stage 2 --mixed_precision fp16"),
    (0, f"{TWO} --use_deepspeed --gradient_accumulation_steps 4 --gradient_clipping 0.5"),
    (0, f"{TWO} --zero_stage 3 --gpu_memory_budget auto --generation_memory_budget 8GiB"),
    (0, f"{TWO} --zero_stage 3 --zero3_init_flag true --units Block,Layer --whole_adapters true"),
    (0, f"{TWO} --zero_stage 2 --zero3_init_flag true"),
    (0, f"{TWO} --zero_stage 3 --shard_group Machine"),
    (0, f"{TWO} --zero_stage 0 --shard_group 2"),
    (0, f"{TWO} --zero_stage 3 --dynamo_backend inductor"),
    (0, f"{TWO} --zero_stage 3 --max_restarts 2 --restart_processes 1"),
    (0, f"{CPU} --zero_stage 3 --num_processes 3 --threads_per_rank 5"),
    (0, f"{TWO} --as_deepspeed"),
    (0, f"{TWO} --debug --enable_cpu_affinity"),
    (0, f"{TWO} --deepspeed_config_file zero.json"),
    (0, "--config_file guide.yaml"),
    (0, "--config_file guide.yaml --zero_stage 2 --offload_param_device none --num_processes 1"),
    (0, "--config_file engine.yaml"),
    (0, f"{CPU} -m json.tool"),
    (0, f"{CPU} {MACHINES} --machine_rank 1 --zero_stage 3"),
    (0, f"{CPU} --multi_gpu"),
    (0, f"{TWO} --distributed_type NO"),
    (0, f"{CPU} --zero_stage 3 --deepspeed_config_file zero.json --mixed_precision fp16"),
    (2, ""),
    (4, "--zero_stage 3 --num_processes 2 --gather_with copy_engine"),
    (4, "--multi_gpu --gpu_ids 1,3"),
    (2, "--config_file accelerate.yaml"),
    (2, f"{MACHINES} --machine_rank 1 --zero_stage 3 --rdzv_backend c10d --same_network"),
)
REFUSED: tuple[tuple[int, str], ...] = (
    (0, ""),
    (0, f"{CPU} --zero_stage 5"),
    (0, f"{CPU} --zero_stage two"),
    (0, f"{CPU} --zero_stage 2 --num_processes 4 --shard_group 3"),
    (0, f"{CPU} --zero_stage 2 --shard_group node"),
    (0, f"{CPU} --num_proceses 2"),
    (0, f"{CPU} --zero_stage 2 --offload_param_device cpu"),
    (0, f"{CPU} --zero_stage 0 --offload_optimizer_device cpu"),
    (0, f"{CPU} --zero_stage 2 --offload_optimizer_device nvme"),
    (0, f"{CPU} --zero_stage 3 --offload_param_device gpu"),
    (0, f"{CPU} --mixed_precision fp8"),
    (0, f"{CPU} --mixed_precision bf17 --reduce_dtype fp64"),
    (0, f"{CPU} --gradient_clipping -1 --gradient_accumulation_steps 0"),
    (0, "--multi_gpu --use_deepspeed"),
    (0, f"{CPU} --distributed_type FSDP"),
    (0, f"{CPU} --gpu_ids 0"),
    (0, f"{CPU} --max_restarts -1"),
    (0, f"{CPU} --restart_processes 3"),
    (0, f"{CPU} --machine_rank 1"),
    (0, f"{CPU} --num_machines 2 --num_processes 3"),
    (0, f"{CPU} --main_process_port 70000"),
    (0, f"{CPU} --prefetch_units -1 --gpu_memory_budget much"),
    (0, f"{CPU} --gather_with copy --activation_checkpointing some"),
    (0, f"{CPU} --deepspeed_config_file odd.json"),
    (0, f"{CPU} --deepspeed_config_file broken.json"),
    (0, f"{CPU} --deepspeed_config_file absent.json"),
    *((0, f"--config_file {name}.yaml") for name in ("absent", "broken", "list", "unknown", "fsdp", "twice", "kinds")),
    (0, f"{CPU} -m no_such_module"),
    (2, "--num_processes 8"),
    (2, "--gpu_ids 0,0"),
    (0, f"{CPU} --no_such_flag"),
)
CASES = [*(("taken", *case) for case in TAKEN), *(("refused", *case) for case in REFUSED)]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with FILES, 64 cores, and nothing of this machine's environment that a launcher reads."""
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "SHARDWISE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("shardwise.config.drives.not_nvme", lambda path: None)
    monkeypatch.setattr("shardwise.cli.launch_plan.interface_towards", lambda address: "eth0")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "drive").mkdir()


@pytest.mark.parametrize(
    ("kind", "gpus", "command"), CASES, ids=[f"{kind}-{gpus}-{what}" for kind, gpus, what in CASES]
)
def test_launch_says_what_it_said(capsys, monkeypatch, request, tmp_path, kind, gpus, command):
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: gpus)
    monkeypatch.setattr("shardwise.cli.launch_plan.visible_gpus", lambda ids: gpus)
    code, out, err = said(capsys, tmp_path, command)
    if kind == "taken" and (gpus, command) != TAKEN[0]:
        whole = said(capsys, tmp_path, TAKEN[0][1])[1]
        out = [
            line for line in difflib.unified_diff(whole, out, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
        ]
    found = {"code": code, "out": out, "err": err}
    key = f"{kind}, {gpus} GPUs: {command}"
    data = read()
    if request.config.getoption("--write-data"):
        data[key] = found
        ordered = {name: data[name] for name in (f"{k}, {g} GPUs: {c}" for k, g, c in CASES) if name in data}
        DATA.write_text(json.dumps(ordered, indent=1) + "\n")
    assert code == (0 if kind == "taken" else 2), err
    assert found == data[key]


def test_every_text_has_a_case():
    assert list(read()) == [f"{kind}, {gpus} GPUs: {command}" for kind, gpus, command in CASES]


def read() -> dict[str, Any]:
    return json.loads(DATA.read_text()) if DATA.exists() else {}


def said(capsys: pytest.CaptureFixture[str], folder: Path, command: str) -> tuple[int, list[str], list[str]]:
    """The exit code, and the lines of both outputs without what depends on this machine.

    A column that a path had made wide is two spaces wide.
    """
    script = [] if " -m " in command else ["train.py", "--lr", "1e-3"]
    code = run(["launch", "--dry_run", *command.split(), *script])
    texts = (text.replace(str(folder), "DIR").replace(sys.executable, "PYTHON") for text in capsys.readouterr())
    out, err = ([re.sub(r"(?<=\S) {2,}", "  ", line) for line in text.splitlines()] for text in texts)
    return code, out, err
