"""`shardwise estimate`: what a model needs under a plan and under every other one, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config.machine import (
    file_system,
    free_disk_bytes,
    gpu_memory_bytes,
    usable_memory_bytes,
    visible_gpus,
)
from ..config.offloads import MEDIA, Offloaded, directories_of
from ..config.resolve import resolve
from ..config.schema import Config
from ..errors import ConfigError
from ..estimate.named import named
from .model_flags import Asked, count_of

if TYPE_CHECKING:
    from ..estimate.bytes import Disk, Estimate, Machine, Run

# What of an estimate lies in the directories of a setting.
_ROLES: dict[Offloaded, tuple[str, ...]] = {"optimizer": ("optimizer",), "param": ("frozen", "parameter")}


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

    # From here on it takes seconds: torch is imported.
    from ..estimate.bytes import Choice, estimate, estimates
    from ..estimate.recommending import recommended
    from ..estimate.steppers import steppers_of, uncompiled

    built = model_of(model, asked)
    zero = config.zero
    machine = machine_of(config)
    run = run_of(config, asked, machine.gpus)
    wanted = named(asked.optimizer, asked.optimizer_args)
    with uncompiled(wanted):
        run = replace(run, steppers=steppers_of(built, wanted))
        choice = Choice(zero.zero_stage, zero.offload_optimizer_device, zero.offload_param_device)
        chosen, every = estimate(built, choice, run), estimates(built, run)
        best = recommended(built, run, machine)
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
            "recommended": None if best is None else {**best.found.as_values(), "recomputes": best.recomputes},
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
    print(f"recommended: {best or 'none of these fits this machine'}")


def machine_of(config: Config) -> Machine:
    """This machine, as far as it can be told, with the GPUs that the run may use."""
    from ..estimate.bytes import Machine

    gpus = 0 if config.use_cpu else visible_gpus(config.gpu_ids) or 0
    return Machine(gpus, gpu_memory_bytes(), usable_memory_bytes(), _disks(config))


def model_of(model: str, asked: Asked) -> Any:
    """The model without memory, with what the flags do to it."""
    from ..estimate.meta_model import Adapters, build_meta_model

    rank = count_of("--lora_r", asked.lora_r)
    adapters = None
    if rank is not None:
        adapters = Adapters(rank, _names(asked.target_modules), _names(asked.modules_to_save))
    return build_meta_model(model, dtype=asked.dtype, adapters=adapters, quantize=asked.quantize)


def run_of(config: Config, asked: Asked, gpus: int) -> Run:
    """What the bytes depend on besides the model and its plan. gpus: of this machine."""
    from ..estimate.activations import Batch
    from ..estimate.bytes import Run
    from ..plan.precision import Precision

    engine, length = config.engine, count_of("--sequence_length", asked.sequence_length)
    world_size = config.num_processes or max(1, gpus) * config.num_machines
    local_processes = -(-world_size // config.num_machines)
    said = config.zero.shard_group
    group = said if isinstance(said, int) else local_processes if said == "machine" else world_size
    if world_size % group:
        raise ConfigError(f"--shard_group: {group} does not divide {world_size} processes; take a number that does")
    batch = None
    if length is not None:
        rows = engine.micro_batch_size or 1
        checkpointing = asked.checkpointing or engine.activation_checkpointing != "none"
        batch = Batch(rows, length, checkpointing, asked.attention, engine.loss_chunk_tokens, engine.loss_keeps_logits)
    return Run(
        world_size=world_size,
        local_processes=local_processes,
        precision=Precision.named(config.mixed_precision, engine.reduce_dtype),
        cuda=not config.use_cpu,
        options=engine,
        accumulates=config.gradient_accumulation_steps > 1,
        batch=batch,
        shard_group=None if group == world_size else group,
        all_own=config.zero.optimizer_shard_group == "world" and group < world_size,
        directories=max(1, sum(len(paths) for paths in set(_paths(config).values()))),
    )


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


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _paths(config: Config) -> dict[Offloaded, tuple[str, ...]]:
    """The directories of what rests on a disk."""
    zero = config.zero
    found: dict[Offloaded, tuple[str, ...]] = {
        "optimizer": directories_of(zero.offload_optimizer_nvme_path),
        "param": directories_of(zero.offload_param_nvme_path),
    }
    return {role: paths for role, paths in found.items() if paths}


def _disks(config: Config) -> list[Disk]:
    """The file systems of these directories, each with its part of the bytes. A role without one lies beside the other."""
    from ..estimate.bytes import Disk

    paths = _paths(config)
    anywhere = next(iter(paths.values()), (".",))
    names: dict[object, list[str]] = {}
    shares: dict[object, dict[str, float]] = {}
    for offloaded, roles in _ROLES.items():
        own = paths.get(offloaded, anywhere)
        for path in own:
            place = file_system(path) or path
            if path not in names.setdefault(place, []):
                names[place].append(path)
            for role in roles:
                there = shares.setdefault(place, {})
                there[role] = there.get(role, 0.0) + 1 / len(own)
    return [Disk(" and ".join(of), free_disk_bytes(of[0]), shares[place]) for place, of in names.items()]
