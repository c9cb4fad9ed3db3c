"""In what an optimizer's moments rest off the device, in bytes: `optimizer_state_dtype`. Pure arithmetic.

    fp32   4 bytes a number
    bf16   2
    int8   1, and 4 for the scale of each block of 256; the last block of a rank's region may be shorter

What becomes of the numbers is in `offload/codes.py`, and why in docs/design/offload.md.
"""

from __future__ import annotations

import math
from typing import Literal

from .compressed import BLOCK, CHUNK

StateDtype = Literal["fp32", "bf16", "int8"]

# Numbers that are coded at one time: they bound the memory that this takes beside them. Fewer would be more kernels than a host
# can enqueue while the link brings them.
PIECE = CHUNK
# For each of them: the number divided by its scale, its noise, and what makes that.
_SCRATCH_NBYTES = 28


def state_nbytes(numel: int, state_dtype: StateDtype) -> int:
    """What `numel` fp32 numbers of one state take at rest."""
    if state_dtype == "int8":
        return numel + 4 * math.ceil(numel / BLOCK)
    return numel * (2 if state_dtype == "bf16" else 4)


def scratch_nbytes(numel: int, state_dtype: StateDtype) -> int:
    """What coding `numel` numbers takes on the device for its duration, beside numbers and codes."""
    return 0 if state_dtype == "fp32" else _SCRATCH_NBYTES * min(numel, PIECE)
