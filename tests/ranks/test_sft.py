"""examples/sft.py: which tokens count, that packed rows do not see each other, and what a run leaves behind."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ranks.test_examples import EXAMPLES, check_adapter, examples, fork, launch, run_here  # noqa: F401

MODEL = EXAMPLES / "base_model" / "causal_lm"
TEMPLATE = EXAMPLES / "data" / "chat_template.jinja"
PREFIXES_ONLY = re.sub(r"\{%- (end)?generation -%\}\n", "", TEMPLATE.read_text())
# Writes the last user's message otherwise than earlier ones, as templates do that drop earlier thoughts.
REWRITES = "{% for m in messages %}{{ m.role }}{{ '!' if loop.last }} {{ m.content }} {% endfor %}"
TURNS = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "complaint"},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "no complaint"},
]
TINY = ["--max-train-samples", "12", "--num-epochs", "1", "--log-every", "1"]

pytestmark = [
    pytest.mark.usefixtures("examples"),
    pytest.mark.timeout(600),
    # transformers and peft call functions of their own that they deprecate; a run prints that and goes on.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def part(name: str) -> Any:
    return importlib.import_module(f"common.{name}")


def encoder(template: str | None = TEMPLATE.read_text(), max_length: int = 512) -> Any:
    transformers = importlib.import_module("transformers")
    return part("conversations").Encoder(transformers.AutoTokenizer.from_pretrained(MODEL), template, max_length)


def learned(row: dict[str, Any], kind: str, encoder: Any) -> list[str]:
    """The texts that count in the loss, one for each stretch of labels."""
    encoded = encoder.encode(row, kind)
    assert encoded["problem"] == ""
    assert encoded["labels"][0] == -100
    stretches: list[list[int]] = [[]]
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [encoder.tokenizer.decode(stretch) for stretch in stretches if stretch]


def encode_all(rows: list[dict[str, Any]], encoder: Any) -> Any:
    datasets = importlib.import_module("datasets")
    return part("conversations").encode_rows(datasets.Dataset.from_list(rows), encoder, "data")


# Which tokens count.


@pytest.mark.parametrize("template", [TEMPLATE.read_text(), PREFIXES_ONLY], ids=["mask", "prefixes"])
def test_only_answers_count_in_every_turn_with_what_ends_them(template: str) -> None:
    both = encoder(template)
    assert ("endgeneration" in template) == (template != PREFIXES_ONLY)
    assert learned({"messages": TURNS}, "messages", both) == [" complaint</s>", " no complaint</s>"]
    assert learned({"messages": json.dumps(TURNS)}, "messages", both) == [" complaint</s>", " no complaint</s>"]
    split = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    assert learned(split, "completion", both) == [" no complaint</s>"], "an answer within the prompt is no completion"
    mixed = {"prompt": "One?", "completion": [TURNS[2]]}
    assert learned(mixed, "completion", both) == [" complaint</s>"]


PARTS = [{"type": "text", "text": "It is "}, {"type": "text", "text": "late"}, "."]
CALLS = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]


def test_content_in_parts_is_learned_as_its_text() -> None:
    both = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]
    encoded = encoder().encode({"messages": both}, "messages")
    plain = [{**message, "content": "It is late."} for message in both]
    assert encoded == encoder().encode({"messages": plain}, "messages")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": [*PARTS, {"type": "image", "url": "a.png"}]}, "content of type image"),
        ({"content": 5}, "content of type int"),
        ({"content": None, "tool_calls": CALLS}, "writes no tool calls"),
        ({"content": "Now:", "tool_calls": CALLS}, "writes no tool calls"),
    ],
)
def test_what_a_template_would_not_write_is_refused(message: dict[str, Any], reason: str) -> None:
    row = {"messages": [TURNS[0], TURNS[1], {"role": "assistant", **message}]}
    assert reason in encoder().encode(row, "messages")["problem"]


def test_tool_calls_are_learned_where_the_template_writes_them() -> None:
    template = TEMPLATE.read_text().replace("message.content | trim + eos", "message.tool_calls | tojson + eos", 1)
    row = {"messages": [TURNS[1], {"role": "assistant", "content": None, "tool_calls": CALLS}]}
    (found,) = learned(row, "messages", encoder(template))
    assert "clock" in found


def test_a_mask_and_prefixes_mark_the_same_tokens_of_the_examples_data() -> None:
    rows = part("data_files").read_rows([EXAMPLES / "data" / "chat.jsonl"])
    ways = [encoder(template) for template in (TEMPLATE.read_text(), PREFIXES_ONLY)]
    for row in rows.select(range(20)):
        assert ways[0].encode(row, "messages") == ways[1].encode(row, "messages")


def test_completions_and_texts_end_with_the_end_token() -> None:
    plain = encoder(None)
    assert learned({"prompt": "Is it?", "completion": "yes"}, "completion", plain) == [" yes</s>"]
    assert learned({"text": "all of it"}, "text", plain) == [" all of it</s>"]


@pytest.mark.parametrize(
    ("rows", "template", "reason"),
    [
        ([{"messages": TURNS}], REWRITES, "row 0 of data .* cannot be found"),
        ([{"messages": TURNS}], None, "no chat template"),
        ([{"messages": "hello"}], "", "no JSON|no chat template"),
        ([{"messages": [{"from": "human", "value": "x"}]}], "x", 'no "role"'),
        ([{"messages": TURNS}], "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ([{"prompt": None, "completion": "x"}, {"prompt": "a", "completion": "x"}], None, "row 0 .* prompt is missing"),
        ([{"question": "x", "answer": "y"}], None, "--columns"),
        ([{"text": " "}, {"text": None}], None, "no row of data is left: 2 have no answer"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(rows: list[dict[str, Any]], template: str | None, reason: str) -> None:
    with pytest.raises(SystemExit, match=reason):
        encode_all(rows, encoder(template))


def test_what_is_dropped_and_cut_is_counted_and_said() -> None:
    long = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "x"}]
    late = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 60}]
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]
    rows = [{"messages": messages, "source": "x"} for messages in (TURNS, long, late, empty, TURNS[:2])]
    fits = len(encoder().encode({"messages": TURNS}, "messages")["input_ids"])
    kept, summary = encode_all(rows, encoder(max_length=fits))
    assert (summary.rows, summary.kept, summary.empty, summary.cut, summary.lost) == (5, 2, 2, 1, 1)
    assert [len(ids) for ids in kept["input_ids"]] == [fits, fits]
    assert summary.tokens == sum(len(ids) for ids in kept["input_ids"])
    said = "\n".join(summary.lines("data", fits))
    for line in (
        "2 of 5 rows",
        "rows dropped, which have no answer or an empty one: 2",
        f"rows cut at --max-length {fits} tokens, which lost their ends: 1",
        "source",
    ):
        assert line in said


# Packing.


def test_packs_hold_every_row_once_and_no_more_than_fits() -> None:
    draw = random.Random(0)
    for capacity in (1, 7, 64):
        lengths = [draw.randint(1, capacity) for _ in range(200)]
        packs = part("packing").pack(lengths, capacity)
        assert sorted(row for rows in packs for row in rows) == list(range(200))
        sums = [sum(lengths[row] for row in rows) for rows in packs]
        assert max(sums) <= capacity
        # Best fit needs at most 11/9 of the fewest, and one.
        assert len(packs) <= 11 / 9 * math.ceil(sum(lengths) / capacity) + 1 or capacity == 1
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        part("packing").pack([1, 9], 8)


def tiny_model(kind: str) -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 64}
    if kind == "llama":
        size.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, n_embd=32, n_layer=2, n_head=2))
    if kind == "bloom":
        return transformers.BloomForCausalLM(transformers.BloomConfig(**size, hidden_size=32, n_layer=2, n_head=2))
    return transformers.MambaForCausalLM(transformers.MambaConfig(**size, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize(("kind", "across"), [("llama", False), ("gpt2", False), ("bloom", True), ("mamba", True)])
def test_a_model_that_lets_packed_rows_see_each_other_is_found(kind: str, across: bool) -> None:
    model = tiny_model(kind)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # as if trained: at the start, logits hardly depend on other tokens
            torch.nn.init.normal_(parameter, std=0.2)
    assert part("packing").attends_across_rows(model, 64, torch.device("cpu")) == across
    assert model.training


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_token_has_the_loss_packed_that_it_has_alone(attention: str) -> None:
    packing = part("packing")
    model = tiny_model("llama").eval()
    model.set_attn_implementation(attention)
    draw = random.Random(1)
    rows = [{"input_ids": [draw.randrange(64) for _ in range(draw.randint(2, 30))]} for _ in range(9)]
    for row in rows:
        row["labels"] = [-100, *row["input_ids"][1:]]

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )[labels[:, 1:].flatten() != -100]

    packs = packing.pack([len(row["input_ids"]) for row in rows], 40)
    together = packing.fill_packs(0, 40)([[rows[row] for row in pack] for pack in packs])
    alone = torch.cat([losses(packing.pad_rows(0)([rows[row]])) for pack in packs for row in pack])
    in_one = losses(packing.as_one(together))
    torch.testing.assert_close(losses(together), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_one, alone, rtol=0, atol=1e-5)


def test_flash_attention_reads_the_rows_lengths_from_a_packed_batch() -> None:
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    packing = part("packing")
    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (3, 1, 4, 2)]
    batch = packing.as_one(packing.fill_packs(0, 8)([rows[:2], rows[2:]]))
    (lengths, _), (longest, _) = flash.prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert lengths.diff().tolist() == [3, 1, 4, 4, 2, 2]  # the rows of each sequence, and what is left of it
    assert longest == 4
    assert flash._is_packed_sequence(batch["position_ids"], batch_size=1)


# Runs.


def steps_of(said: str) -> list[tuple[str, ...]]:
    return re.findall(r"^step=(\d+)/\d+ loss=([\d.]+) lr=(\S+)$", said, re.M)


def evaluations(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^eval: step=\d+ loss_per_token=([\d.]+)", said, re.M)]


def test_packed_and_unpacked_runs_have_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every row is in each step.
    flags = [*TINY, "--max-train-samples", "40", "--num-epochs", "2", "--gradient-accumulation-steps", "20"]
    found = []
    for way in ("--packing", "--no-packing"):
        run_here("sft.py", monkeypatch, *flags, way, "--output-dir", str(tmp_path))
        said = capsys.readouterr().out
        found.append([float(loss) for _, loss, _ in steps_of(said)] + evaluations(said))
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("way", ["--packing", pytest.param("--no-packing", marks=pytest.mark.full)])
def test_the_evaluation_of_two_ranks_is_that_of_one(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate at which nothing is learned; 30 rows, or 6 sequences, in batches of 4 over 2 ranks: some are read twice.
    flags = [*TINY, way, "--lr", "1e-12", "--batch-size", "4", "--output-dir", str(tmp_path)]
    run_here("sft.py", monkeypatch, *flags)
    alone = capsys.readouterr().out
    two = fork("sft.py", 2, *flags)
    assert two.returncode == 0, two.stderr[-3000:]
    assert evaluations(two.stdout) == pytest.approx(evaluations(alone), abs=1e-5)
    assert re.findall(r"tokens=\d+$", two.stdout, re.M) == re.findall(r"tokens=\d+$", alone, re.M)


@pytest.mark.parametrize("micro_batches", [pytest.param("4", marks=pytest.mark.full), "5"])
def test_a_resumed_run_has_the_losses_and_weights_of_the_straight_one(
    micro_batches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--num-epochs", "2", "--batch-size", "1", "--no-packing", "--eval-every", "2"]
    flags += ["--gradient-accumulation-steps", micro_batches]  # 12 rows: three whole steps, or the last one shorter
    flags += ["--lora-dropout", "0.1", "--save-every", "1", "--keep-checkpoints", "20", "--resume", "latest"]
    run_here("sft.py", monkeypatch, *flags, "--output-dir", str(tmp_path / "straight"))
    straight = capsys.readouterr().out
    assert len(steps_of(straight)) == 6
    watched = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in watched if line["steps"]] == pytest.approx(
        [float(loss) for _, loss, _ in steps_of(straight)], abs=2e-6
    )
    # As if stopped after the second step, before its evaluation, and after the third, at the end of an epoch, before that one.
    for number in (1, 2):
        again = tmp_path / f"resumed{number}"
        (again / "checkpoints").mkdir(parents=True)
        kept = Path("checkpoints") / f"checkpoint_{number}"
        shutil.copytree(tmp_path / "straight" / kept, again / kept)
        run_here("sft.py", monkeypatch, *flags, "--output-dir", str(again))
        resumed = capsys.readouterr().out
        assert f"resumed: {again / kept}" in resumed
        assert steps_of(resumed) == steps_of(straight)[number + 1 :]
        assert evaluations(resumed) == evaluations(straight)[number - 1 :]
        files = [tmp_path / "straight" / "model", again / "model"]
        assert (files[0] / "adapter_model.safetensors").read_bytes() == (
            files[1] / "adapter_model.safetensors"
        ).read_bytes()


def test_lines_for_several_steps_have_the_loss_of_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 12 rows: windows of 5, 5 and 2 micro-batches in an epoch, whose answers are not of one length.
    rows = [{"prompt": f"Say {number}.", "completion": "word " * (1 + number % 5)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--eval-fraction", "0", "--no-packing", "--batch-size", "1"]
    flags += ["--gradient-accumulation-steps", "5", "--num-epochs", "2", "--log-every", "2"]
    run_here("sft.py", monkeypatch, *flags, "--output-dir", str(tmp_path / "run"))
    said = [(int(step), float(loss)) for step, loss, _ in steps_of(capsys.readouterr().out)]
    watched = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [(line["step"], pytest.approx(line["loss"], abs=2e-6)) for line in watched if line["steps"]]
    assert said == lines
    assert [step for step, _ in said] == [2, 3, 4, 6]


def test_a_launched_run_leaves_a_merged_model_that_stock_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = tmp_path / "logits.safetensors"
    run = launch("sft.py", 2, *TINY, "--merge", "--output-dir", str(tmp_path), "--save-logits", str(logits))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for pattern in (
        r"^training data: 12 of 12 rows, \d+ tokens, \d+ of them answers$",
        r"^packed: 12 rows in \d+ sequences of 512, [\d.]+% full$",
        r"^step=1/\d+ loss=[\d.]+ lr=\S+$",
        r"^CPU Total Peak Memory consumed during the train \(max\): \d+$",
        r"^eval: step=\d+ loss_per_token=[\d.]+ ppl=[\d.]+ tokens=216$",
    ):
        assert len(re.findall(pattern, run.stdout, re.M)) == 1, (pattern, run.stdout)
    for saved in ("model", "merged"):
        assert check_adapter(tmp_path / saved, logits, monkeypatch) == 0
    transformers = importlib.import_module("transformers")
    reference = load_file(logits)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.float32
    with torch.no_grad():
        found = model(reference["input_ids"], attention_mask=reference["attention_mask"]).logits
    torch.testing.assert_close(found, reference["logits"], rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATE.read_text()
    _, head, text = (tmp_path / "merged" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "AutoModelForCausalLM" in text
    assert "Peft" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "flags",
    [
        "--method full --optimizer adamw8bit --gradient-checkpointing --no-packing",
        "--method qlora --attention eager --max-grad-norm 1 --schedule linear",
    ],
)
def test_every_method_trains_and_loads_in_stock_libraries(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    logits = tmp_path / "logits.safetensors"
    run_here("sft.py", monkeypatch, *TINY, *flags.split(), "--output-dir", str(tmp_path), "--save-logits", str(logits))
    assert len(evaluations(capsys.readouterr().out)) == 1
    batch = load_file(logits)
    expected = batch.pop("logits")
    model = importlib.import_module("check_adapter").load_model(tmp_path / "model", in_4bit="qlora" in flags)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-4)


def test_the_weights_of_the_lowest_evaluation_loss_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--batch-size", "1", "--eval-every", "1", "--lr", "0.5", "--warmup", "0.2"]
    logits = tmp_path / "logits.safetensors"
    run_here(
        "sft.py",
        monkeypatch,
        *TINY,
        "--num-epochs",
        "2",
        *flags,
        "--output-dir",
        str(tmp_path),
        "--save-logits",
        str(logits),
    )
    said = capsys.readouterr().out
    losses = evaluations(said)
    best = losses.index(min(losses)) + 1
    assert best < len(losses), "the rate, after a first step at 0, was meant to be far too high"
    assert f"saved: {tmp_path / 'model'}, of step {best}" in said
    assert f"| optimizer steps | {best} |" in (tmp_path / "model" / "README.md").read_text()
    assert check_adapter(tmp_path / "model", logits, monkeypatch) == 0
    assert not (tmp_path / "model.new").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--lora-r 4 --method full", "--lora-r has no effect with --method full"),
        ("--merge --method full", "--method full has none"),
        ("--data nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("--data {file} someone/something", "is named alone"),
        ("--eval-data nowhere.csv", "there is no file nowhere.csv"),
        ("--eval-data {file} --eval-fraction 0.1", "give one of them"),
        ("--columns text", "pairs such as"),
        ("--columns text=a text=b", "twice"),
        ("--max-length 0", "at least 1"),
        ("--warmup 1", "--warmup is a part"),
        ("--resume nowhere", "no directory nowhere"),
        ("--push-to-hub a/b", "needs a token"),
        ("--attention flash_attention_2", "needs a GPU"),
        ("--attention flash_attention_2 --dtype float32", "computes in 16 bits"),
        ("--optimizer adamw8bit", "--optimizer adamw8bit needs bitsandbytes"),
        ("--method qlora", "--method qlora needs bitsandbytes"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    flags: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    arguments = part("sft_arguments")
    monkeypatch.setattr(arguments.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        arguments.parse_arguments("", flags.format(file=EXAMPLES / "data" / "chat.jsonl").split())
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


# What the documentation says.


def fenced(page: str, language: str) -> list[str]:
    text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [line for of, block in blocks if of == language for line in block.splitlines()]


def test_the_commands_of_the_documentation_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = part("sft_arguments")
    monkeypatch.setattr(arguments.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    lines = [line for page in ("README.md", "docs/sft.md") for line in fenced(page, "") if "examples/sft.py" in line]
    assert len(lines) == 5
    for line in lines:
        assert (
            arguments.parse_arguments("", line.partition("#")[0].split("examples/sft.py")[1].split()).dtype
            == "bfloat16"
        )


def test_the_rows_of_the_documentation_are_trained_on() -> None:
    rows = [json.loads(line) for line in fenced("docs/sft.md", "json")]
    texts = [learned(row, part("conversations").kind_of(list(row)), encoder()) for row in rows]
    assert texts == [[" It is.</s>"]] * 3 + [[" All of this is learned.</s>"]]
