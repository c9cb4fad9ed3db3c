"""Settings of a whole process: one that a test leaves changed decides about tests that run behind it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def process_settings() -> dict[str, Any]:
    """Each by the name of the function that sets it."""
    logger = logging.getLogger("shardwise")
    return {
        "torch.compiler.set_stance": _stance(),
        "torch.set_default_dtype": torch.get_default_dtype(),
        "torch.set_default_device": torch.get_default_device(),
        "torch.set_grad_enabled": torch.is_grad_enabled(),
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "torch.set_num_threads": torch.get_num_threads(),
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.set_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.autograd.set_detect_anomaly": torch.is_anomaly_enabled(),
        "torch.autograd.set_multithreading_enabled": torch.autograd.is_multithreading_enabled(),
        "torch.nn.modules.module.register_module_...": torch.nn.modules.module._has_any_global_hook(),
        "addHandler of shardwise's logger": list(logger.handlers),
        "setLevel of shardwise's logger": logger.level,
    }


@contextmanager
def settled() -> Iterator[None]:
    """What runs inside gives the process's settings back, or AssertionError names each that it leaves changed."""
    before = process_settings()
    yield
    left = [f"{name} ({before[name]} -> {now})" for name, now in process_settings().items() if now != before[name]]
    assert not left, f"a test leaves settings of its process changed: {', '.join(left)}"


def _stance() -> str:
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # to import it takes a second
    stance: str = "default" if compiler is None else compiler._stance.stance
    return stance
