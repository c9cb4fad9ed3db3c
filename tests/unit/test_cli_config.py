"""The questionnaire's promises: only questions that apply, defaults that work, and no terminal needed."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.config import QUESTIONS, Question, answer, ask_in_terminal, problem_with
from shardwise.cli.main import run
from shardwise.config.resolve import resolve
from shardwise.config.yaml_file import to_file_values
from shardwise.errors import ConfigError

DOWN, ENTER = "\x1b[B", "\r"


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.cli.config.visible_gpus", lambda ids=None: 2)


def answers_of(script: dict[str, Any], asked: list[str]) -> Callable[[Question, Any, Callable[[Any], str | None]], Any]:
    """A user who gives what `script` says and otherwise presses Enter; `asked` gets the questions in order."""

    def ask(question: Question, default: Any, wrong: Callable[[Any], str | None]) -> Any:
        asked.append(question.name)
        reply = script.get(question.name, default)
        assert wrong(reply) is None
        return reply

    return ask


def test_the_guides_answers_give_the_guides_file() -> None:
    asked: list[str] = []
    script = {
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "clip": True,
        "zero3_init_flag": True,
        "num_processes": "1",
        "mixed_precision": "no",
    }
    config = answer({}, ask=answers_of(script, asked), take_defaults=False)
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
    assert "machine_rank" not in asked
    assert "deepspeed_config_file" not in asked


@pytest.mark.parametrize(
    ("script", "absent", "present"),
    [
        ({"use_zero": False}, {"zero_stage", "use_json", "clip", "offload_param_device"}, {"mixed_precision"}),
        ({"zero_stage": 2}, {"offload_param_device", "zero3_init_flag"}, {"offload_optimizer_device"}),
        ({"zero_stage": 0}, {"offload_optimizer_device"}, {"gradient_accumulation_steps"}),
        ({"use_cpu": True}, {"gpu_ids"}, {"num_processes"}),
        (
            {"num_machines": "2", "main_process_ip": "10.0.0.1", "machine_rank": "1", "num_processes": "4"},
            set(),
            {"machine_rank", "main_process_ip", "main_process_port", "same_network", "rdzv_backend"},
        ),
    ],
)
def test_only_questions_that_apply_are_asked(script: dict[str, Any], absent: set[str], present: set[str]) -> None:
    asked: list[str] = []
    answer({}, ask=answers_of(script, asked), take_defaults=False)
    assert not absent & set(asked)
    assert present <= set(asked)


def test_a_flag_answers_its_question() -> None:
    asked: list[str] = []
    config = answer({"zero_stage": "2", "use_cpu": True}, ask=answers_of({}, asked), take_defaults=False)
    assert config.zero.zero_stage == 2
    assert config.use_cpu
    assert not {"zero_stage", "use_cpu", "use_zero", "use_json"} & set(asked)


def test_defaults_use_all_gpus() -> None:
    config = answer({}, ask=None, take_defaults=True)
    assert (config.distributed_type, config.zero.zero_stage, config.num_processes) == ("DEEPSPEED", 3, 2)
    assert config.mixed_precision == "bf16"
    assert config.zero.gradient_clipping is None


@pytest.mark.parametrize(
    ("kind", "expected"), [("MULTI_GPU", "MULTI_GPU"), ("MULTI_CPU", "MULTI_CPU"), ("DEEPSPEED", "DEEPSPEED")]
)
def test_a_named_type_is_kept(kind: str, expected: str) -> None:
    config = answer({"distributed_type": kind, "num_processes": "2"}, ask=None, take_defaults=True)
    assert config.distributed_type == expected
    assert config.use_cpu == (kind == "MULTI_CPU")


def test_without_a_terminal_the_missing_flags_are_named() -> None:
    with pytest.raises(ConfigError) as error:
        answer({"zero_stage": "2"}, ask=None, take_defaults=False)
    text = str(error.value)
    assert "--use_cpu" in text
    assert "--mixed_precision" in text
    assert "--default" in text
    assert "--zero_stage," not in text
    assert "--offload_param_device" not in text


def test_every_answer_can_be_a_flag() -> None:
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
    config = answer(everything, ask=None, take_defaults=False)
    assert config.zero.offload_optimizer_device == "cpu"
    assert config.zero.gradient_accumulation_steps == 2
    assert not config.debug


def test_a_wrong_answer_is_told_at_its_question() -> None:
    assert problem_with("num_processes", "x") == "'x' is not a whole number"
    assert problem_with("gradient_clipping", "-1") is not None
    assert problem_with("main_process_ip", " ") is not None
    assert problem_with("machine_rank", "1") is None  # right by itself; the rule sees all answers at the end
    assert problem_with("use_zero", True) is None


def test_each_question_has_a_line_of_help() -> None:
    assert all(question.words.help and "\n" not in question.words.help for question in QUESTIONS)


def test_arrow_keys_choose(capsys: pytest.CaptureFixture[str]) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    stage = next(question for question in QUESTIONS if question.name == "zero_stage")
    steps = next(question for question in QUESTIONS if question.name == "gradient_accumulation_steps")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(DOWN + ENTER)
        assert ask_in_terminal(stage, 1, lambda value: None) == 2
        keys.send_text("\x7fx" + ENTER + "\x7f8" + ENTER)  # a wrong answer stays on the line until it is right
        assert ask_in_terminal(steps, 1, lambda value: problem_with("gradient_accumulation_steps", value)) == "8"
    assert stage.words.help in capsys.readouterr().out


def test_without_a_terminal_the_command_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert run(["config", "--config_file", str(path)]) == 2
    assert not path.exists()
    assert run(["config", "--config-file", str(path), "--default", "--zero-stage", "2"]) == 0
    assert resolve({}, path).config.zero.zero_stage == 2
    assert run(["config", "--default", "--zero_stage", "7", "--config_file", str(path)]) == 2
    assert resolve({}, path).config.zero.zero_stage == 2
    capsys.readouterr()


def in_terminal(arguments: list[str], keys: Callable[[str], str | None], timeout_s: float = 60) -> tuple[int, str]:
    """Run the command in a terminal of its own; `keys` gives what is typed whenever the screen is quiet."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
        code = "from shardwise.cli.main import main; main()"
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
    screen, deadline = "", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 0.3)
        if not ready:
            typed = keys(screen)
            if typed is not None:
                os.write(terminal, typed.encode())
            continue
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        screen += part.decode(errors="replace")
    else:
        os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), screen


@pytest.mark.timeout(90)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # pty.fork in a process with threads
def test_enter_alone_writes_a_file_in_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    code, screen = in_terminal(["config", "--config_file", str(path)], lambda screen: ENTER if "?" in screen else None)
    assert code == 0, screen
    assert resolve({}, path).config.zero.zero_stage == 3
    assert "configuration written to" in screen


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ctrl_c_writes_nothing_and_shows_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    once = iter(["\x03"])
    arguments = ["config", "--config_file", str(path)]
    code, screen = in_terminal(arguments, lambda screen: next(once, None) if "CPU only" in screen else None)
    assert code == 130
    assert "Traceback" not in screen
    assert not path.exists()
