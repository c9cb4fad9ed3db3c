"""The questionnaire's promises without a terminal: only questions that apply, answers checked together, files that are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwise.cli.asking import WRITE, Back, Line
from shardwise.cli.config import finished, form_of
from shardwise.cli.filling import fill, lines_of, remarks
from shardwise.cli.form import Existing, Form, problem_with
from shardwise.cli.main import run
from shardwise.cli.questions import OF_THE_PLAN, QUESTIONS, Answers, Question, size_text
from shardwise.config.fields import budget
from shardwise.config.resolve import resolve
from shardwise.config.schema import Config
from shardwise.config.yaml_file import parse_yaml, to_file_values
from shardwise.errors import ConfigError

PATH = Path("run.yaml")
COMMAND = [sys.executable, "-c", "from shardwise.cli.main import main; main()", "config"]


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 2)
    monkeypatch.setattr("shardwise.cli.filling.not_nvme", lambda path: None if path == "/fast" else f"{path} is slow")


class User:
    """One who gives what `script` says, of a list one at a time, and else presses Enter.

    asked: the questions in their order. wrong: what was said against answers. pages: what is chosen on the last page.
    """

    def __init__(self, script: Mapping[str, Any] | None = None, pages: Sequence[str] = ()) -> None:
        self.script = {
            name: list(replies) if isinstance(replies, list) else [replies] for name, replies in (script or {}).items()
        }
        self.pages = list(pages)
        self.asked: list[str] = []
        self.told: list[str] = []
        self.wrong: list[tuple[str, str]] = []

    def say(self, text: str = "", *, indent: str = "") -> None:
        self.told.append(text)

    def ask(self, question: Question, default: Any, wrong: Callable[[Any], str | None], place: str) -> Any:
        self.asked.append(question.name)
        replies = self.script.get(question.name, [])
        while True:
            reply = replies.pop(0) if replies else default
            if reply == "back":
                raise Back
            problem = wrong(reply)
            if problem is None:
                return reply
            self.wrong.append((question.name, problem))
            assert replies, f"{question.name}: {problem}"

    def review(self, lines: Sequence[Line], path: str, *, writable: bool) -> str:
        if not self.pages:
            assert writable, self.told
            return WRITE
        if self.pages[0] == "back":
            self.pages.pop(0)
            raise Back
        return self.pages.pop(0)

    def line(self, prompt: str, default: str, wrong: Callable[[Any], str | None]) -> str:
        reply = self.script[prompt].pop(0)
        assert wrong(reply) is None
        return str(reply)

    def agrees(self, text: str, *, default: bool) -> bool:
        return default


@dataclass
class Knows:
    """A recommendation without a model."""

    defaults: dict[str, Any]
    said: tuple[str, ...] = ("It recommends.",)
    runs: list[Config] = field(default_factory=list)

    def problem(self, model: str) -> str | None:
        return f"{model}: there is no such model" if model == "wrong" else None

    def plan(self, answers: Answers, config: Config) -> Knows:
        self.runs.append(config)
        return self


def existing_of(text: str) -> Existing:
    return Existing.of(parse_yaml(text, "run.yaml"))


def answer(settings: dict[str, str | bool], user: User | None = None, file: str | None = None) -> Config:
    """The Config that a user, or nobody, makes of flags and a file."""
    form = form_of(settings, None if file is None else existing_of(file))
    if user is not None:
        fill(form, user, PATH)
    return finished(form, PATH)


def test_the_guides_answers_give_the_guides_file() -> None:
    script = {
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "clip": True,
        "zero3_init_flag": True,
        "num_processes": "1",
        "mixed_precision": "no",
    }
    user = User(script)
    config = answer({}, user)
    assert to_file_values(config)["deepspeed_config"] == {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "zero_stage": 3,
    }
    assert (config.distributed_type, config.num_processes, config.use_cpu) == ("DEEPSPEED", 1, False)
    assert "shardwise_config" not in to_file_values(config)  # accelerate reads it too
    assert not {"machine_rank", "deepspeed_config_file"} & set(user.asked)


@pytest.mark.parametrize(
    ("script", "absent", "present"),
    [
        ({"use_zero": False}, {"zero_stage", "use_json", "clip", "model", "offload_param_device"}, {"mixed_precision"}),
        ({"zero_stage": 2}, {"offload_param_device", "zero3_init_flag", "gpu_memory_budget"}, {"dynamo_backend"}),
        ({"zero_stage": 0}, {"offload_optimizer_device", "optimizer_state_dtype"}, {"gradient_accumulation_steps"}),
        ({"use_cpu": True, "offload_optimizer_device": "cpu"}, {"gpu_ids", "optimizer_state_dtype"}, {"num_processes"}),
        ({"offload_optimizer_device": "cpu"}, {"sequence_length"}, {"optimizer_state_dtype", "gpu_memory_budget"}),
        (
            {"num_machines": "2", "main_process_ip": "10.0.0.1", "machine_rank": "1", "num_processes": "4"},
            set(),
            {"machine_rank", "main_process_ip", "main_process_port", "same_network", "rdzv_backend", "shard_group"},
        ),
    ],
)
def test_only_questions_that_apply_are_asked(script: dict[str, Any], absent: set[str], present: set[str]) -> None:
    user = User(script)
    answer({}, user)
    assert not absent & set(user.asked)
    assert present <= set(user.asked)


def test_a_flag_answers_its_question() -> None:
    user = User()
    config = answer({"zero_stage": "2", "use_cpu": True}, user)
    assert config.zero.zero_stage == 2
    assert config.use_cpu
    assert not {"zero_stage", "use_cpu", "use_zero", "use_json"} & set(user.asked)


def test_defaults_use_all_gpus() -> None:
    config = answer({})
    assert (config.distributed_type, config.zero.zero_stage, config.num_processes) == ("DEEPSPEED", 3, 2)
    assert config.mixed_precision == "bf16"
    assert config.zero.gradient_clipping is None


@pytest.mark.parametrize(
    ("kind", "expected"), [("MULTI_GPU", "MULTI_GPU"), ("MULTI_CPU", "MULTI_CPU"), ("DEEPSPEED", "DEEPSPEED")]
)
def test_a_named_type_is_kept(kind: str, expected: str) -> None:
    config = answer({"distributed_type": kind, "num_processes": "2"})
    assert config.distributed_type == expected
    assert config.use_cpu == (kind == "MULTI_CPU")


def test_a_wrong_answer_is_told_at_its_question() -> None:
    assert problem_with("num_processes", "x") == "'x' is not a whole number"
    assert problem_with("gradient_clipping", "-1") is not None


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ({"num_machines": "2", "main_process_ip": "a", "machine_rank": ["5", "1"]}, "machine_rank: 5 is not below"),
        ({"num_machines": "2", "main_process_ip": ["", "a"]}, "main_process_ip: an answer is needed"),
        (
            {"num_machines": "2", "main_process_ip": "a", "num_processes": ["3", "4"]},
            "num_processes: 3 processes cannot",
        ),
        ({"gpu_ids": ["0,0", "0,1"]}, "gpu_ids: '0,0' is not"),
        ({"gpu_memory_budget": ["much", "24GB"]}, "gpu_memory_budget: 'much' is not auto or a size"),
        ({"use_json": True, "deepspeed_config_file": ["no.json", "back"]}, "deepspeed_config_file: no.json"),
    ],
)
def test_an_answer_is_checked_with_those_before_it(script: dict[str, Any], told: str) -> None:
    user = User({**script, "use_json": [script["use_json"], False]} if "use_json" in script else script)
    answer({}, user)
    assert any(f"{name}: {text}".startswith(told) for name, text in user.wrong), user.wrong


def test_what_a_kept_key_contradicts_is_told_on_the_last_page_and_can_be_left_out_there() -> None:
    file = "dynamo_config: {dynamo_backend: inductor, dynamo_mode: reduce-overhead}\nuse_cpu: true\n"
    user = User(
        {"activation_checkpointing": "auto", "dynamo_config.dynamo_mode (or remove)": "remove"},
        pages=["dynamo_config.dynamo_mode"],
    )
    config = answer({}, user, file)
    assert any("reduce-overhead records CUDA graphs" in text for text in user.told)
    assert config.engine.activation_checkpointing == "auto"
    assert config.compiling is not None
    assert config.compiling.dynamo_mode == "default"


def test_back_makes_the_answer_a_default_and_skips_what_flags_said() -> None:
    user = User(
        {"num_machines": ["2", "2"], "machine_rank": ["1", "1"], "main_process_ip": ["10.0.0.9", "back", "10.0.0.9"]}
    )
    user.script["main_process_port"] = ["back"]
    config = answer({"use_cpu": True}, user)
    # The address was given, taken back, gone back from, and was still the default.
    assert user.asked[:8] == [
        *("num_machines", "machine_rank", "main_process_ip", "main_process_port"),
        *("main_process_ip", "machine_rank", "main_process_ip", "main_process_port"),
    ]
    assert config.main_process_ip == "10.0.0.9"
    user = User({"num_machines": ["back", "1"]})
    answer({"use_cpu": True}, user)
    assert "! this is the first question" in user.told


def test_a_change_on_the_last_page_opens_what_it_makes_apply_and_what_it_contradicts() -> None:
    user = User(
        {"num_machines": ["1", "2"], "num_processes": ["3", "4"], "main_process_ip": "a"}, pages=["num_machines"]
    )
    config = answer({}, user)
    later = user.asked[user.asked.index("num_machines", 3) :]
    assert {"machine_rank", "main_process_ip", "num_processes"} <= set(later)
    assert "zero_stage" not in later
    assert (config.num_machines, config.num_processes) == (2, 4)
    user = User({"gpu_memory_budget": ["none", "auto"]}, pages=["back"])
    assert answer({}, user).engine.gpu_memory_budget == "auto"


def test_a_flag_can_be_changed_on_the_last_page() -> None:
    user = User({"zero_stage": 1}, pages=["zero_stage"])
    assert answer({"zero_stage": "2"}, user).zero.zero_stage == 1


FILE = """
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 2, offload_optimizer_device: cpu, gradient_accumulation_steps: 8, gradient_clipping: 0.5}
mixed_precision: fp16
num_processes: 6
gpu_ids: 1,0
shardwise_config: {gpu_memory_budget: 24GB, loss_scale: {initial: 128}, prefetch_units: 2}
"""


@pytest.mark.parametrize("user", [None, User()])
def test_a_files_values_are_the_defaults_and_its_other_keys_are_kept(user: User | None) -> None:
    config = answer({}, user, FILE)
    assert config == resolve({}, parse_yaml(FILE.replace("128}", "128, growth_interval: 2000}"), "run.yaml")).config


def test_a_flag_wins_over_the_file() -> None:
    config = answer(
        {"mixed_precision": "bf16", "prefetch_units": "4"}, None, FILE.replace("loss_scale: {initial: 128}, ", "")
    )
    assert (config.mixed_precision, config.engine.prefetch_units, config.zero.zero_stage) == ("bf16", 4, 2)


def test_what_of_a_file_is_wrong_is_told_and_not_taken_over() -> None:
    existing = existing_of("zero_stag: 3\nmixed_precision: fp8\nnum_machines: 2\nmachine_rank: 5\nuse_cpu: true\n")
    assert [problem.split(": ")[:2] for problem in existing.problems] == [
        ["run.yaml:2", "mixed_precision"],
        ["run.yaml:1", "zero_stag"],
    ]
    form = form_of({}, existing)
    with pytest.raises(ConfigError, match=r"run\.yaml: machine_rank: 5 is not below"):
        finished(form, PATH)
    user = User({"machine_rank": ["5", "0"], "main_process_ip": "a"})
    fill(form, user, PATH)
    assert user.wrong == [("machine_rank", "5 is not below num_machines 2; ranks of machines count from 0")]


def test_what_loses_its_meaning_is_told() -> None:
    form = form_of(
        {"zero_stage": "1"}, existing_of(FILE.replace("zero_stage: 2", "zero_stage: 3, zero3_init_flag: true"))
    )
    assert form.left_out(finished(form, PATH)) == ["deepspeed_config.zero3_init_flag"]
    form = form_of({}, existing_of(FILE))
    fill(form, User({"use_zero": False}), PATH)
    config = finished(form, PATH)
    assert (config.distributed_type, config.gradient_accumulation_steps) == ("MULTI_GPU", 8)
    assert "deepspeed_config.offload_optimizer_device" in form.left_out(config)


def test_the_older_spelling_of_fp16_is_read() -> None:
    assert answer({}, None, "fp16: true\nuse_cpu: true\n").mixed_precision == "fp16"


def test_a_recommended_plan_is_the_default_and_what_differs_is_told() -> None:
    plan = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    knows = Knows({**plan, "activation_checkpointing": "auto", "gpu_memory_budget": "auto", "dynamo_backend": "no"})
    form = Form(existing_of("deepspeed_config: {zero_stage: 1}\nmixed_precision: fp16\n"), {}, knows)
    user = User({"model": ["wrong", "gpt"], "activation_checkpointing": "all"})
    fill(form, user, PATH)
    assert ("model", "wrong: there is no such model") in user.wrong
    config = finished(form, PATH)
    assert (config.zero.zero_stage, config.zero.offload_optimizer_device) == (3, "cpu")
    assert config.engine.gpu_memory_budget == "auto"
    # What was assumed of the run is what was answered later.
    assert {(run.num_processes, run.mixed_precision) for run in knows.runs} == {(2, "fp16")}
    assert remarks(form) == ["It recommends. The answers differ in activation_checkpointing."]
    assert set(knows.defaults) == set(OF_THE_PLAN)
    assert "micro_batch_size" not in str(to_file_values(config))  # it was for the estimate


def test_the_last_page_has_every_answer_and_what_is_kept() -> None:
    form = form_of({"zero_stage": "2"}, existing_of(FILE))
    fill(form, User(), PATH)
    lines = {line.name: line for line in lines_of(form)}
    assert lines["gpu_memory_budget"].text == "24GB"
    assert (lines["zero_stage"].note, lines["shardwise_config.loss_scale.initial"].note) == ("flag", "kept")


def test_directories_that_are_on_no_nvme_drive_and_too_many_processes_are_told() -> None:
    script = {"offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/fast,/slow", "num_processes": "8"}
    user = User(script)
    form = form_of({})
    fill(form, user, PATH)
    assert remarks(form) == ["/slow is slow", "8 processes on a machine need as many GPUs; this one has 2"]
    assert "! /slow is slow" in user.told


@pytest.mark.parametrize("text", ["24GB", "24GiB", "1536MiB", "1TB", "24000000001"])
def test_a_budget_is_shown_as_it_can_be_typed(text: str) -> None:
    assert size_text(budget(text)) == text


def test_each_question_has_a_line_of_help_and_fits_sixty_columns() -> None:
    for question in QUESTIONS:
        assert question.words.help
        assert "\n" not in question.words.help
        assert len(question.words.text) <= 60 - len("21/25  ")
        assert all(len(text) <= 55 for text in question.words.choices.values())


# The command itself.


def said(*arguments: str, given: str = "", cwd: Path) -> tuple[int, str, str]:
    ended = subprocess.run(
        [*COMMAND, *arguments], input=given, capture_output=True, text=True, cwd=cwd, check=False, env=dict(os.environ)
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_without_a_terminal_lines_of_the_input_answer(tmp_path: Path) -> None:
    replies = ["true", "1", "", "y", "back", "yes", "no", "", "2", "cpu"]
    code, out, err = said("--config_file", "a.yaml", given="\n".join(replies) + "\n" * 20, cwd=tmp_path)
    assert code == 0, err
    zero = yaml.safe_load((tmp_path / "a.yaml").read_text())["deepspeed_config"]
    assert (zero["zero_stage"], zero["offload_optimizer_device"]) == (2, "cpu")
    assert "use_zero (yes or no) [true]: yes" in out


def test_input_that_ends_early_names_the_flags_that_are_missing(tmp_path: Path) -> None:
    code, _, err = said("--config_file", "a.yaml", "--zero_stage", "2", given="true\n", cwd=tmp_path)
    assert code == 2
    assert not (tmp_path / "a.yaml").exists()
    (line,) = err.splitlines()
    assert "--num_machines" in line
    assert "--default" in line
    for known in ("--zero_stage,", "--use_cpu", "--offload_param_device", "--dynamo_backend", "--use_zero"):
        assert known not in line


def test_every_answer_can_be_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    everything: dict[str, str | bool] = {
        "use_cpu": True,
        "num_machines": "1",
        "debug": False,
        "zero_stage": "3",
        "offload_optimizer_device": "cpu",
        "offload_param_device": "none",
        "gradient_accumulation_steps": "2",
        "zero3_save_16bit_model": "true",
        "zero3_init_flag": "false",
        "num_processes": "2",
        "mixed_precision": "bf16",
    }
    form = form_of(everything)
    assert not [q.name for q, _ in form.walk() if q.name not in form.answers and q.needed and not q.is_helper]
    config = finished(form, PATH)
    assert config.zero.offload_optimizer_device == "cpu"
    assert config.zero.gradient_accumulation_steps == 2
    assert not config.debug


def test_default_begins_anew_and_update_keeps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    named = ["--config_file", str(path)]
    assert run(["config", *named, "--update", "--zero_stage", "2"]) == 2
    assert "there is no such file to update" in capsys.readouterr().err
    path.write_text(FILE)
    assert run(["config", *named, "--update", "--zero-stage", "3"]) == 0
    found = resolve({}, path).config
    assert (found.zero.zero_stage, found.zero.gradient_accumulation_steps, found.engine.prefetch_units) == (3, 8, 2)
    before = path.read_text()
    assert run(["config", *named, "--default", "--zero_stage", "7"]) == 2
    assert run(["config", *named, "--default", "--num_machines", "2", "--machine_rank", "5"]) == 2
    assert path.read_text() == before
    assert run(["config", *named, "--default", "--zero_stage", "1"]) == 0
    assert resolve({}, path).config.engine.prefetch_units == 1
    assert (tmp_path / "run.yaml.old").read_text() == before
    assert run(["config", *named, "--default", "--update"]) == 2
    capsys.readouterr()
    assert run(["config", *named, "--update"]) == 2
    assert "nothing to put into the file" in capsys.readouterr().err
    capsys.readouterr()


def test_a_question_to_come_is_no_error_of_a_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    flags = ["--num_machines", "2", "--main_process_ip", "10.0.0.1", "--num_processes", "4", "--default"]
    assert run(["config", "--config_file", str(path), *flags]) == 0
    assert resolve({}, path).config.main_process_port == 29500
    capsys.readouterr()


def test_show_prints_each_setting_with_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    assert run(["config", "show", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "   3  deepspeed_config.zero_stage = 2" in out
    assert "   7  shardwise_config.loss_scale.initial = 128.0" in out
    assert out[-1].endswith("others have their defaults; `shardwise launch --dry_run` shows all.")
    path.write_text("zero_stag: 2\n")
    assert run(["config", "show", str(path)]) == 2
    assert run(["config", "show", str(tmp_path / "no.yaml")]) == 2


def test_a_model_is_needed_for_what_is_said_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--default", "--lora_r", "8"]) == 2
    assert capsys.readouterr().err == (
        "error: --lora_r, --quantize and --sequence_length are of the model that --model names; add it\n"
    )
