"""The hang catalogue: whatever one rank does alone, the first line names it and its call, soon, and no exit code is 0.

Each case is a whole life of `rig/hang_script.py` on two ranks, under the launcher's worker; what the launcher would say of it
is read from the records that they leave. They run side by side.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardwise.cli.failures import explain, failures_of

TESTS = Path(__file__).parents[1]
WARNING_S, TIMEOUT_S = 1.5, 7.0
KEEPS = "rank 1 keeps the others waiting: it "
# case -> how the first line begins, and what more stands in it.
CASES: dict[str, tuple[str, str]] = {
    "fewer batches": ("rank 1's data loader has ended after 3 batches, and rank 0's gives batch 4", ""),
    "fewer steps": (KEEPS + "waits in end_training (wait_for_everyone)", "rank 0 waits in"),
    "skipped backward": (KEEPS + "waits in", "has left out what the others wait in; rank 0 waits in"),
    "caught exception": (KEEPS + "waits in", "has left out what the others wait in; rank 0 waits in"),
    "extra step": (KEEPS + "waits in", "it has begun 6 forwards on as many batches as the others, which have begun 5"),
    "save": (KEEPS + "waits in accelerator.save_state()", "which the others are not in"),
    "gather": (KEEPS + "waits in gather (gather_objects)", "which the others are not in"),
    "evaluation": (KEEPS + "waits in", "evaluation after step 2, which the others are not in; rank 0 waits in"),
    "exit": (KEEPS + "left with exit code 0, at hang_script.py:", "after step 2; rank 0 waits in all_gather of unit"),
    "stop": (KEEPS + "is stopped by a signal", "hang_script.py:"),
    "sleeping loader": (KEEPS + "waits for its data loader since", "for batch 3, at hang_script.py:"),
    "memory": (KEEPS + "was killed by the kernel: memory ran out", "hang_script.py:"),
    "script": (
        KEEPS + "is in its script, at hang_script.py:",
        "(time.sleep(60)), after step 2; rank 0 waits in all_gather",
    ),
}
AT_ONCE = {"exit", "memory", "fewer batches"}  # the connection is gone; no threshold is waited for


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What became of each case, and the folder of each one's folder."""
    folder = tmp_path_factory.mktemp("waits")
    config = {
        "use_cpu": True,
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3},
        "shardwise_config": {"wait_warning_s": WARNING_S, "collective_timeout_s": TIMEOUT_S},
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rig.hang", json.dumps(config), str(folder), *CASES, "asked"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), folder


def _report(found: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The launcher's exit code and lines."""
    failures: dict[int, Any] = {}
    for rank, (code, ended_s) in enumerate(zip(found["codes"], found["ended_s"], strict=True)):
        if code is None:  # the launcher ends it, once another has failed
            failures[rank] = SimpleNamespace(exitcode=-signal.SIGTERM, timestamp=1000.0, pid=1)
        elif code:
            failures[rank] = SimpleNamespace(exitcode=code, timestamp=ended_s, pid=1)
    watching = SimpleNamespace(quiet=False)
    plan: Any = SimpleNamespace(max_restarts=0, watching=watching, config=SimpleNamespace(num_processes=2))
    capsys.readouterr()
    error: Any = SimpleNamespace(failures=failures)
    return explain(failures_of(error, folder, 0), plan, 0), capsys.readouterr().err.splitlines()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
def test_the_first_line_names_the_rank_that_is_waited_for(lives, case, capsys):
    found, folder = lives[0][case], lives[1] / case
    begins, has = CASES[case]
    code, lines = _report(found, folder, capsys)
    assert code != 0
    # On a busy machine so many ends at once take longer than the worker gives each of them; then its alarm ends it.
    assert found["codes"][0] in (1, -signal.SIGALRM)
    if case == "memory":  # the launcher has seen the signal itself
        assert lines[0] == "shardwise launch: rank 1 failed first: it was ended by signal 9 (SIGKILL)"
        first = json.loads((folder / "failure-0-0").read_text())["message"].splitlines()[0]
    elif case == "fewer batches":
        first = next(line for line in lines if "DataError: " in line).split("DataError: ")[1]
    else:
        first = lines[0].removeprefix("shardwise launch: ")
    assert first.startswith(begins), first
    assert has in first


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", [case for case in CASES if case not in AT_ONCE])
def test_a_screen_on_rank_0_says_so_within_five_seconds(lives, case):
    folder = lives[1] / case
    begins, _ = CASES[case]
    log = (folder / "log-0").read_text()
    entry = re.search(r"^[0-9.]+ (rank 1 keeps .*)$", log, re.MULTILINE)
    assert entry is not None, log
    assert entry[1].startswith(begins)
    assert len(re.findall(r"^[0-9.]+ rank 1 keeps ", log, re.MULTILINE)) == 1, log
    ages = [int(age) for age in re.findall(r"waits? in [^;,]* since ([0-9]+) s", entry[1])]
    assert WARNING_S <= max(ages) <= WARNING_S + 5
    for rank in (0, 1):
        assert re.search(rf"^  rank {rank}: .*hang_script\.py:[0-9]+", log, re.MULTILINE), log


@pytest.mark.timeout(240)
def test_sigusr2_asks_for_a_screen(lives):
    assert lives[0]["asked"]["codes"] == [0, 0]
    log = (lives[1] / "asked" / "log-0").read_text()
    assert "(asked for by SIGUSR2) rank 1 keeps the others waiting: it is in its script, at hang_script.py" in log
    assert "; rank 0 waits in all_gather of unit" in log
