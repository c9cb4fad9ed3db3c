"""`shardwise plan`: every plan of a model on a machine, its bytes, its time and what bounds it; and the fastest one's YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config.machine import gpu_names, visible_gpus
from ..config.offloads import directories_of
from ..config.resolve import resolve
from ..config.schema import Config
from ..config.yaml_file import write_yaml
from ..errors import ConfigError
from ..estimate.kept_terms import store
from ..estimate.named import named
from ..estimate.terms import as_values
from .model_flags import Asked
from .model_run import gpu_room, model_of, run_of
from .plan_machine import Described, MachineAsked, described, terms_file, tokens_of
from .planning import planner_of, settings_of, ways_of

if TYPE_CHECKING:
    from ..estimate.bytes import Choice, Run
    from ..estimate.plans import Planned, Planner

LENGTH = "2048"
_BOUNDS = {
    "products": "matrix products",
    "kernels": "GPU memory",
    "host": "launches by the host",
    "gathers": "gathers",
    "reductions": "reductions",
    "link": "link to the host",
    "drive": "drive",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Wanted:
    """What is asked for besides model, settings and machine. tokens: of a whole run. write: a file for the fastest plan."""

    tokens: str | None = None
    write: str | None = None
    as_json: bool = False


def run_measure(settings: Mapping[str, str | bool], config_file: str | None, on: MachineAsked) -> None:
    """Measure this machine's terms and keep them. Raises ConfigError where there is nothing to measure, or another is meant."""
    if on.described:
        raise ConfigError("--measure: measures this machine; leave --gpus, --gpu and --gpu_memory out")
    config = resolve(settings, config_file).config
    gpus = 0 if config.use_cpu else visible_gpus(config.gpu_ids) or 0
    folder = _nvme_path(config)
    if not gpus and folder is None:
        raise ConfigError("nothing to measure: no GPU here, and no --offload_optimizer_nvme_path DIR for a drive")
    from ..estimate.measuring import measured

    found = measured(gpus, folder)
    store(terms_file(), gpu_names(), found)
    for name, value in found.items():
        print(f"  {name:<16}{value:>12.4g}")
    print(f"terms written to {terms_file()}; `shardwise plan` takes them on this machine")


def run_plan(
    model: str,
    settings: Mapping[str, str | bool],
    asked: Asked,
    on: MachineAsked,
    wanted: Wanted,
    config_file: str | None = None,
) -> None:
    """Print the table, and write the fastest plan. Raises ConfigError for a wrong flag, or a model that cannot be built."""
    config = resolve(settings, config_file).config
    if config.use_cpu:
        raise ConfigError("--use_cpu: times are modelled for GPUs; `shardwise estimate` has the bytes of a run on CPUs")
    asked = replace(asked, sequence_length=asked.sequence_length or LENGTH)
    asked.check()
    tokens = tokens_of(wanted.tokens)
    place = described(on, config.gpu_ids, _nvme_path(config))
    if config.mixed_precision == "no" and "mixed_precision" not in settings and config_file is None:
        config = config.model_copy(update={"mixed_precision": "bf16"})
    place = replace(place, gpu_nbytes=gpu_room(config, place.gpu_nbytes) or place.gpu_nbytes)
    if config.num_processes is None:
        config = config.model_copy(update={"num_processes": place.gpus * config.num_machines})

    meta = model_of(model, asked)  # from here on it takes seconds: torch is imported
    from ..estimate.recommending import fastest
    from ..estimate.steppers import steppers_of, uncompiled

    run = run_of(config, asked, place.gpus)
    stepped = named(asked.optimizer, asked.optimizer_args)
    with uncompiled(stepped):
        run = replace(run, steppers=steppers_of(meta, stepped))
        planner = planner_of(model, meta, asked, config, run, place.terms)
        found = planner.plans(place.machine(), _choices(settings, place), **ways_of(settings, asked, config))
    best = fastest(found)
    # Of plans that take the same time the one that is taken comes first.
    found.sort(key=lambda one: (one is not best, not one.fits, one.time.total or float("inf")))
    if wanted.as_json:
        print(json.dumps(_as_values(model, run, place, found, config, tokens), indent=1))
    else:
        print("\n".join(_text(model, meta, run, place, found, config, tokens, planner)))
    if wanted.write is not None:
        if best is None:
            raise ConfigError(
                f"{wanted.write}: not written, for no plan fits: more GPUs, a shorter sequence, LoRA or a smaller batch"
            )
        write_yaml(_written(best, settings, config_file, config, place), wanted.write)
        if not wanted.as_json:
            print(f"\n{best}: written to {wanted.write}")
            print(f"next: shardwise launch --config_file {wanted.write} SCRIPT")


def _nvme_path(config: Config) -> str | None:
    zero = config.zero
    return next(iter(directories_of(zero.offload_optimizer_nvme_path or zero.offload_param_nvme_path)), None)


def _choices(settings: Mapping[str, str | bool], place: Described) -> list[Choice]:
    """Those that the flags leave open, and for which there is a drive."""
    from ..estimate.bytes import CHOICES

    said = {name: str(settings[name]) for name in settings}
    names = {"zero_stage": "stage", "offload_optimizer_device": "optimizer", "offload_param_device": "param"}
    found = [
        choice
        for choice in CHOICES
        if all(str(getattr(choice, of)) == said.get(name, str(getattr(choice, of))) for name, of in names.items())
    ]
    if not found:
        given = ", ".join(f"--{name} {said[name]}" for name in names if name in said)
        raise ConfigError(f"{given}: there is no such plan; parameters are offloaded with stage 3, with the optimizer")
    near = [choice for choice in found if not choice.on_disk]
    if place.nvme_path is None and not near:
        raise ConfigError("a plan on a drive needs one: --nvme SIZE, or --offload_optimizer_nvme_path DIR")
    return near if place.nvme_path is None else found


def _written(
    best: Planned, settings: Mapping[str, str | bool], config_file: str | None, config: Config, place: Described
) -> Config:
    """The settings of a run under this plan, over those that were given."""
    of_the_run = {"mixed_precision": config.mixed_precision, "num_processes": config.num_processes}
    planned = settings_of(best, config, place.nvme_path)
    return resolve({**settings, "distributed_type": "DEEPSPEED", **of_the_run, **planned}, config_file).config


def _tokens_a_step(run: Run, config: Config) -> int:
    assert run.batch is not None
    return run.batch.tokens * run.world_size * config.gradient_accumulation_steps


def _text(
    model: str,
    meta: Any,
    run: Run,
    place: Described,
    found: Sequence[Planned],
    config: Config,
    tokens: float | None,
    planner: Planner,
) -> list[str]:
    from ..estimate.bytes import size

    assert run.batch is not None
    total = sum(p.numel() for p in meta.parameters())
    trained = sum(p.numel() for p in meta.parameters() if p.requires_grad)
    each = _tokens_a_step(run, config)
    known = [("a GPU", place.gpu_nbytes), ("host", place.host_nbytes), ("drive", place.disk_nbytes)]
    sizes = ", ".join(f"{name} {size(count)}" for name, count in known if count is not None)
    lines = [
        f"{model}: {total:,} parameters, {trained:,} of them trained; mixed precision {config.mixed_precision}",
        f"{run.world_size} GPUs, {run.local_processes} to a machine; {sizes}",
        f"{run.batch.rows} x {run.batch.length} tokens a GPU at a time, {each:,} a step; {_rates(place)}",
        *(f"note: {note}" for note in place.notes),
    ]
    if planner.arithmetic_alone is not None:
        lines.append(
            f"note: the model does not run without numbers ({planner.arithmetic_alone}): times are arithmetic alone, too short"
        )
    head = f"{'GPU':>10}{'host':>10}{'disk':>10}{'step s':>9}{'tokens/s':>10}" + ("hours".rjust(9) if tokens else "")
    lines += ["", f"  {'plan, bytes of one GPU and its host':<46}{head}  bound by"]
    for one in found:
        if one.estimate.refused is not None:
            lines.append(f"  {one.choice!s:<46}  refused: {one.estimate.refused}")
            continue
        name = str(one)
        columns = "".join(f"{size(value) if value else '-':>10}" for value in _media(one))
        rate = each / one.time.total
        hours = f"{tokens / rate / 3600:>9,.1f}" if tokens else ""
        ends = _BOUNDS[one.time.bound] if one.fits else f"does not fit: {'; '.join(one.shortages)}"
        lead = [f"  {name}", " " * 48] if len(name) > 46 else [f"  {name:<46}"]
        lines += lead[:-1]
        lines.append(f"{lead[-1]}{columns}{one.time.total:>9.3f}{rate:>10,.0f}{hours}  {ends}")
    return lines


def _rates(place: Described) -> str:
    """The terms that matter most, in words."""
    terms = place.terms
    return f"products {terms.matrix / 1e12:.0f} TFLOP/s, memory {terms.memory / 1e12:.2f} TB/s, link {terms.up / 1e9:.0f} GB/s"


def _media(one: Planned) -> list[int]:
    return [one.estimate.taken("GPU"), one.estimate.taken("host"), one.estimate.taken("disk")]


def _as_values(
    model: str, run: Run, place: Described, found: Sequence[Planned], config: Config, tokens: float | None
) -> dict[str, Any]:
    each = _tokens_a_step(run, config)
    plans = []
    for one in found:
        values: dict[str, Any] = {
            "zero_stage": one.choice.stage,
            "offload_optimizer_device": one.choice.optimizer,
            "offload_param_device": one.choice.param,
            "recompute": one.way.recompute,
            "compile": one.way.compiled,
            "budget_keeps": round(one.way.kept, 4),
            "shortages": list(one.shortages),
        }
        if one.estimate.refused is None:
            rate = each / one.time.total
            values["bytes"] = dict(zip(("GPU", "host", "disk"), _media(one), strict=True))
            values["step_s"] = round(one.time.total, 6)
            values["parts_s"] = {name: round(value, 6) for name, value in one.time.parts.items()}
            values["bound"] = one.time.bound
            values["tokens_per_s"] = round(rate, 2)
            values["hours"] = round(tokens / rate / 3600, 4) if tokens else None
        plans.append(values)
    return {
        "model": model,
        "num_processes": run.world_size,
        "tokens_per_step": each,
        "terms": as_values(place.terms),
        "notes": list(place.notes),
        "plans": plans,
    }
