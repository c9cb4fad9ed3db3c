"""What `plan`, `estimate` and `config` find out alike: which plan of a model a machine should run, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config.offloads import DEVICES
from ..config.schema import Config
from .model_flags import Asked
from .model_run import model_of
from .plan_machine import terms_here

if TYPE_CHECKING:
    from ..estimate.bytes import Machine, Run
    from ..estimate.plans import Planned, Planner
    from ..estimate.terms import Terms


def planner_of(model: str, built: Any, asked: Asked, config: Config, run: Run, terms: Terms) -> Planner:
    """Times and bytes of plans of `model`. built: it without memory, as the flags have it. run: with a batch."""
    from ..estimate.plans import Planner

    shapes = None if asked.quantize is None else model_of(model, replace(asked, quantize=None))
    return Planner(built, run, terms, config.gradient_accumulation_steps, shapes)


def recommendation(
    model: str, built: Any, asked: Asked, settings: Mapping[str, str | bool], config: Config, run: Run, machine: Machine
) -> Planned | None:
    """The plan to take on this machine: the fastest that fits, as `plan` has it; in an order of costs without a GPU or a batch.

    None if none fits.
    """
    from ..estimate.recommending import fastest, first_that_fits

    terms = terms_here(config.gpu_ids) if run.cuda and run.batch is not None else None
    if terms is None or machine.gpu_nbytes is None:
        return first_that_fits(built, run, machine)
    planner = planner_of(model, built, asked, config, run, terms)
    return fastest(planner.plans(machine, **ways_of(settings, asked, config)))


def ways_of(settings: Mapping[str, str | bool], asked: Asked, config: Config) -> dict[str, Any]:
    """What of recomputing, compiling and a budget is open: both, or what a flag or a file says."""
    compiled = [config.compiling is not None]
    if "dynamo_backend" not in settings and config.compiling is None:
        compiled = [False, True]
    said = config.engine.activation_checkpointing
    recompute = [False, True]
    if said == "all" or asked.checkpointing:
        recompute = [True]
    elif said == "none" and "activation_checkpointing" in settings:
        recompute = [False]
    budgets = config.engine.gpu_memory_budget is not None or "gpu_memory_budget" not in settings
    return {"recompute": recompute, "compiled": compiled, "budgets": budgets}


def settings_of(best: Planned, config: Config, nvme_path: str | None) -> dict[str, Any]:
    """The settings that make a run of `config` follow a plan. nvme_path: for what rests on a drive, where none is set."""
    choice, way = best.choice, best.way
    found = {
        "zero_stage": choice.stage,
        "offload_optimizer_device": choice.optimizer,
        "offload_param_device": choice.param,
        # Compiled blocks are recomputed inside of their graph, all of them; of others as few as have to be.
        "activation_checkpointing": ("all" if way.compiled else "auto") if way.recompute else "none",
        "dynamo_backend": "inductor" if way.compiled and config.compiling is None else config.dynamo_backend,
    }
    if way.kept and config.engine.gpu_memory_budget is None:
        found["gpu_memory_budget"] = "auto"
    for role, where in (("optimizer", choice.optimizer), ("param", choice.param)):
        name = f"offload_{role}_nvme_path"
        if DEVICES[where].on_disk and getattr(config.zero, name) is None and nvme_path is not None:
            found[name] = nvme_path
    return found
