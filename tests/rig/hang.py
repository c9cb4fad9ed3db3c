"""Whole lives of `hang_script.py` on two ranks, under the launcher's worker, all cases side by side.

    python -m rig.hang CONFIG FOLDER CASE...       CONFIG: the settings as JSON; FOLDER: an empty directory

Ranks are forked from this process, which has imported everything, and end as `python` does. What a rank logs, prints and
records is in FOLDER/CASE. Prints {case: {"codes": [...], "ended_s": [...]}}; code None: it had to be killed.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from .ends import free_port, print_into, rank_variables

WITHIN_S = 40.0
# Of the other rank, once one has failed; the launcher gives some, too. Rank 0 has waited, and has to find out for whom.
GRACE_S = (20.0, 3.0)
SCRIPT = Path(__file__).with_name("hang_script.py")


def become_rank(rank: int, port: int, config: str, folder: Path) -> None:
    print_into(folder / f"out-{rank}", 1, 2)
    os.environ.update(
        rank_variables(rank, 2, port),
        GLOO_SOCKET_IFNAME="lo",
        SHARDWISE_CONFIG=config,
        SHARDWISE_REPORTS=str(folder),
    )
    sys.argv = ["worker.py", str(SCRIPT), folder.name, str(folder)]


def wait_for(pids: dict[int, tuple[str, int]], found: dict[str, Any]) -> None:
    began, ends = time.monotonic(), dict.fromkeys(pids, WITHIN_S)
    while pids and time.monotonic() - began < WITHIN_S:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            case, rank = pids.pop(pid)
            found[case]["codes"][rank] = os.waitstatus_to_exitcode(status)
            found[case]["ended_s"][rank] = time.monotonic() - began
            for other, its_rank in [(pid, its) for pid, (name, its) in pids.items() if name == case and status]:
                os.kill(other, signal.SIGCONT)  # as the launcher does, once it has seen a failure
                ends[other] = found[case]["ended_s"][rank] + GRACE_S[its_rank]
        else:
            time.sleep(0.02)
        for late in [pid for pid in pids if time.monotonic() - began > ends[pid]]:
            ends[late] = WITHIN_S
            os.kill(late, signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main() -> bool:
    """Whether this process is a rank, and shall run its script."""
    config, folder, *cases = sys.argv[1:]
    found: dict[str, Any] = {case: {"codes": [None, None], "ended_s": [None, None]} for case in cases}
    gc.collect()
    gc.freeze()
    pids: dict[int, tuple[str, int]] = {}
    for case in cases:
        place, port = Path(folder) / case, free_port()
        place.mkdir()
        for rank in range(2):
            pid = os.fork()
            if not pid:
                become_rank(rank, port, config, place)
                return True
            pids[pid] = (case, rank)
    wait_for(pids, found)
    print(json.dumps(found))
    return False


if __name__ == "__main__":
    import torch
    import torch._dynamo  # the script's first optimizer would
    import torch.distributed

    torch.set_num_threads(1)
    from shardwise import Accelerator  # noqa: F401
    from shardwise.cli import worker

    if main():
        worker.main()
