"""What a process of `launch --as-deepspeed` runs in place of `cli/worker.py`: the same, and `import deepspeed` finds shardwise.

It is started by its path too, and imports the standard library only until the process is set up: `shardwise.compat` is loaded
after that, just before the script. Nobody else knows, so no process that the script starts is touched.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

_WORKER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli", "worker.py")


def main() -> None:
    """`worker.py [-m] script args...`"""
    # Until the script's folder takes that place, no module of this folder stands for one of its name.
    if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
        sys.path[0] = os.path.dirname(_WORKER)
    _worker().main(_prepare)


def _worker() -> ModuleType:
    """`cli/worker.py`, under its own name."""
    name = "shardwise.cli.worker"
    spec = importlib.util.spec_from_file_location(name, _WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _prepare() -> None:
    from shardwise.compat import as_deepspeed

    as_deepspeed()


if __name__ == "__main__":
    main()
