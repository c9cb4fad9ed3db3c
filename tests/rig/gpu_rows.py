"""The rows of a worker of tests/gpu, which two processes run on two GPUs, or on one that they share."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from rig.one_gpu import command


def rows_of(worker: Path, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """What it writes as JSON. It must end well, within so many seconds."""
    rows = folder / "rows.json"
    done = subprocess.run(
        [*command(worker), "--json", str(rows)], capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found
