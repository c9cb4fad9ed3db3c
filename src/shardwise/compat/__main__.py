"""`python -m shardwise.compat [-m] SCRIPT ARGS...`: run a script in which `import deepspeed` finds shardwise.

The process becomes the one that `shardwise launch --as-deepspeed` starts for each rank: the script is `__main__`, with its own
`sys.argv` and `sys.path`, and this module's code is gone. What a launcher put into the environment stays.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..cli import worker


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m shardwise.compat [-m] SCRIPT [ARGS]...")
    os.environ[worker.AS_DEEPSPEED] = "1"
    begin = sys.orig_argv.index("-m")
    sys.stdout.flush()
    sys.stderr.flush()
    started = str(Path(__file__).with_name("worker.py"))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:begin], started, *sys.argv[1:]])


if __name__ == "__main__":
    main()
