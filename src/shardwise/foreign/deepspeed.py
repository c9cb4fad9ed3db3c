"""A DeepSpeed checkpoint of ZeRO-1, 2 or 3 as a run of ours: each of its ranks' flat partitions becomes a rank's intervals.

    zero_pp_rank_1, group 0, fp32      [ q q k k k . ]        as DeepSpeed flattens, see `partitions.py`
    rank-00001.safetensors             model0/trained/q [4, 6), model0/trained/k [0, 3)

So nothing is put together: an interval is copied from one file to the other, whatever the number of ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.pieces import Piece
from ..errors import CheckpointError
from ..files.documents import printed, shown
from ..files.writer import dtype_name
from .deepspeed_files import DeepSpeedFiles, ModelStates, OptimizerStates, files_of
from .partitions import Cut, cut_each, cut_runs, share_of
from .pickles import Fields, Inert, named_tensors, number_of, with_values
from .run import MODEL, ForeignOptimizer, ForeignRun, can_be_kept, piece, settings_of, whole_piece

# The first version whose loss scale rises one iteration later.
_RISES_LATER = (0, 17, 1)


def read_deepspeed(tag: Path) -> ForeignRun:
    """The run that was saved in the directory of a tag. Raises CheckpointError.

    No tensor's values are read yet: they are mapped from the files.
    """
    files = files_of(tag)
    first = ModelStates.read(files.models[0])
    ranks = [OptimizerStates.read(path) for path in files.optimizers]
    _check_ranks(files, first, ranks)
    run = ForeignRun(f"DeepSpeed {first.version}", [[] for _ in ranks])
    cuts = _cuts(first, ranks, files)
    for rank, (states, cut) in enumerate(zip(ranks, cuts, strict=True)):
        run.pieces[rank] += _trained(states, cut, files.optimizers[rank])
    _add_frozen(run, files, first, ranks[0].stage)
    _add_buffers(run, first)
    run.optimizer = _optimizer(first, ranks[0], run)
    run.scaler = _scaler(ranks[0].content, first.version)
    run.facts = {MODEL: _facts(first)}
    _add_schedule(run, first)
    _add_client_state(run, first)
    return run


def _check_ranks(files: DeepSpeedFiles, first: ModelStates, ranks: Sequence[OptimizerStates]) -> None:
    where = printed(files.folder)
    if len(ranks) != first.world_size:
        raise CheckpointError(
            f"{where} is incomplete, or of two runs: it was saved by {first.world_size} rank(s), and has optimizer states of "
            f"{len(ranks)}."
        )
    stages = {states.stage for states in ranks}
    if len(stages) > 1:
        raise CheckpointError(f"{where} has files of the stages {sorted(stages)}: they are of two runs.")
    if stages == {3} and len(files.models) != len(ranks):
        raise CheckpointError(
            f"{where} is incomplete: at stage 3 there is a *_model_states.pt of each of the {len(ranks)} rank(s), and it has "
            f"{len(files.models)}."
        )
    if stages == {3} and ranks[0].content.count("partition_count") != len(ranks):
        raise CheckpointError(
            f"{where}: weights are cut over fewer ranks than saved them (MiCS), which is not imported."
        )
    counts = [[number_of(state.get("step", 0), states.content.where) for state in states.states] for states in ranks]
    odd = next((rank for rank, found in enumerate(counts) if found != counts[0]), None)
    if odd is not None:
        raise CheckpointError(
            f"{where}: the optimizer of rank {odd} has taken {shown(counts[odd])} steps, that of rank 0 {shown(counts[0])}: "
            "the files are of two runs, or of two times."
        )
    for states in ranks:
        if len(states.masters) != len(first.groups):
            raise CheckpointError(
                f"{states.content.where} has {len(states.masters)} partition(s), where param_shapes lists {len(first.groups)} "
                "group(s): the files are of two runs."
            )


def _cuts(first: ModelStates, ranks: Sequence[OptimizerStates], files: DeepSpeedFiles) -> list[Cut]:
    """Which weights lie where in each rank's partitions, held against what the files say of it themselves."""
    world = len(ranks)
    if ranks[0].stage == 3:
        return [cut_each(first.groups, rank, world) for rank in range(world)]
    alignment = ranks[0].alignment or [[0] * len(group) for group in first.groups]
    if [len(row) for row in alignment] != [len(group) for group in first.groups]:
        raise CheckpointError(
            f"{ranks[0].content.where}: param_alignment_paddings are not those of the weights in param_shapes."
        )
    cuts = [cut_runs(first.groups, rank, world, alignment) for rank in range(world)]
    for states, cut in zip(ranks, cuts, strict=True):
        # Under round_robin_gradients DeepSpeed notes places of another order than the one in which it flattens.
        if states.slices is None or first.round_robin:
            continue
        mine: list[dict[str, tuple[int, int]]] = [{} for _ in first.groups]
        for part in cut.stretches:
            mine[part.group][part.name] = (part.at, part.numel)
        if states.slices != mine:
            raise CheckpointError(
                f"{states.content.where}: param_slice_mappings places weights elsewhere in the partition than param_shapes of "
                f"{printed(files.models[0])} does: the files are of two runs."
            )
    return cuts


def _trained(states: OptimizerStates, cut: Cut, path: Path) -> list[Piece]:
    """One rank's intervals of the fp32 weights and of the optimizer's states."""
    flats: list[dict[str, Tensor]] = []
    for number, (master, kept) in enumerate(zip(states.masters, states.states, strict=True)):
        where = f"{printed(path)}: group {number}"
        found = {"": _flat(master, cut, number, where)}
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.ndim:
                found[_state_name(name, where)] = _flat(value, cut, number, f"{where}: {name}")
            elif name != "step":
                raise CheckpointError(
                    f"{where}: the optimizer's state {shown(name)} is {shown(type(value).__name__)}, which has no element for "
                    "each of the weights: such an optimizer is not imported."
                )
        flats.append(found)
    return [
        piece(
            f"optimizer0/{name}/{MODEL}/{part.name}" if name else f"{MODEL}/trained/{part.name}",
            part.shape,
            part.begin,
            flat[part.at : part.at + part.numel],
            torch.float32,
        )
        for part in cut.stretches
        for name, flat in flats[part.group].items()
    ]


def _flat(value: Any, cut: Cut, number: int, where: str) -> Tensor:
    """A rank's partition: as many elements as it has weights, or more up to its padding."""
    flat = with_values(value, where)
    if flat.ndim != 1 or not cut.used[number] <= flat.numel() <= cut.full[number] or not flat.is_floating_point():
        emptied = (
            " It was on a drive when this was saved; save with the optimizer in memory." if not flat.numel() else ""
        )
        raise CheckpointError(
            f"{where} has the shape {tuple(flat.shape)} of {flat.dtype}, where {cut.used[number]} to {cut.full[number]} "
            f"elements are expected.{emptied}"
        )
    return flat


def _state_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name or "/" in name:
        raise CheckpointError(f"{where}: {shown(name)} is not the name of an optimizer's state.")
    return name


def _add_frozen(run: ForeignRun, files: DeepSpeedFiles, first: ModelStates, stage: int) -> None:
    """The frozen weights: whole in the module's state at stages 1 and 2, of each rank a part at stage 3."""
    module = first.content.below("module")
    if stage < 3:
        known = {*chain.from_iterable(first.groups), *first.content.rows("buffer_names"), *first.shared}
        rest = {name: value for name, value in module.content.items() if name not in known}
        odd = [name for name, value in rest.items() if not isinstance(value, Tensor)]
        if odd:
            run.notes.append(
                f"{len(odd)} value(s) of the model are no tensors and not carried over, the first is {shown(odd[0])}."
            )
        tensors = {name: value for name, value in rest.items() if name not in odd}
        for name, value in named_tensors(tensors, module.where).items():
            if value.numel():
                run.pieces[0].append(whole_piece(f"{MODEL}/frozen/{name}", value))
        without = set(first.frozen) - set(module.content)
    else:
        without = set(first.frozen)
        for rank, path in enumerate(files.models if without else ()):
            model = first if rank == 0 else ModelStates.read(path)
            fragments = model.content.content.get("frozen_param_fragments")
            if fragments is not None:
                without = set()
                held = Fields(fragments, f"{printed(path)}: frozen_param_fragments")
                run.pieces[rank] += _frozen_parts(held, first, rank, len(files.models))
    if without:
        run.notes.append(
            f"{len(without)} frozen weight(s) are not in it (exclude_frozen_parameters): load the same base model."
        )


def _frozen_parts(held: Fields, first: ModelStates, rank: int, world_size: int) -> Iterator[Piece]:
    for name, shape in first.frozen.items():
        begin, numel = share_of(math.prod(shape), rank, world_size)
        values = with_values(held.content.get(name), f"{held.where}: {printed(name)}").reshape(-1)
        if values.numel() < numel:
            raise CheckpointError(
                f"{held.where}: {printed(name)} has {values.numel()} elements instead of {numel} or more."
            )
        if numel:
            yield piece(f"{MODEL}/frozen/{name}", shape, begin, values[:numel], values.dtype)


def _add_buffers(run: ForeignRun, first: ModelStates) -> None:
    module = first.content.below("module")
    for name in first.content.rows("buffer_names"):
        value = with_values(module.content.get(name), f"{module.where}: the buffer {shown(name)}")
        if value.numel():
            run.pieces[0].append(whole_piece(f"{MODEL}/buffer/{name}", value))


def _optimizer(first: ModelStates, states: OptimizerStates, run: ForeignRun) -> ForeignOptimizer:
    where = states.content.where
    found = ForeignOptimizer(steps=first.steps)
    if states.param_groups is None:  # flat groups are parameter groups there
        rates = _last_rates(first.content.content.get("lr_scheduler"), len(first.groups))
        found.settings = [{} if rates is None else {"lr": rate} for rate in rates or first.groups]
        members = [[number] for number in range(len(first.groups))]
        run.notes.append(
            "Settings of parameter groups (betas, weight decay) are not in it (elastic_checkpoint): the script's count."
        )
    else:
        found.settings = [settings_of(group, f"{where}: a parameter group") for group in states.param_groups]
        members = [Fields(group, f"{where}: a parameter group").numbers("params") for group in states.param_groups]
        if sorted(number for row in members for number in row) != list(range(len(first.groups))):
            raise CheckpointError(
                f"{where}: its parameter groups hold {shown(members)}, not each of {len(first.groups)} partition(s) once."
            )
    for index, row in enumerate(members):
        found.names.append([name for number in row for name in first.groups[number]])
        for number in row:
            count = states.states[number].get("step")
            if count is None and states.param_groups is not None:
                count = states.param_groups[index].get("step")
            if count is None:
                count = states.content.content.get("base_optimizer_state_step")
            if count is not None:
                step = torch.tensor(number_of(count, f"{where}: step"))
                found.numbers |= {name: {"step": step} for name in first.groups[number]}
    return found


def _last_rates(schedule: Any, count: int) -> list[Any] | None:
    rates = schedule.get("_last_lr") if isinstance(schedule, dict) else None
    return rates if isinstance(rates, list) and len(rates) == count else None


def _scaler(content: Fields, version: str) -> dict[str, Any]:
    """Our loss scale's state: DeepSpeed counts iterations, and we the steps since the last overflow or rise.

    window 4, an overflow in iteration 0     rises in    4, 8, 12     up to 0.17.0
                                                         5, 9, 13     since then
    """
    if "loss_scaler" not in content.content:
        return {"value": 1.0, "good_steps": 0}
    scaler = content.get("loss_scaler", Inert, "a loss scaler")
    value = number_of(scaler.attribute("cur_scale"), f"{content.where}: the loss scale")
    counts = [scaler.attribute(name) for name in ("cur_iter", "last_overflow_iter", "scale_window")]
    if any(count is None for count in counts):  # one that never moves
        return {"value": value, "good_steps": 0}
    now, overflow, window = (int(number_of(count, f"{content.where}: the loss scale")) for count in counts)
    good, window = max(0, now - overflow - 1), max(1, window)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < _RISES_LATER:
        return {"value": value, "good_steps": good % window}
    return {"value": value, "good_steps": (good - 1) % window if good else -1}


def _facts(first: ModelStates) -> dict[str, Any]:
    module = first.content.below("module").content
    trained = {name for group in first.groups for name in group}
    return {
        "class": "",
        "config": None,
        "generation_config": None,
        "aliases": first.shared,
        "ignored": [],
        "dtypes": {
            name: dtype_name(t.dtype) for name, t in module.items() if name in trained and isinstance(t, Tensor)
        },
        "peft": {},
        "adapters": {},
    }


def _add_schedule(run: ForeignRun, first: ModelStates) -> None:
    state = first.content.content.get("lr_scheduler")
    if state is None:
        run.lacks.append("scheduler")
    elif not isinstance(state, dict) or not can_be_kept(state):
        run.lacks.append("scheduler")
        run.notes.append(
            "The schedule's state is not carried over: it holds objects that are no numbers, texts, lists or tensors."
        )
    elif set(state) == {"last_batch_iteration"}:
        # DeepSpeed's own: a count from -1 on. torch's schedules count from 0, after a first step in their constructor.
        count = int(number_of(state["last_batch_iteration"], "last_batch_iteration")) + 1
        groups = len(run.optimizer.names) if run.optimizer is not None else 0
        run.schedulers.append({**state, "last_epoch": count, "_step_count": count + 1, "lr_lambdas": [None] * groups})
        run.notes.append(
            f"Of DeepSpeed's own schedule the position is carried over: {count} steps. The script's has to be the same one."
        )
    else:
        run.schedulers.append(state)
    if run.schedulers and len(run.pieces) > 1:
        run.notes.append(
            "The schedule counts optimizer steps, one each: set scheduler_steps_per_process: false in shardwise_config, or it "
            "goes on once for each process."
        )


def _add_client_state(run: ForeignRun, first: ModelStates) -> None:
    kept: dict[str, Any] = {}
    for key, value in first.client_state().items():
        try:
            json.dumps(value, allow_nan=False)
            kept[str(key)] = value
        except (TypeError, ValueError, RecursionError):
            run.notes.append(f"client_state[{shown(key)}] is not carried over: it is no plain JSON.")
    if kept:
        run.beside["client_state.json"] = json.dumps(kept, indent=1) + "\n"
