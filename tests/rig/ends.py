"""Whole lives of a short script, fast: ranks are forked from a process that has imported everything, and end as `python` does.

    python -m rig.ends CASES FOLDER       CASES: a JSON list of `Case`s as dictionaries; FOLDER: an empty directory

A rank is a child that falls out of the loop below and runs the rest of this file as its script: its interpreter ends by
itself, with all that happens then. After each run of a case the ranks' exit codes, what they wrote and what they left are
looked at. One JSON line per case: {..., "codes": {"0, 0": 20}, "problems": [...], "failed": 0}.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WITHIN_S = 90.0


@dataclass(frozen=True)
class Case:
    """tier:     where weights and states rest: none, cpu, nvme.
    end:      how the script ends: return, raise, exit 0, exit 3, SIGTERM, SIGKILL; "lost": rank 1 dies and rank 0 meets it in a
              collective; "vote": rank 0 ends after a vote that rank 1 takes part in later; "save": it ends while a save goes on
              in the background; "large save": and only then the save is written, as a large one is; "failed save": the
              last rank's disk is full then, and what follows a comma is how the script ends; "heard": it has asked how the save
              went, "killed": the last rank is, there; "broken tracker": rank 0's takes nothing of what is written at the end.
    farewell: it calls end_training before.
    count:    how many runs.
    """

    tier: str = "none"
    end: str = "return"
    farewell: bool = False
    count: int = 1
    world: int = 2

    @property
    def codes(self) -> list[int]:
        """The exit codes that the ranks ought to have."""
        if self.end == "lost":
            return [1, 9]
        if self.end == "broken tracker":
            return [120, 0]
        if self.way == "killed":
            return [120] * (self.world - 1) + [9]
        codes = {"raise": 1, "exit 3": 120 if self.fails else 3, "SIGTERM": -15, "SIGKILL": -9, "heard": 0}
        return [codes.get(self.way, 120 if self.fails else 0)] * self.world

    @property
    def fails(self) -> bool:
        """Whether a save fails when its script has ended."""
        return self.end.startswith("failed save")

    @property
    def saves(self) -> bool:
        """Whether there is a save afterwards."""
        return self.end.endswith("save") and not self.fails

    @property
    def way(self) -> str:
        return self.end.rpartition(", ")[2]

    def config(self, folder: Path) -> dict[str, Any]:
        zero: dict[str, Any] = {"zero_stage": 3}
        if self.tier != "none":
            zero |= {"offload_optimizer_device": self.tier, "offload_param_device": self.tier}
        if self.tier == "nvme":
            zero |= dict.fromkeys(("offload_optimizer_nvme_path", "offload_param_nvme_path"), str(folder / "nvme"))
        return {"use_cpu": True, "distributed_type": "DEEPSPEED", "deepspeed_config": zero}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun gives one of the ranks of a machine."""
    same = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), **same}


def print_into(path: Path, *descriptors: int) -> None:
    """Send what this process prints there, to a new file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in descriptors:
        os.dup2(file, descriptor)
    os.close(file)


def be_rank(case: Case, rank: int, port: int, folder: Path) -> None:
    os.setpgid(0, 0)
    print_into(folder / f"log-{rank}", 1, 2)
    os.environ.update(
        rank_variables(rank, case.world, port),
        SHARDWISE_CONFIG=json.dumps(case.config(folder)),
        TMPDIR=str(folder / "tmp"),
    )
    tempfile.tempdir = None  # ask TMPDIR again
    # Registered before the run is joined, so it is called after what the run does at the end.
    atexit.register(say_threads)


def say_threads() -> None:
    """Which threads are left. One that was joined may still be on its way out of the kernel; one that waits for work stays."""
    deadline, names = time.monotonic() + 1.0, threads()
    while len(names) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
        names = threads()
    print(f"threads: {json.dumps(names)}", flush=True)


def threads() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found.append((task / "comm").read_text().strip())
        except OSError:
            continue
    return sorted(found)


def wait_for(pids: list[int]) -> list[int | None]:
    """Exit codes; None for a rank that did not end in time, which is killed."""
    deadline, codes = time.monotonic() + WITHIN_S, dict.fromkeys(pids, None)
    waiting = list(pids)
    while waiting:
        for pid in list(waiting):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                waiting.remove(pid)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                waiting.remove(pid)
        time.sleep(0.003)
    return [codes[pid] for pid in pids]


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("log-*")))


def left_over(pids: list[int], folder: Path, shared: set[str]) -> list[str]:
    """What ranks that have ended left: processes, files, shared memory, threads that outlived the script."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) in pids and fields[0] != "Z":
            found.append(f"process {stat.parent.name}")
    # Other processes of this machine have theirs there too; torch's carry the process id.
    found += [
        f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared if any(str(pid) in name for pid in pids)
    ]
    for place in ("tmp", "nvme"):
        # torch's cache of compiled code is for the next run.
        names = os.listdir(folder / place) if (folder / place).exists() else []
        found += [f"{place}/{name}" for name in names if not name.startswith("torchinductor_")]
    for state in [*folder.glob("state-*"), *folder.glob(".staging-*")]:
        if not (state / "manifest.json").exists():
            found.append(f"a save that is not complete: {state.name}")
        shutil.rmtree(state)
    log = logs(folder)
    for line in log.splitlines():
        if line.startswith("threads: ") and len(json.loads(line[9:])) > 1:
            found.append(line)
    if "terminate called" in log or "Fatal Python error" in log:
        found.append("an abort")
    return found


def _run(case: Case, folder: Path) -> dict[str, Any] | None:
    """Run a case to its end; None in a rank, which goes on as the script."""
    tally: Counter[str] = Counter()
    problems: list[str] = []
    for _ in range(case.count):
        (folder / "tmp").mkdir(exist_ok=True)
        shared, port, pids = set(os.listdir("/dev/shm")), free_port(), []
        for rank in range(case.world):
            pid = os.fork()
            if pid == 0:
                be_rank(case, rank, port, folder)
                return None
            pids.append(pid)
        codes = wait_for(pids)
        tally[", ".join(map(str, codes))] += 1
        wrong = [] if codes == case.codes else [f"exit codes {codes}"]
        if case.saves and not list(folder.glob("state-*")):
            wrong.append("nothing was saved")
        wrong += left_over(pids, folder, shared)
        if wrong:
            problems.append(f"{wrong}: {logs(folder)[-1500:]}")
    return {"codes": dict(tally), "problems": problems[:5], "failed": len(problems)}


def main() -> Case | None:
    """Run all cases; in a rank, its case."""
    folder = Path(sys.argv[2])
    gc.collect()
    gc.freeze()  # a child that ends looks only at what it made itself
    for values in json.loads(sys.argv[1]):
        case = Case(**values)
        result = _run(case, folder)
        if result is None:
            return case
        print(json.dumps({**values, **result}), flush=True)
    return None


def fill_the_disk(case: Case, rank: int) -> contextlib.AbstractContextManager[None]:
    """Once the interpreter waits for its threads there is no room any more, for the last rank. As long as it is held."""
    from shardwise.files import disk

    def full(operation: str, path: Path) -> None:
        if operation == "write" and path.suffix == ".safetensors" and rank == case.world - 1:
            if case.way != "heard":
                threading.main_thread().join()
            if case.way == "killed":
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")

    return disk.watched(full)


class Broken:
    """A tracker that takes nothing."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        raise ConnectionError("nobody takes numbers any more")


def write_when_the_script_has_ended(rank: int) -> None:
    """Have what is saved written as if it were large, when the interpreter waits for its threads; by rank 1's own."""
    from shardwise.checkpoint import snapshot

    plain = snapshot.write_apart

    def write_apart(*asked: Any) -> Any:
        threading.main_thread().join()
        if rank == 1:
            raise snapshot.NoProcessError("none is wanted")
        return plain(*asked)

    snapshot._SEVERAL_NBYTES = 0
    snapshot.write_apart = write_apart


if __name__ == "__main__":
    import torch
    import torch._dynamo  # the script's first optimizer would
    import torch.distributed

    torch.set_num_threads(1)
    from shardwise import Accelerator
    from shardwise.errors import CheckpointError

    CASE = main()
    if CASE is None:
        sys.exit()
    # The shortest script, from here on.
    accelerator = Accelerator()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.randn(2, 8)).sum())
    optimizer.step()
    optimizer.zero_grad()
    if CASE.farewell:
        accelerator.end_training()
    if CASE.end == "lost":
        if accelerator.process_index == 1:
            os._exit(9)
        accelerator._ranks.gather_objects("is anybody there?")
    if CASE.end == "vote":
        time.sleep(0.4 * accelerator.process_index)
        accelerator._ranks.any_of([accelerator.process_index == 0])
    if CASE.end == "large save":
        write_when_the_script_has_ended(accelerator.process_index)
    if CASE.saves:
        accelerator.save_state(Path(sys.argv[2]) / f"state-{os.environ['MASTER_PORT']}", async_=True)
    if CASE.fails:
        filled = fill_the_disk(CASE, accelerator.process_index)
        filled.__enter__()
        accelerator.save_state(Path(sys.argv[2]) / f"state-{os.environ['MASTER_PORT']}", async_=True)
    if CASE.way == "heard":
        with contextlib.suppress(CheckpointError):
            accelerator.finish_saving()
    if CASE.end == "broken tracker":
        for _ in accelerator.watch([0], bar=False):
            accelerator.backward(model(torch.randn(2, 8)).sum())
            optimizer.step()
        accelerator.trackers.append(Broken())
    if CASE.way == "raise":
        raise ValueError("the script's own")
    if CASE.way.startswith("exit"):
        sys.exit(int(CASE.way[5:]))
    if CASE.way.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, CASE.way))
