"""The questionnaire in a terminal, by keys: back, the last page, contradictions, Ctrl-C, narrow, no colour, an existing file.

What each walk shows is kept in tests/data/screens, on a machine of two GPUs that the program is told it has:

    python -m pytest tests/unit/test_questionnaire.py --write-data
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rig.terminal import CTRL_C, DOWN, ENTER, ERASE, ESCAPE, LEFT, UP, Terminal, typed

SCREENS = Path(__file__).resolve().parents[1] / "data" / "screens"
MACHINE = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
import shardwise.config.drives, shardwise.config.machine as machine
machine.physical_gpus = lambda: 2
machine.gpu_memory_bytes = lambda: 80 << 30
machine.gpu_names = lambda: ["GPU 0: Example 80GB (UUID: x)"] * 2
machine.host_memory_bytes = lambda: 512 << 30
machine.memory_limit_bytes = lambda: None
machine.usable_cores = lambda: 64
shardwise.config.drives.not_nvme = lambda path: None if path == "/fast" else f"{path} is on sda, a turning disk"
from shardwise.cli.main import main
main()
"""
Cues = list[tuple[str, str]]
# Every question of a run on one machine, by its key, with Enter.
NAMES = (
    *("use_cpu", "num_machines", "debug", "use_zero", "use_json", "model", "zero_stage", "offload_optimizer_device"),
    *("offload_param_device", "gradient_accumulation_steps", "clip", "zero3_save_16bit_model", "zero3_init_flag"),
    *("gpu_ids", "num_processes", "mixed_precision", "dynamo_backend", "activation_checkpointing", "gpu_memory_budget"),
)
END: Cues = [("all answers", ENTER)]


def enters(first: str = "use_cpu", before: str | None = None) -> Cues:
    """Enter at each question from one on, up to another."""
    names = NAMES[NAMES.index(first) :]
    return [(f"? {name}", ENTER) for name in (names if before is None else names[: names.index(before)])]


@pytest.fixture
def walk(tmp_path, request):
    """Run `shardwise config` by cues, keep or compare its screen, and give the exit code, screen and written values."""

    def run(screen: str, cues: Cues, *arguments: str, columns: int = 80, **environment: str):
        code, terminal = typed(
            ["-c", MACHINE, "config", "--config_file", "run.yaml", *arguments],
            cues,
            columns=columns,
            folder=tmp_path,
            environment=environment,
        )
        path, text = SCREENS / f"{screen}.txt", terminal.text()
        if request.config.getoption("--write-data"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert "Traceback" not in text
        assert text == path.read_text()
        assert all(len(line) <= columns for line in terminal.lines())
        file = tmp_path / "run.yaml"
        return code, terminal, yaml.safe_load(file.read_text()) if file.exists() else None

    return run


def test_enter_alone_writes_a_file(walk):
    code, terminal, values = walk("enter_alone", [*enters(), *END])
    assert code == 0
    assert (values["deepspeed_config"]["zero_stage"], values["num_processes"], values["mixed_precision"]) == (
        3,
        2,
        "bf16",
    )
    assert "shardwise_config" not in values
    assert "This machine: 2 GPU(s) (Example 80GB, 80 GiB), 512 GiB of memory, 64 cores." in terminal.text()


def test_one_can_go_back_by_a_key_and_by_the_word(walk):
    cues = [
        *enters(before="debug"),
        ("? debug", LEFT),  # to num_machines
        ("? num_machines", ERASE + "back" + ENTER),  # to use_cpu
        ("? use_cpu", ESCAPE),  # there is nothing before it
        ("this is the first question", ""),
        ("? use_cpu", DOWN + ENTER),
        ("? num_machines", ERASE + "1" + ENTER),
        *[cue for cue in enters("debug") if "gpu_ids" not in cue[0]],
        ("all answers", ESCAPE),  # to the last question
        ("? gpu_memory_budget", ERASE * 4 + "24GB" + ENTER),
        *END,
    ]
    code, _, values = walk("back", cues)
    assert code == 0
    assert values["use_cpu"] is True
    assert values["shardwise_config"] == {"gpu_memory_budget": 24 * 10**9}


def test_what_is_typed_takes_the_place_of_the_default_or_edits_it_after_another_key(walk):
    cues = [
        *enters(before="num_machines"),
        ("? num_machines", "2" + ENTER),
        ("? machine_rank", "1" + ENTER),
        ("? main_process_ip", "10.0.0.1" + ENTER),
        ("? main_process_port", LEFT + ERASE + "1" + ENTER),  # 29500: left of the last 0, the one before it gone
        *[(f"? {name}", ENTER) for name in ("same_network", "rdzv_backend")],
        *enters("debug", before="offload_optimizer_device"),
        ("? shard_group", ENTER),
        *enters("offload_optimizer_device", before="num_processes"),
        ("? num_processes", ERASE + "4" + "0" + ENTER),
        *enters("mixed_precision", before="gpu_memory_budget"),
        ("? gpu_memory_budget", "\x1b[200~24GB\x1b[201~" + ENTER),  # pasted
        *END,
    ]
    code, _, values = walk("typing", cues)
    assert code == 0
    found = [values[name] for name in ("num_machines", "machine_rank", "main_process_port", "num_processes")]
    assert found == [2, 1, 29510, 40]
    assert values["shardwise_config"] == {"gpu_memory_budget": 24 * 10**9}


def test_a_line_of_the_last_page_can_be_changed_and_opens_what_it_contradicts(walk):
    cues = [
        *enters(),
        ("all answers", DOWN * 2 + ENTER),
        ("? num_machines", ERASE + "4" + ENTER),
        ("? machine_rank", ERASE + "3" + ENTER),
        ("? main_process_ip", "10.0.0.1" + ENTER),
        ("? main_process_port", ENTER),
        ("? same_network", ENTER),
        ("? rdzv_backend", ENTER),
        ("? shard_group", DOWN + ENTER),
        ("2 processes cannot be spread evenly over 4 machines", ""),
        ("? num_processes", ERASE + "8" + ENTER),
        ("all answers", DOWN * 14 + ENTER),
        ("? offload_optimizer_device", DOWN * 2 + ENTER),
        ("? offload_optimizer_nvme_path", ERASE * 11 + "/slow" + ENTER),
        ("/slow is on sda, a turning disk", ""),
        ("? optimizer_state_dtype", DOWN + ENTER),
        *END,
    ]
    code, _, values = walk("last_page", cues)
    assert code == 0
    assert (values["num_machines"], values["machine_rank"], values["num_processes"]) == (4, 3, 8)
    zero = values["deepspeed_config"]
    assert (zero["shard_group"], zero["offload_optimizer_device"]) == ("machine", "nvme")
    assert zero["offload_optimizer_nvme_path"] == "/slow"
    assert values["shardwise_config"] == {"optimizer_state_dtype": "bf16"}


def test_a_contradiction_is_told_at_its_question(walk):
    cues = [
        *enters(before="num_machines"),
        ("? num_machines", ERASE + "2" + ENTER),
        ("? machine_rank", ERASE + "5" + ENTER),
        ("5 is not below num_machines 2", ERASE + "1" + ENTER),
        ("? main_process_ip", ENTER),
        ("an answer is needed here", "10.0.0.1" + ENTER),
        *[(f"? {name}", ENTER) for name in ("main_process_port", "same_network", "rdzv_backend")],
        *enters("debug", before="offload_optimizer_device"),
        ("? shard_group", ENTER),
        *enters("offload_optimizer_device", before="num_processes"),
        ("? num_processes", ERASE + "3" + ENTER),
        ("3 processes cannot be spread evenly over 2 machines", ERASE + "4" + ENTER),
        *enters("mixed_precision"),
        *END,
    ]
    code, _, values = walk("contradiction", cues)
    assert code == 0
    assert (values["machine_rank"], values["num_processes"]) == (1, 4)


def test_ctrl_c_says_what_happened_and_offers_the_answers(walk, tmp_path):
    cues = [*enters(before="zero_stage"), ("? zero_stage", CTRL_C), ("? yes or no", ENTER)]
    code, terminal, values = walk("ctrl_c", cues)
    assert (code, values) == (130, None)
    assert "Interrupted at question 7/19 (zero_stage); run.yaml is not written." in terminal.text()
    cues = [
        *enters(before="num_machines"),
        ("? num_machines", ERASE + "2" + ENTER),
        ("? machine_rank", CTRL_C),
        ("launch will refuse it: main_process_ip", ""),
        ("? yes or no", "y"),
    ]
    code, _, values = walk("ctrl_c_written", cues)
    assert (code, values["num_machines"]) == (0, 2)
    # What is there goes on from it.
    cues = [("? use_cpu", CTRL_C)]
    code, terminal, again = walk("ctrl_c_at_once", cues)
    assert (code, again) == (130, values)
    assert "run.yaml is as it was" in terminal.text()


def test_sixty_columns_break_no_word(walk):
    code, terminal, _ = walk("narrow", [*enters(), *END], columns=60)
    assert code == 0
    # A line that is full to the edge would be one that the terminal has broken.
    assert max(len(line) for line in terminal.lines()) < 60


def test_no_color_draws_no_colour(walk):
    cues = [*enters(before="zero_stage"), ("? zero_stage", DOWN + CTRL_C), ("? yes or no", ENTER)]
    code, terminal, _ = walk("no_colour", cues, NO_COLOR="1")
    assert code == 130
    looks = {int(look) for looks in re.findall(r"\x1b\[([0-9;]+)m", terminal.raw) for look in looks.split(";")}
    assert looks <= {0, 1, 4, 7}, "more than bold, underlined and reversed"


def test_a_dumb_terminal_asks_line_by_line(walk):
    cues = [
        ("use_cpu [false]: ", "\n"),
        ("num_machines [1]: ", "x\n"),
        ("'x' is not a whole number", "back\n"),
        ("use_cpu [false]: ", "CPU\n"),
        *[(f"{name}", "\n") for name in ("num_machines [1]", "debug (", "use_zero (", "use_json (", "model [")],
        ("zero_stage [3]: ", "2\n"),
        ("offload_optimizer_device [none]: ", CTRL_C),
        ("yes or no [no]: ", "\n"),
    ]
    code, terminal, values = walk("dumb", cues, TERM="dumb")
    assert (code, values) == (130, None)
    assert "\x1b" not in terminal.raw


EXISTING = """\
# The lab's settings, by A. Nyone.
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 3
  # as in the paper
  gradient_clipping: 0.5
  offload_param_device: cpu
num_processes: 2  # the two good ones
mixed_precision: bf16
shardwise_config:
  prefetch_units: 1  # measured
  wait_warning_s: 5
debug: perhaps
"""


def test_an_existing_file_is_the_default_and_its_other_keys_are_kept(walk, tmp_path):
    (tmp_path / "run.yaml").write_text(EXISTING)
    names = [name for name in NAMES if name != "zero_stage"]
    names.insert(names.index("clip") + 1, "gradient_clipping")
    cues = [(f"? {name}", ENTER) for name in names]
    cues.insert(names.index("offload_optimizer_device"), ("? zero_stage", ENTER))
    code, terminal, values = walk("existing", [*cues, *END])
    assert code == 0
    assert "not taken over: run.yaml:13: debug: 'perhaps' is not true or false" in " ".join(terminal.text().split())
    assert values["deepspeed_config"]["gradient_clipping"] == 0.5
    assert values["deepspeed_config"]["offload_param_device"] == "cpu"
    assert values["shardwise_config"] == {"prefetch_units": 1, "wait_warning_s": 5.0}
    text = (tmp_path / "run.yaml").read_text()
    for comment in (
        "# The lab's settings",
        "  # as in the paper\n  gradient_clipping",
        "# the two good ones",
        "# measured",
    ):
        assert comment in text


def test_a_kept_setting_can_be_changed_and_left_out_on_the_last_page(walk, tmp_path):
    (tmp_path / "run.yaml").write_text("shardwise_config: {prefetch_units: 2, wait_warning_s: 5}\nuse_cpu: true\n")
    names = [name for name in NAMES if name != "gpu_ids"]
    cues = [
        *[(f"? {name}", ENTER) for name in names],
        ("all answers", UP * 3 + ENTER),
        ("? shardwise_config.prefetch_units", ERASE + "x" + ENTER),
        ("'x' is not a whole number", ERASE + "4" + ENTER),
        ("all answers", UP * 2 + ENTER),
        ("? shardwise_config.wait_warning_s", ERASE * 5 + "remove" + ENTER),
        *END,
    ]
    code, _, values = walk("kept", cues)
    assert code == 0
    assert values["shardwise_config"] == {"prefetch_units": 4}


def test_every_screen_is_of_a_walk():
    source = Path(__file__).read_text()
    assert {path.stem for path in SCREENS.glob("*.txt")} == set(re.findall(r'walk\(\s*"([a-z_]+)"', source))


def test_the_canvas_shows_what_a_terminal_would():
    screen = Terminal(10)
    screen.feed("one\r\ntwo\x1b[1A\rO\x1b[2C!\x1b[1B\r\x1b[2KTWO\x1b")
    screen.feed("[1D?")
    assert screen.lines() == ["One!", "TW?"]
