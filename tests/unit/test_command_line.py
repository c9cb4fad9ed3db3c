"""The command line's promises: whole names in --help at any width, completion in three shells, and each error once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from shardwise.cli.completion import PATH, SHELLS, _values
from shardwise.cli.flags import FLAGS
from shardwise.cli.main import run

COMMANDS = ("config", "launch", "estimate", "env", "merge", "export", "import", "completion")


def said(capsys, *arguments):
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("command", ["config", "launch", "estimate"])
def test_help_has_the_whole_name_of_every_flag(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = said(capsys, command, "--help")
    assert code == 0
    assert "…" not in out
    assert all(re.search(rf"(?<![\w-])--{flag.name}(?![\w])", out) for flag in FLAGS)
    assert all(f"--{name}" in out for flag in FLAGS for name in flag.said.also)
    assert max(len(line) for line in out.splitlines()) <= 80
    for odd in ("<bool>", "<str>", "[[", "...]..."):
        assert odd not in out
    assert out.startswith("Usage: shardwise ")


def test_help_names_every_command_with_its_whole_sentence(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert "..." not in out.split("Commands:")[1]
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in COMMANDS)
    assert said(capsys)[:2] == (2, out)


def test_python_dash_m_is_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "shardwise", "--version"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.split()[0], ended.stderr) == (0, "shardwise", "")


def test_values_that_a_flag_takes_are_known_by_its_name_in_help():
    assert _values("none|cpu|nvme") == ("none", "cpu", "nvme")
    assert _values("world|machine|N") == ("world", "machine")
    assert (_values("FILE"), _values("DIR[,DIR]"), _values("N"), _values("TYPE")) == (PATH, PATH, (), ())


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_has_every_flag_and_the_shell_reads_it(capsys, tmp_path, shell):
    code, out, _ = said(capsys, "completion", shell)
    assert code == 0
    for flag in FLAGS:
        assert (f"-l {flag.name} " if shell == "fish" else f"--{flag.name}") in out
    if shutil.which(shell):
        path = tmp_path / f"shardwise.{shell}"
        path.write_text(out)
        ended = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_another_shell_is_an_error_in_one_line(capsys):
    code, out, err = said(capsys, "completion", "tcsh")
    assert (code, out) == (2, "")
    assert err == "error: tcsh: is not one of bash, zsh, fish\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["co"], {"config", "completion"}),
        (["config", ""], {"show", "run.yaml"}),
        (["launch", "--zero_st"], {"--zero_stage"}),
        (["launch", "--zero_stage", ""], {"0", "1", "2", "3"}),
        (["launch", "--offload_optimizer_device", "n"], {"none", "nvme"}),
        (["launch", "--config_file", "r"], {"run.yaml"}),
        (["launch", "--num_processes", ""], set()),
        (["launch", "r"], {"run.yaml"}),
        (["completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(capsys, tmp_path, typed, offered):
    script = said(capsys, "completion", "bash")[1]
    (tmp_path / "run.yaml").touch()
    words = " ".join(f"'{word}'" for word in ("shardwise", *typed))
    program = (
        f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _shardwise; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    ended = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True, env=dict(os.environ)
    )
    assert set(ended.stdout.split()) == offered


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stag: 3\n  offload_param_device: cpu\n", 1),
        (
            "num_machine: 2\nmachine_rank: 1\nmain_process_ip: a\nmain_process_port: 1\nnum_processes: 2\nuse_cpu: true\n",
            1,
        ),
        (
            "distributed_type: DEEPSPEED\nzero_stage: 3\ndeepspeed_config:\n  offload_param_device: cpu\nuse_cpu: true\n",
            1,
        ),
        (
            "distributed_type: DEEPSPEED\nzero_stag: 3\ndeepspeed_config:\n  zero_stage: 1\n  offload_param_device: x\n",
            2,
        ),
    ],
)
def test_what_follows_from_an_unknown_key_is_no_error_of_its_own(capsys, tmp_path, text, lines):
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "train.py").touch()
    _, _, err = said(
        capsys, "launch", "--use_cpu", "--config_file", str(tmp_path / "run.yaml"), str(tmp_path / "train.py")
    )
    assert len(err.splitlines()) == lines, err


def test_errors_of_a_file_come_in_its_order(capsys, tmp_path):
    text = (
        "mixed_precision: bf61\ndeepspeed_config:\n  zero_stge: 3\n  offload_param_device: x\nnum_processes: many\n"
        "shardwise_config:\n  prefetch_unit: 2\ndebug: maybe\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    _, _, err = said(capsys, "config", "show", str(tmp_path / "run.yaml"))
    found = [int(line.split("run.yaml:")[1].split(":")[0]) for line in err.splitlines()]
    assert found == [1, 3, 4, 5, 7, 8], err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["estimate", "model", "--gpu_memory", "80GB"], "unknown flag; `shardwise plan` has it"),
        (["plan", "model", "--nonsense"], "unknown flag; see --help.\n"),
        (["launch", "--tokens", "8", "train.py"], "see --help. Flags of the script come after it.\n"),
        (["config", "run.yaml"], "The file is --config_file FILE"),
        (["config", "num_processes=2"], "a setting a flag such as --num_processes 2"),
        (["config", "shwo"], "Did you mean 'show'?\n"),
    ],
)
def test_a_word_in_the_wrong_place_is_told_where_it_belongs(capsys, words, hint):
    code, _, err = said(capsys, *words)
    assert code == 2
    assert hint in err
    assert len(err.splitlines()) == 1
