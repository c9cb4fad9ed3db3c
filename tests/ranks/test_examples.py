"""The examples: what a user runs first must work, with every PEFT method, and leave a whole adapter.

Runs under `shardwise launch` are processes of their own, with a time limit each. Methods and flags are tried in this
process, as a run of one rank, because importing transformers and peft takes longer than a tiny epoch.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rig.fresh import Ran, run_script, torchrun

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIG = EXAMPLES / "zero3_offload_cpu.yaml"
LAUNCH = [sys.executable, "-c", "from shardwise.cli.main import main; main()", "launch"]
TINY = ["--num-epochs", "1", "--max-train-samples", "8", "--max-new-tokens", "4"]

pytestmark = [
    pytest.mark.usefixtures("examples"),
    pytest.mark.timeout(180),
    # transformers and peft call functions of their own that they deprecate; a run prints that and goes on.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


def environment() -> dict[str, str]:
    """This process's environment without a launcher's variables; offline, and one thread a process."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def launch(script: str, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example under `shardwise launch`, with ZeRO-3 and CPU offload, on so many CPU processes."""
    command = [*LAUNCH, "--config_file", str(CONFIG), "--use_cpu", "--num_processes", str(processes)]
    return subprocess.run(
        [*command, str(EXAMPLES / script), *arguments],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=150,
        check=False,
    )


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the scripts importable as when they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # What `shardwise launch` hands to its processes: the same ZeRO-3 with CPU offload, on the CPU.
    settings = yaml.safe_load(CONFIG.read_text())
    kept = ("deepspeed_config", "distributed_type", "mixed_precision")
    monkeypatch.setenv("SHARDWISE_CONFIG", json.dumps({**{key: settings[key] for key in kept}, "use_cpu": True}))


def run_here(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run an example in this process, a run of one rank."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def check_adapter(directory: Path, logits: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of check_adapter.py."""
    monkeypatch.setattr(sys, "argv", ["check_adapter.py", str(directory), str(logits)])
    module: ModuleType = importlib.import_module("check_adapter")
    return int(module.main())


def fork(script: str, processes: int, *arguments: str) -> Ran:
    """As `launch`, in ranks that are forked with their imports; they read the configuration from the environment."""
    return run_script(
        EXAMPLES / script, arguments, torchrun(processes, SHARDWISE_CONFIG=os.environ["SHARDWISE_CONFIG"])
    )


@pytest.mark.parametrize("script", ["causal_lm", "conditional_generation", "sft"])
def test_help_of_an_example_says_each_default_once(
    script: str, examples: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if script == "sft":
        parse = importlib.import_module("common.sft_arguments").parse_arguments
        options: dict[str, Any] = {}
    else:
        parse = importlib.import_module("common.arguments").parse_arguments
        options = {"name": script, "base_model": "seq2seq", "num_epochs": 1}
    with pytest.raises(SystemExit):
        parse("", argv=["--help"], **options)
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: " in shown
    for nothing in ("None", "False", "[]"):
        assert f"(default: {nothing})" not in shown


@pytest.mark.parametrize(
    ("script", "processes", "start"),
    [("conditional_generation.py", 2, launch), ("conditional_generation.py", 1, fork), ("causal_lm.py", 2, fork)],
)
def test_a_launched_example_prints_the_guides_lines_and_saves_a_whole_adapter(
    script: str,
    processes: int,
    start: Callable[..., Ran | subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = tmp_path / "logits.safetensors"
    # 13 messages in batches of 4 over 2 processes: the last batch is padded, which no metric may count.
    run = start(
        script,
        processes,
        "--num-epochs",
        "2",
        "--max-train-samples",
        "13",
        "--batch-size",
        "4",
        "--do-test",
        "--output-dir",
        str(tmp_path / "out"),
        "--save-logits",
        str(logits),
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for part in ("train", "eval"):
        for kind in ("GPU", "CPU"):
            assert len(re.findall(rf"^{kind} Memory before entering the {part} : \d+", run.stdout, re.M)) == 2
            assert len(re.findall(rf"^{kind} Total Peak Memory .* the {part} \(max\): \d+", run.stdout, re.M)) == 2
    assert re.search(r"^epoch=1: train_ppl=tensor\([\d.]+\) train_epoch_loss=tensor\([\d.]+\)$", run.stdout, re.M)
    assert len(re.findall(r"^accuracy=[\d.]+$", run.stdout, re.M)) == 2
    assert len(re.findall(r"^eval_preds\[:10\]=\[", run.stdout, re.M)) == 2
    assert "dataset['train'][label_column][:10]=['complaint', 'no complaint'" in run.stdout
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert {row["Label"] for row in rows} <= {"complaint", "no complaint"}
    assert check_adapter(tmp_path / "out", logits, monkeypatch) == 0


METHODS = [
    "--peft dora --lora-r 4 --lora-alpha 8 --lora-dropout 0.0",
    "--peft lora --lora-target-modules q_proj v_proj --modules-to-save fc2 down_proj --gradient-checkpointing",
    "--peft loha",
    "--peft lokr",
    "--peft ia3",
    "--peft prefix --num-virtual-tokens 4",
    "--peft prompt",
    "--peft p-tuning",
    "--peft none --gradient-checkpointing --gradient-accumulation-steps 2 --batch-size 2",
]
# Every method on one script, and what differs most on the other; `make test-full` runs all.
SHORT = {*METHODS[1:2], *METHODS[5:7], METHODS[8]}


@pytest.mark.parametrize(
    ("script", "flags"),
    [("conditional_generation.py", flags) for flags in METHODS]
    + [pytest.param("causal_lm.py", flags, marks=[] if flags in SHORT else pytest.mark.full) for flags in METHODS],
)
def test_every_peft_method_trains_and_loads_in_stock_peft(
    script: str,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logits = tmp_path / "logits.safetensors"
    run_here(script, monkeypatch, *TINY, *flags.split(), "--output-dir", str(tmp_path), "--save-logits", str(logits))
    assert "accuracy=" in capsys.readouterr().out
    assert check_adapter(tmp_path, logits, monkeypatch) == 0


@pytest.mark.parametrize("script", ["conditional_generation.py", pytest.param("causal_lm.py", marks=pytest.mark.full)])
def test_a_resumed_example_ends_with_the_adapter_of_the_straight_run(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num-epochs", "2", "--max-train-samples", "12", "--batch-size", "4", "--max-new-tokens", "1"]
    flags += ["--save-every", "1", "--keep-checkpoints", "20", "--resume", "latest"]
    # With the messages to predict: a loader more, which the resumed run does without.
    run_here(script, monkeypatch, *flags, "--do-test", "--output-dir", str(tmp_path / "straight"))
    assert "resumed: nothing" in capsys.readouterr().out
    # As if the run had been stopped after its fifth step, in the middle of the second epoch.
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    kept = Path("checkpoints") / "checkpoint_4"
    shutil.copytree(tmp_path / "straight" / kept, tmp_path / "resumed" / kept)
    run_here(script, monkeypatch, *flags, "--output-dir", str(tmp_path / "resumed"))
    said = capsys.readouterr().out
    assert f"resumed: {tmp_path / 'resumed' / kept}" in said
    assert "epoch=0" not in said
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("straight", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--resume nowhere", "there is no directory nowhere"),
        ("--peft ia3 --lora-r 4", "--lora-r has no effect with --peft ia3"),
        ("--peft prompt --modules-to-save lm_head", "--modules-to-save cannot be combined"),
        ("--num-virtual-tokens 4", "--num-virtual-tokens has no effect with --peft lora"),
        ("--peft prefix --gradient-checkpointing", "checkpointing does without"),
        ("--data-file nowhere.csv", "there is no file nowhere.csv"),
        ("--data-file {train} --dataset twitter_complaints", "give one of them"),
        ("--data-file {train} --do-test", "needs --test-file"),
        ("--predictions-file out.csv", "for --do-test"),
        ("--num-epochs 0", "must be at least 1"),
        ("--push-to-hub someone/something", "needs a token"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    flags: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    arguments = importlib.import_module("common.arguments")
    given = flags.format(train=EXAMPLES / "data" / "train.csv").split()
    with pytest.raises(SystemExit) as stop:
        arguments.parse_arguments("", name="test", base_model="seq2seq", num_epochs=1, argv=given)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [("text,Label\nhello,complaint\n", "no column 'Tweet text'"), ("Tweet text,Label\n", "no row")],
)
def test_a_data_file_that_cannot_be_used_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "messages.csv"
    file.write_text(content)
    arguments = importlib.import_module("common.arguments")
    messages = importlib.import_module("common.messages")
    args = arguments.parse_arguments(
        "", name="test", base_model="seq2seq", num_epochs=1, argv=["--data-file", str(file)]
    )
    with pytest.raises(SystemExit, match=re.escape(reason)):
        messages.load_messages(args)


ROWS = [{"Tweet text": 'hi, "you"', "Label": 1, "ID": 0}, {"Tweet text": "so; what", "Label": 0, "ID": 1}]


def written(kind: str, folder: Path) -> Path:
    """ROWS in a file of this kind, as people have them."""
    path = folder / kind
    pandas = importlib.import_module("pandas")
    table = pandas.DataFrame(ROWS)
    if kind.endswith((".parquet", "no_ending_parquet")):
        table.to_parquet(path)
    elif "csv" in kind or kind.endswith(".tsv"):
        separator = "\t" if kind.endswith(".tsv") else ";" if "semicolon" in kind else ","
        table.to_csv(path, index=False, sep=separator, encoding="utf-8-sig" if "bom" in kind else "utf-8")
    elif "lines" in kind or kind.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        shapes = {"columns": table.to_dict("list"), "inner": {"version": 1, "data": ROWS}}
        path.write_text(json.dumps(shapes.get(kind.removesuffix(".json"), ROWS), indent=1))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "a.csv",
        "semicolon.csv",
        "bom.csv",
        "a.tsv",
        "a.jsonl",
        "lines.json",
        "list.json",
        "columns.json",
        "inner.json",
        "a.parquet",
        "no_ending_csv",
        "no_ending_lines",
        "no_ending_parquet",
    ],
)
def test_data_files_of_every_usual_shape_are_read(kind: str, tmp_path: Path) -> None:
    data_files = importlib.import_module("common.data_files")
    rows = data_files.read_rows([written(kind, tmp_path)])
    assert rows.to_list() == ROWS
    assert data_files.text_of(rows, "Label", "rows")["Label"][:] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "cannot be read as json"),
        ("a.jsonl", '{"text": [\n', "cannot be read as json"),
        ("a.jsonl", "", "there is no row"),
        ("a.parquet", "nothing", "cannot be read as parquet"),
        ("a.csv", "", "no row"),
        ("a.csv", "only,a,header", "no row"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read as csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    name: str, content: str | bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=f"{name}.*{reason}|{reason}.*{name}"):
        importlib.import_module("common.data_files").read_rows([path])


def test_files_with_other_columns_are_not_put_together(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text('{"text": "a"}\n')
    other.write_text('{"body": "a"}\n')
    read_rows = importlib.import_module("common.data_files").read_rows
    assert read_rows([one, one])["text"][:] == ["a", "a"]
    with pytest.raises(SystemExit, match=r"b\.jsonl has the columns \['body'\]"):
        read_rows([one, other])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 1], ["no complaint", "complaint"]),  # of a class
        ([3.0, 1.0], ["3", "1"]),
        ([1.5, 1.0], ["1.5", "1.0"]),
        ([True, False], ["true", "false"]),
        (["a", "b"], ["a", "b"]),
        ([1, None], "row 1 of the train messages"),
        ([["a"], ["b"]], "lists or objects"),
    ],
)
def test_labels_of_every_type_become_text(values: list[object], expected: list[str] | str) -> None:
    datasets = importlib.import_module("datasets")
    text_of = importlib.import_module("common.data_files").text_of
    rows = datasets.Dataset.from_dict({"Label": values, "Text": ["a", "b"]})
    if values == [2, 1]:
        rows = rows.cast_column("Label", datasets.ClassLabel(names=["Unlabeled", "complaint", "no_complaint"]))
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=expected):
            text_of(rows, "Label", "train messages")
    else:
        changed = text_of(rows, "Label", "train messages")
        assert changed["Label"][:] == expected
        assert changed.column_names == ["Label", "Text"]


@pytest.mark.parametrize("script", ["conditional_generation.py", pytest.param("causal_lm.py", marks=pytest.mark.full)])
def test_number_labels_of_json_lines_train_and_are_predicted(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test = tmp_path / "train.jsonl", tmp_path / "test.parquet"
    data.write_text("".join(json.dumps({"Satz": f"Nummer {n}", "Klasse": n % 2}) + "\n" for n in range(8)))
    importlib.import_module("pandas").DataFrame({"Satz": ["Nummer 1"], "Klasse": [None]}).to_parquet(test)
    names = ["--text-column", "Satz", "--label-column", "Klasse"]
    run_here(
        script,
        monkeypatch,
        *[*TINY, *names, "--data-file", str(data), "--test-file", str(test), "--do-test"],
        *["--output-dir", str(tmp_path / "out")],
    )
    assert re.search(r"^accuracy=[\d.]+$", capsys.readouterr().out, re.M)
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert [row["Klasse"] in ("0", "1") for row in csv.DictReader(file)] == [True]
