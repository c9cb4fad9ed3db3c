"""Runs public training scripts on shardwise with one word changed, on two CPU processes, beside accelerate.

    git clone https://github.com/huggingface/diffusers
    git clone https://github.com/huggingface/peft
    python tests/compat/public_scripts.py --diffusers diffusers --peft peft
    python tests/compat/public_scripts.py --diffusers diffusers text_to_image_lora --stages 3 --log /tmp/log

Each script is run three times on tiny models that are made here: as it is (accelerate: DDP), and, with the name `accelerate`
being `shardwise`, under `shardwise launch` at each stage. A script counts as equal if every loss that it gives to
`Accelerator.backward` on either rank, and every tensor of the safetensors files that it writes, is the same to 1e-5. It needs
diffusers (the checkout's own, by PYTHONPATH), torchvision and evaluate.

Around a script, on both sides: what it would read from a hub is made here (`datasets.load_dataset`, `evaluate.load`, one
model's name), the memory of a device that is none is 0, and losses are written down.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PLACE = "SHARDWISE_PUBLIC_SCRIPTS"
_STEPS = 6
_LIMIT_S = 400
_SITE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shardwise_public_scripts", {path!r})
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.stand_around()
"""


@dataclass(frozen=True)
class Script:
    """A script of a checkout.

    arguments: `{place}` is the directory of what was made, `{out}` where it may write. reference_error: with what its own run
    on DDP ends behind its training; its losses count.
    """

    checkout: str
    path: str
    arguments: str
    reference_error: str = ""


_DIFFUSION = (
    "--resolution 32 --train_batch_size 2 --max_train_steps {steps} --learning_rate 1e-3 --seed 3 --output_dir {out} "
    "--lr_warmup_steps 0"
)
SCRIPTS = {
    "text_to_image_lora": Script(
        "diffusers",
        "examples/text_to_image/train_text_to_image_lora.py",
        f"--pretrained_model_name_or_path {{place}}/diffusion --train_data_dir {{place}}/captioned --rank 4 {_DIFFUSION}",
    ),
    "dreambooth_lora": Script(
        "diffusers",
        "examples/dreambooth/train_dreambooth_lora.py",
        "--pretrained_model_name_or_path {place}/diffusion --instance_data_dir {place}/images "
        f"--instance_prompt sks --rank 4 {_DIFFUSION}",
    ),
    "unconditional_ema": Script(
        "diffusers",
        "examples/unconditional_image_generation/train_unconditional.py",
        "--train_data_dir {place}/images --model_config_name_or_path {place}/unet --resolution 32 "
        "--train_batch_size 2 --num_epochs 2 --use_ema --ddpm_num_inference_steps 2 --eval_batch_size 2 --output_dir {out} "
        "--lr_warmup_steps 0 --learning_rate 1e-3",
    ),
    "textual_inversion": Script(
        "diffusers",
        "examples/textual_inversion/textual_inversion.py",
        "--pretrained_model_name_or_path {place}/diffusion --train_data_dir {place}/images --placeholder_token <it> "
        f"--initializer_token dog --repeats 8 {_DIFFUSION}",
    ),
    "peft_causal_lm": Script(
        "peft",
        "examples/causal_language_modeling/peft_lora_clm_accelerate_ds_zero3_offload.py",
        "",
        "'DistributedDataParallel' object has no attribute 'save_pretrained'",
    ),
    "peft_sequence_classification": Script(
        "peft",
        "examples/sequence_classification/peft_no_lora_accelerate.py",
        "--model_name_or_path {place}/classifier --peft_type prompt_tuning --per_device_train_batch_size 2 "
        "--num_train_epochs 2 --per_device_eval_batch_size 2 --output_dir {out} --seed 3 "
        "--num_warmup_steps 0 --learning_rate 1e-2",
    ),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", help=", ".join(SCRIPTS))
    parser.add_argument("--diffusers", type=Path, default=None)
    parser.add_argument("--peft", type=Path, default=None)
    parser.add_argument("--stages", default="2,3")
    parser.add_argument("--log", type=Path, default=None, help="a directory for what each run printed")
    options = parser.parse_args(argv)
    different = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_inputs(place)
        for word in options.names or list(SCRIPTS):
            checkout = getattr(options, SCRIPTS[word].checkout)
            if checkout is None:
                print(f"{word:<30} needs --{SCRIPTS[word].checkout}")
                continue
            expected = _run(word, checkout, place, "accelerate", options)
            for stage in options.stages.split(","):
                found = _run(word, checkout, place, stage, options)
                verdict, equal = _compare(expected, found)
                if equal:
                    apart, count = _compare_files(place, word, stage)
                    verdict, equal = (
                        f"{verdict}; {count} tensors in files, largest difference {apart:.1e}",
                        apart <= 1e-5,
                    )
                different += not equal
                print(f"{word:<30} stage {stage}: {verdict}", flush=True)
    return int(different > 0)


def _compare(expected: list[list[float]] | str, found: list[list[float]] | str) -> tuple[str, bool]:
    if isinstance(expected, str) or isinstance(found, str):
        return f"accelerate: {expected}" if isinstance(expected, str) else str(found), False
    if [len(row) for row in expected] != [len(row) for row in found]:
        return f"{[len(r) for r in expected]} losses with accelerate, {[len(r) for r in found]} here", False
    pairs = [(a, b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)]
    largest = max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)
    return (
        f"{len(pairs)} losses from {pairs[0][0]:.5f} to {pairs[-1][0]:.5f}, largest difference {largest:.1e}",
        largest <= 1e-5,
    )


def _compare_files(place: Path, word: str, stage: str) -> tuple[float, int]:
    """The largest difference of a tensor that both runs have saved, and how many there are; infinite where one is missing."""
    from safetensors.torch import load_file

    theirs, ours = (place / "runs" / f"{word}-{how}" / "out" for how in ("accelerate", stage))
    largest, count = 0.0, 0
    for path in sorted(theirs.rglob("*.safetensors")):
        other = ours / path.relative_to(theirs)
        if not other.exists():
            return float("inf"), count
        expected, found = load_file(path), load_file(other)
        if expected.keys() != found.keys():
            return float("inf"), count
        for name, value in expected.items():
            largest = max(largest, float((value.double() - found[name].double()).abs().max()) if value.numel() else 0.0)
            count += 1
    return largest, count


def _run(word: str, checkout: Path, place: Path, how: str, options: argparse.Namespace) -> list[list[float]] | str:
    """The losses of each rank, or what went wrong."""
    script = SCRIPTS[word]
    work = place / "runs" / f"{word}-{how}"
    work.mkdir(parents=True)
    text = (checkout / script.path).read_text()
    copy = work / Path(script.path).name
    copy.write_text(text if how == "accelerate" else _beside("accelerate_suite")._renamed(text))
    if how == "accelerate":
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    else:
        launch = [
            "-c",
            "from shardwise.cli.main import main; main()",
            "launch",
            "--use_cpu",
            "--num_processes",
            "2",
            "--zero_stage",
            how,
        ]
    arguments = script.arguments.format(place=place, out=work / "out", steps=_STEPS).split()
    here = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(place / "site"), *([here] if here else [])]),
        PLACE: str(place),
        f"{PLACE}_LOSSES": str(work),
        "HF_HOME": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true" if how == "accelerate" else "",
    }
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *launch, str(copy), *arguments],
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = (error.stdout or b"").decode(errors="replace"), -1
    if options.log:
        options.log.mkdir(parents=True, exist_ok=True)
        (options.log / f"{word}-{how}.txt").write_text(said)
    if code and not (how == "accelerate" and script.reference_error and script.reference_error in said):
        lines = [line for line in said.splitlines() if "Error" in line] or said.splitlines()[-1:]
        return f"ended with {code} after {time.monotonic() - began:.0f} s: {' '.join(lines[:1])[:300]}"
    losses = [json.loads(path.read_text()) for path in sorted(work.glob("losses*.json"))]
    if options.log:
        (options.log / f"{word}-{how}.json").write_text(json.dumps(losses))
    return losses


def _beside(name: str) -> ModuleType:
    """A program of this directory as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_inputs(place: Path) -> None:
    import torch

    torch.manual_seed(0)
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(_SITE.format(path=str(Path(__file__).resolve())))
    inputs = _beside("public_inputs")
    inputs.make_images(place)
    inputs.make_language(place)
    inputs.make_diffusion(place)


# What stands around a script.


class _After:
    """Calls `then(module)` once a module of a name has been imported."""

    def __init__(self, thens: dict[str, Callable[[ModuleType], None]]) -> None:
        self._thens = thens
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in self._thens or name in self._searching:
            return None
        self._searching.add(name)
        spec = importlib.util.find_spec(name)
        self._searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if (then := self._thens.pop(name, None)) is not None:
                then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def stand_around() -> None:
    """Called in each process of a script, before it begins."""
    random.seed(0)
    place = Path(os.environ[PLACE])
    sys.meta_path.insert(
        0,
        _After(  # type: ignore[arg-type]
            {
                "accelerate.accelerator": _note_losses,
                "shardwise.front.accelerator": _note_losses,
                "datasets.load": _local_data,
                "evaluate.loading": _local_metric,
                "transformers.models.auto.auto_factory": lambda module: _local_model(module._BaseAutoModelClass, place),
                "transformers.models.auto.tokenization_auto": lambda module: _local_model(module.AutoTokenizer, place),
                "torch": lambda module: module.manual_seed(0),  # one script has no seed of its own
                "peft": _device_without_memory,
            }
        ),
    )


def _note_losses(module: ModuleType) -> None:
    backward = module.Accelerator.backward
    losses: list[float] = []
    path = Path(os.environ[f"{PLACE}_LOSSES"]) / f"losses{os.environ.get('RANK', '0')}.json"

    def noted(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        losses.append(float(loss.detach()))
        path.write_text(json.dumps(losses))
        return backward(self, loss, *args, **kwargs)

    module.Accelerator.backward = noted


def _local_data(module: ModuleType) -> None:
    load = module.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

        words = _beside("public_inputs").WORDS.split()
        if path == "glue":
            rows = {
                "sentence1": [" ".join(words[i : i + 4]) for i in range(16)],
                "sentence2": [" ".join(words[2 * i % 20 :][:3]) for i in range(16)],
                "label": [i % 2 for i in range(16)],
                "idx": list(range(16)),
            }
            return DatasetDict({"train": Dataset.from_dict(rows), "validation": Dataset.from_dict(rows)})
        if path == "parquet":
            features = Features(
                {
                    "Tweet text": Value("string"),
                    "ID": Value("int32"),
                    "Label": ClassLabel(names=["Unlabeled", "complaint", "no complaint"]),
                }
            )
            rows = {
                "Tweet text": [" ".join(words[i : i + 5]) for i in range(16)],
                "ID": list(range(16)),
                "Label": [1 + i % 2 for i in range(16)],
            }
            data = Dataset.from_dict(rows, features=features)
            return DatasetDict({"train": data, "test": data})
        return load(path, *args, **kwargs)

    module.load_dataset = load_dataset


def _local_metric(module: ModuleType) -> None:
    class Metric:
        def __init__(self) -> None:
            self._right: list[bool] = []

        def add_batch(self, predictions: Any, references: Any) -> None:
            self._right += (predictions == references).tolist()

        def compute(self) -> dict[str, float]:
            right, self._right = self._right, []
            return {"accuracy": sum(right) / len(right)}

    module.load = lambda *_, **__: Metric()


def _local_model(owner: Any, place: Path) -> None:
    load = owner.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return load(cls, str(place / "language") if name == "bigscience/bloomz-7b1" else name, *args, **kwargs)

    owner.from_pretrained = classmethod(from_pretrained)


def _device_without_memory(_: ModuleType) -> None:
    import torch

    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")
    for name in ("empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cpu, name, lambda *_: None)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    for name in ("memory_allocated", "max_memory_allocated"):
        setattr(torch.cpu, name, lambda *_: 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
