"""Runs accelerate's example scripts on shardwise with one word changed, on two CPU processes. A program, no test.

    git clone https://github.com/huggingface/accelerate
    python tests/compat/accelerate_examples.py accelerate                       every one of EXAMPLES, at stage 0
    python tests/compat/accelerate_examples.py accelerate nlp_example --stages 2,3 --log /tmp/log

Each example is copied, `accelerate` being `shardwise` in its names, and started by `shardwise launch`. What it would read from
a hub is made here: a BERT and a Llama of two layers with a tokenizer of words, MRPC from the few rows that the checkout has for
its own tests, pictures of noise, a small network in the place of resnet50d. `evaluate` counts accuracy and f1 by itself. The
examples of by_feature run with TESTING_MOCKED_DATALOADERS=1, as in accelerate's tests. It needs timm and torchvision for
those of pictures, schedulefree and scikit-learn (which datasets then wants cloudpickle for) for one each.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_PLACE = "SHARDWISE_EXAMPLES"
_LIMIT_S = 300
_SITE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shardwise_examples", {path!r})
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.stand_around()
"""
# Name -> its arguments. `{place}` is the directory of what was made, `{out}` where it may write.
EXAMPLES = {
    "nlp_example": "",
    "complete_nlp_example": "--checkpointing_steps epoch --output_dir {out} --with_tracking --project_dir {out}/logs",
    "cv_example": "--data_dir {place}/pets",
    "complete_cv_example": "--data_dir {place}/pets --checkpointing_steps 1 --output_dir {out} --with_tracking "
    "--project_dir {out}/logs",
    "by_feature/automatic_gradient_accumulation": "",
    "by_feature/checkpointing": "--checkpointing_steps epoch --output_dir {out}",
    "by_feature/cross_validation": "--num_folds 2",
    "by_feature/ddp_comm_hook": "--ddp_comm_hook no",
    "by_feature/deepspeed_with_config_support": "--train_file {place}/lines.txt --validation_file {place}/lines.txt "
    "--model_name_or_path {place}/language --output_dir {out} --num_train_epochs 1 --block_size 16 --seed 3 "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --checkpointing_steps epoch",
    "by_feature/early_stopping": "",
    "by_feature/gradient_accumulation": "--gradient_accumulation_steps 2",
    "by_feature/gradient_accumulation_for_autoregressive_models": "--gradient_accumulation_steps 2",
    "by_feature/local_sgd": "--gradient_accumulation_steps 2 --local_sgd_steps 2",
    "by_feature/memory": "",
    "by_feature/multi_process_metrics": "",
    "by_feature/profiler": "--record_shapes",
    "by_feature/schedule_free": "",
    "by_feature/tracking": "--with_tracking --project_dir {out}",
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("checkout", type=Path, help="a checkout of accelerate's repository")
    parser.add_argument("names", nargs="*", help=", ".join(EXAMPLES))
    parser.add_argument("--stages", default="0")
    parser.add_argument("--log", type=Path, default=None, help="a directory for what each run printed")
    options = parser.parse_args(argv)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _make_inputs(place, options.checkout)
        for word in options.names or list(EXAMPLES):
            for stage in options.stages.split(","):
                began = time.monotonic()
                problem = _run(word, stage, place, options)
                failed += bool(problem)
                verdict = f"fails: {problem}" if problem else "passes"
                print(f"{word:<60} stage {stage}  {time.monotonic() - began:>4.0f} s  {verdict}", flush=True)
    return int(failed > 0)


def _run(word: str, stage: str, place: Path, options: argparse.Namespace) -> str:
    """Why the example did not come to its end; "" if it did."""
    work = place / "runs" / f"{word.replace('/', '_')}-{stage}"
    shutil.copytree(place / "tests", work / "tests")
    copy = work / f"{word.rsplit('/', maxsplit=1)[-1]}.py"
    text = (options.checkout / "examples" / f"{word}.py").read_text()
    copy.write_text(_beside("accelerate_suite")._renamed(text))
    here = os.environ.get("PYTHONPATH")
    launch = "from shardwise.cli.main import main; main()"
    mocked = word.startswith("by_feature/") and not word.endswith("cross_validation")
    command = [sys.executable, "-c", launch, "launch", "--use_cpu", "--num_processes", "2", "--zero_stage", stage]
    try:
        done = subprocess.run(
            [*command, str(copy), *EXAMPLES[word].format(place=place, out=work / "out").split()],
            cwd=work,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(place / "site"), *([here] if here else [])]),
                _PLACE: str(place),
                "SHARDWISE_ACCELERATE_RIG": str(place / "test_utils"),
                "HF_HOME": str(work / "cache"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "TESTING_MOCKED_DATALOADERS": str(int(mocked)),
            },
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
        (options.log / f"{word.replace('/', '_')}-{stage}.txt").write_text(said)
    if code == -1:
        return f"it did not end within {_LIMIT_S} s"
    errors = [line for line in said.splitlines() if "Error" in line] or said.splitlines()[-1:]
    return "" if code == 0 else " ".join(errors[:1])[:300]


def _beside(name: str) -> ModuleType:
    """A program of this directory as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# What examples read.


def _make_inputs(place: Path, checkout: Path) -> None:
    import numpy
    import torch
    from PIL import Image

    torch.manual_seed(0)
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(_SITE.format(path=str(Path(__file__).resolve())))
    samples = checkout / "tests" / "test_samples"
    shutil.copytree(samples, place / "tests" / "test_samples")
    _beside("accelerate_suite").renamed(checkout / "src" / "accelerate" / "test_utils", place / "test_utils")
    _beside("public_inputs").make_language(place)
    lines = (samples / "MRPC" / "train.csv").read_text().splitlines()[1:]
    (place / "lines.txt").write_text("\n".join(line.replace(",", " ") for line in 4 * lines))
    draw = numpy.random.default_rng(0)
    (place / "pets").mkdir()
    for index in range(10):
        picture = Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=numpy.uint8))
        picture.save(place / "pets" / f"{('cat', 'dog')[index % 2]}_{index}.jpg")


# What stands around an example.


def stand_around() -> None:
    """Called in each process of an example, before it begins."""
    place = Path(os.environ[_PLACE])
    _beside("accelerate_suite").answer_for_the_rig()
    scripts = _beside("public_scripts")
    thens = {
        "datasets.load": lambda module: _local_data(module, place),
        "evaluate.loading": _local_metric,
        "transformers.models.auto.auto_factory": lambda module: _local(module._BaseAutoModelClass, place),
        "transformers.models.auto.tokenization_auto": lambda module: _local(module.AutoTokenizer, place),
        "timm.models._factory": _small_network,
    }
    sys.meta_path.insert(0, scripts._After(thens))


def _local(owner: Any, place: Path) -> None:
    load = owner.from_pretrained.__func__
    here = {"bert-base-cased": "classifier", "HuggingFaceTB/SmolLM-360M": "language"}

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return load(cls, str(place / here[name]) if name in here else name, *args, **kwargs)

    owner.from_pretrained = classmethod(from_pretrained)


def _local_data(module: ModuleType, place: Path) -> None:
    load = module.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if path != "nyu-mll/glue":
            return load(path, *args, **kwargs)
        from datasets import ClassLabel

        rows = place / "tests" / "test_samples" / "MRPC"
        data = load("csv", data_files={"train": str(rows / "train.csv"), "validation": str(rows / "dev.csv")})
        data["test"] = data["validation"]
        data = data.cast_column("label", ClassLabel(names=["not_equivalent", "equivalent"]))
        for split in data:
            data[split] = data[split].add_column("idx", list(range(len(data[split]))))
        return data

    module.load_dataset = load_dataset


def _local_metric(module: ModuleType) -> None:
    class Metric:
        def __init__(self) -> None:
            self._pairs: list[tuple[int, int]] = []

        def add_batch(self, predictions: Any, references: Any) -> None:
            self._pairs += list(zip(predictions.tolist(), references.tolist(), strict=True))

        def compute(self, predictions: Any = None, references: Any = None) -> dict[str, float]:
            if predictions is not None:
                self.add_batch(predictions, references)
            pairs, self._pairs = self._pairs, []
            hits = sum(p == r == 1 for p, r in pairs)
            said = sum(p + r for p, r in pairs)
            return {"accuracy": sum(p == r for p, r in pairs) / len(pairs), "f1": 2 * hits / max(said, 1)}

    module.load = lambda *_, **__: Metric()


def _small_network(module: ModuleType) -> None:
    create = module.create_model
    module.create_model = lambda _, **words: create("resnet10t", **{**words, "pretrained": False})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
