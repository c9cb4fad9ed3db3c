"""Which states of an optimizer rest as codes under `optimizer_state_dtype`, and where a state rests.

Codes are for moments: averages that a step moves a little. A state of another name may be anything, as the copy of a weight
(`z` of schedule-free optimizers) or a step size, so it rests as it is, and that is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..offload.coded import CodedSlab
from ..offload.codes import Coding
from ..offload.store import Slab
from ..plan.plan import Tier
from ..zero.engine import Engine

log = logging.getLogger("shardwise")

# Averages of gradients, of any sign: of torch's optimizers, and of those that use the same names.
FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "exp_avg_diff"})
# Averages, sums and maxima of squares or magnitudes: never negative.
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "variance"})


def is_moment(state: str, dtype: torch.dtype) -> bool:
    """Whether a state of that name may rest as codes."""
    return dtype == torch.float32 and state in FIRST | SECOND


def rests_as(engine: Engine, state: str, dtype: torch.dtype) -> Coding | None:
    """How a state of that name rests off the device; None: as it is."""
    if engine.state_dtype == "fp32" or not is_moment(state, dtype):
        return None
    return Coding(engine.state_dtype, state in SECOND)


def resting_slab(
    engine: Engine, tier: Tier, state: str, numel: int, dtype: torch.dtype, name: str, *, tells: bool
) -> Slab:
    """Room for `numel` elements of a state.

    name: what errors and files call it. tells: whether this rank says what is not coded.
    """
    store, coding = engine.stores.of(tier, "optimizer"), rests_as(engine, state, dtype)
    if coding is not None:
        return CodedSlab(store, numel, coding, name)
    if tells and engine.state_dtype != "fp32" and state not in engine.told:
        engine.told.add(state)
        why = "is no moment that is known" if dtype == torch.float32 else f"is of {str(dtype).removeprefix('torch.')}"
        log.warning("optimizer_state_dtype: the state %s %s, and rests as it is.", state, why)
    return store.allocate(numel, dtype, name)


def counted(states: Iterable[Mapping[str, Any]], device: torch.device) -> Tensor:
    """() int32 on `device`, another one at each step: the sum of the states' counts. The host waits for nothing."""
    counts = [state["step"] for state in states if "step" in state]
    there = [count for count in counts if isinstance(count, Tensor) and count.device.type != "cpu"]
    here = sum(int(count) for count in counts if not isinstance(count, Tensor) or count.device.type == "cpu")
    found = torch.full((), here % (1 << 30), dtype=torch.int32, device=device)
    return found if not there else found + torch.stack([c.reshape(()) for c in there]).sum().to(device, torch.int32)
