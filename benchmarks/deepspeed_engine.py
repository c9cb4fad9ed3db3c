"""DeepSpeed as its documentation recommends it: the one place of the benchmarks that imports it.

bf16 with fp32 masters; `overlap_comm` and `contiguous_gradients` on; bucket sizes and the thresholds of stage 3 at their
defaults; no clipping, as for every other engine. The optimizer is torch's fused AdamW, as for every other engine, also where
it is offloaded: DeepSpeed's own CPU Adam needs a compiler, and torch's fused one is as fast. With `compile_backend` stage 3
is compiled through `engine.compile`, since its hooks sit on every linear layer; stages 1 and 2 have no such hooks, and their
blocks are compiled one by one.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def available() -> bool:
    """Whether DeepSpeed is installed. It is not imported."""
    return find_spec("deepspeed") is not None


def configuration(
    stage: int,
    offloaded: Collection[str],
    rows: int,
    *,
    clipping: float = 0.0,
    bf16: bool = True,
    accumulate: int = 1,
) -> dict[str, Any]:
    """The JSON of one run.

    offloaded: of "opt" and "param". rows: sequences of one rank and step. clipping: the global norm; 0 does not clip.
    accumulate: batches of a step.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    for option, name in (("opt", "offload_optimizer"), ("param", "offload_param")):
        if option in offloaded:
            zero[name] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clipping,  # DeepSpeed clips at 1.0 where this is absent
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    stage: int,
    offloaded: Collection[str],
    *,
    rows: int,
    compile_backend: str | None,
    rate: float,
) -> Any:
    """A DeepSpeed engine around `model`: called with a batch; `backward(loss)` and `step()`.

    optimizer: None for DeepSpeed's own Muon at `rate`, which tells matrices from the rest itself.
    Raises ValueError if the package is not installed.
    """
    if not available():
        raise ValueError("deepspeed is not installed: pip install deepspeed, or leave its engines out")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    config = configuration(stage, offloaded, rows)
    if optimizer is None:
        config["optimizer"] = {"type": "Muon", "params": {"lr": rate, "momentum": 0.95}}
        config["zero_optimization"]["reduce_scatter"] = False  # its Muon needs whole gradients
    settings = {"optimizer": optimizer} if optimizer is not None else {"model_parameters": list(model.parameters())}
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False, **settings)
    if compile_backend is not None:
        engine.compile(backend=compile_backend)
    return engine
