"""Programs written for DeepSpeed, on shardwise: in a process that asks for it, `import deepspeed` finds `shardwise.compat`.

    shardwise launch --as-deepspeed train.py     in its workers
    python -m shardwise.compat train.py          under torchrun, accelerate launch, or alone
    shardwise.compat.as_deepspeed()              at the top of a script

Nothing is installed, and no other process sees any of it. docs/design/deepspeed.md says what is answered, and what is
different.
"""

from __future__ import annotations

from .finder import as_deepspeed

__all__ = ["as_deepspeed"]
