"""The rows of a worker of tests/gpu, which two processes run on two GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def rows_of(worker: Path, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """What it writes as JSON. It must end well, within so many seconds."""
    rows = folder / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run([*command, "--json", str(rows)], capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found
