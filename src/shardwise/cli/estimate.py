"""`shardwise estimate`: what a model needs under a plan and under every other one, before anything is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config.offloads import MEDIA
from ..config.resolve import resolve
from ..estimate.named import named
from .model_flags import Asked
from .model_run import machine_of, model_of, run_of
from .planning import recommendation

if TYPE_CHECKING:
    from ..estimate.bytes import Estimate, Machine, Run
    from ..estimate.plans import Planned


def run_estimate(
    model: str,
    settings: Mapping[str, str | bool],
    asked: Asked,
    *,
    config_file: str | None = None,
    as_json: bool = False,
) -> None:
    """Print the estimate. Raises ConfigError for a wrong setting, or a model that cannot be built."""
    config = resolve(settings, config_file).config
    asked.check()
    built = model_of(model, asked)  # from here on it takes seconds: torch is imported
    from ..estimate.bytes import Choice, estimate, estimates
    from ..estimate.steppers import steppers_of, uncompiled

    zero = config.zero
    machine = machine_of(config)
    run = run_of(config, asked, machine.gpus)
    wanted = named(asked.optimizer, asked.optimizer_args)
    with uncompiled(wanted):
        run = replace(run, steppers=steppers_of(built, wanted))
        choice = Choice(zero.zero_stage, zero.offload_optimizer_device, zero.offload_param_device)
        chosen, every = estimate(built, choice, run), estimates(built, run)
        best = recommendation(model, built, asked, settings, config, run, machine)
    total, trained = _counts(built)
    if as_json:
        facts = {
            "model": model,
            "class": type(built).__name__,
            "parameters": total,
            "trained": trained,
            "num_processes": run.world_size,
            "shard_group": run.shards,
            "optimizer_shard_group": run.world_size if run.all_own else run.shards,
            "mixed_precision": config.mixed_precision,
            "quantize": asked.quantize,
            "plan": {**chosen.as_values(), "shortages": machine.shortages(chosen, run)},
            "disks": {disk.name: {"free": disk.free_nbytes, "taken": disk.taken(chosen)} for disk in machine.disks},
            "recommended": None if best is None else _recommended(best),
            "plans": [{**found.as_values(), "shortages": machine.shortages(found, run)} for found in every],
        }
        print(json.dumps(facts, indent=1))
        return
    print(f"{model}: {total:,} parameters, {trained:,} of them trained; mixed precision {config.mixed_precision}")
    groups = f", {run.world_size // run.shards} copies of {run.shards} ranks" if run.shards < run.world_size else ""
    if groups and run.all_own:
        groups += " (at stage 3: weights alone; gradients and states over all)"
    place = f"{run.world_size} process(es), {run.local_processes} on this machine{groups}"
    print(f"{place}; {steppers_text(chosen, run)}; {_batch_text(built, run)}")
    if asked.quantize:
        print(f"the frozen linear weights in {asked.quantize}: codes and scales as an estimate of what libraries keep")
    print("\n".join(["", *rows_of(chosen), *disks_of(chosen, machine), "", *table(every, machine, run)]))
    step = "" if best is None or not best.time.total else f"; a step of about {best.time.total:.3f} s"
    print(
        "\n".join([f"recommended: {best or 'none of these fits this machine'}{step}", *_elsewhere(model, machine, run)])
    )


def _elsewhere(model: str, machine: Machine, run: Run) -> list[str]:
    """What counts for a machine that has GPUs, where this one has none."""
    if not run.cuda or machine.gpus:
        return []
    words = f"shardwise plan {shlex.quote(model)} --gpus {run.world_size} --gpu H100"
    return [f"for a machine that has GPUs: {words}; for a run without: --use_cpu"]


def _recommended(best: Planned) -> dict[str, Any]:
    way, seconds = best.way, best.time.total
    does = {"recomputes": way.recompute, "compiles": way.compiled, "budget_keeps": round(way.kept, 4)}
    return {**best.estimate.as_values(), **does, "step_s": round(seconds, 6) or None}


def rows_of(found: Estimate) -> list[str]:
    """One plan: a line for each kind of bytes, a column for each tier."""
    from ..estimate.bytes import AT_REST, PASSING, size

    lines = [f"{found.choice}, bytes of one rank{_which(found)}", f"  {'':<18}{'GPU':>10}{'host':>10}{'disk':>10}"]

    def line(name: str, values: list[int]) -> str:
        return f"  {name:<18}" + "".join(f"{size(value) if value else '-':>10}" for value in values)

    for rows, name, all_of in ((AT_REST, "at rest", AT_REST), (PASSING, "at the peak", (*AT_REST, *PASSING))):
        for row in rows:
            values = [found.taken(medium, [row]) for medium in MEDIA]
            if any(values):
                lines.append(line(row, values))
        lines.append(line(f"= {name}", [found.taken(medium, all_of) for medium in MEDIA]))
    lines.append(f"  layout: buffers padded by {_percent(found.padding)}{_spread(found)}")
    return lines


def _which(found: Estimate) -> str:
    return "" if found.operations is None else ", the one with most states"


def _spread(found: Estimate) -> str:
    """How evenly whole parameters lie, where each is one rank's."""
    if found.operations is None:
        return ""
    return f"; whole parameters: states of the fullest rank {found.imbalance:.3f} x the mean, work {found.operations:.3f} x"


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{100 * share:.2g}%"


def disks_of(found: Estimate, machine: Machine) -> list[str]:
    """One plan: a line for each disk, where there are several."""
    from ..estimate.bytes import size

    if len(machine.disks) < 2:
        return []
    return [f"  on {disk.name}: {size(disk.taken(found))}" for disk in machine.disks if disk.taken(found)]


def table(every: list[Estimate], machine: Machine, run: Run) -> list[str]:
    """Every plan: a line each, with whether it fits this machine."""
    from ..estimate.bytes import size
    from ..plan.plan import Tier

    what = f"{machine.gpus} GPU(s)" if run.cuda and machine.gpus else "no GPU"
    known = [("a GPU", machine.gpu_nbytes if run.cuda else None), ("host", machine.host_nbytes)]
    several = len(machine.disks) > 1
    known += [(f"free on {disk.name}" if several else "free disk", disk.free_nbytes) for disk in machine.disks]
    sizes = ", ".join(f"{name} {size(count)}" for name, count in known if count is not None)
    head = f"  {'plan':<46}{'GPU rest':>10}{'GPU peak':>10}{'host':>10}{'disk':>10}  fits"
    refusals = list(dict.fromkeys(found.refused for found in every if found.refused is not None))
    lines = [f"every plan, bytes of one rank; this machine has {what}" + (f"; {sizes}" if sizes else ""), head]
    for found in every:
        values = [found.rest(Tier.GPU), *(found.taken(medium) for medium in MEDIA)]
        short = machine.shortages(found, run)
        if found.refused is not None:
            short = [f"refused [{refusals.index(found.refused) + 1}]"]
        sizes = "".join(f"{size(value) if value else '-':>10}" for value in values)
        lines.append(f"  {found.choice!s:<46}{sizes}  {'no: ' + '; '.join(short) if short else 'yes'}")
    return lines + [f"  [{number}] {text}" for number, text in enumerate(refusals, 1)]


def steppers_text(found: Estimate, run: Run) -> str:
    """Which optimizers there are, and how each is stepped where that is not in shards."""
    said = {stepper.name: stepper.said for stepper in run.steppers or ()}
    parts = []
    for name, how in found.how:
        notes = [note for note in (said.get(name, ""), how if how != "in shards" else "") if note]
        parts.append(name + (f" ({', '.join(notes)})" if notes else ""))
    return " and ".join(parts) or "nothing is trained"


def _counts(model: Any) -> tuple[int, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _batch_text(model: Any, run: Run) -> str:
    from ..estimate.activations import decoder_shape

    if run.batch is None:
        return "without activations (give --sequence_length)"
    if decoder_shape(model) is None:
        return "without activations: the formula is for decoder transformers"
    text = f"activations of {run.batch.rows} x {run.batch.length} tokens"
    return text + (" with checkpointing" if run.batch.checkpointing else "")
