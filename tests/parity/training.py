"""One training run, twice: by plain torch in one process, and by the engine on every rank.

`reference` uses nothing of shardwise: the whole global batch in one forward, torch's own clipping, the user's
optimizer. `sharded_run` trains on this rank's share of the same batches. Both return a `Run`, and `difference`
measures two of them.

AdamW's eps is 1e-4, not 1e-8: a gradient that is zero in exact arithmetic (the bias of k_proj, which softmax does not
see) is rounding noise in floating point, and an eps below the noise turns it into steps of full size in a random
direction. That would compare the noise of two orders of summation, not two trainings.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rig.tiny import batches, checkpointed, micro_batches, named_trainable, share, tiny

from .cases import SAMPLES, STEPS, Case

MICRO_BATCHES = 4
EPS = 1e-4


@dataclass
class Run:
    """losses, norms: one a step, over the global batch. weights: trained ones by name, fp32, at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def reference(ranks: Any, model_name: str, tuning: str, clip: float | None, optimizer_name: str) -> Run:
    """Train in one process with plain torch. Runs in a pool of one rank, for its threads and its clean imports."""
    assert ranks.world_size == 1
    model = tiny(model_name, tuning)
    optimizer, scheduler = make_optimizer(optimizer_name, model)
    run = Run()
    for batch in batches(model_name, STEPS, SAMPLES):
        loss = model(**batch).loss
        loss.backward()
        if clip is not None:
            run.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
    run.weights = {name: weight.detach().clone() for name, weight in named_trainable(model)}
    return run


def sharded_run(ranks: Any, case: Case, precision_name: str = "no", steps: int = STEPS) -> Run:
    """Train this rank's share of the same batches under the case's plan."""
    from shardwise.plan.plan import Plan
    from shardwise.plan.precision import LossScaler, Precision
    from shardwise.step.optimizer import ShardedOptimizer
    from shardwise.zero.sharded import ShardedModel

    model = tiny(case.model, case.tuning)
    names = [name for name, _ in named_trainable(model)]
    if case.mode in ("checkpointed", "reentrant"):
        checkpointed(model, reentrant=case.mode == "reentrant")
    optimizer, scheduler = make_optimizer(case.optimizer, model)
    plan = Plan.from_stage(
        case.placement.stage,
        offload_optimizer=case.placement.optimizer or "none",
        offload_param=case.placement.params or "none",
    )
    precision = Precision.named(precision_name)
    paths = dict.fromkeys(("param", "optimizer"), tempfile.gettempdir())
    ranks = ranks if case.group is None else ranks.divided(case.group, all_own=case.all_own)
    sharded = ShardedModel(model, plan=plan, ranks=ranks, precision=precision, nvme_paths=paths)
    scaler = LossScaler.for_precision(precision, init_scale=2.0**10)
    stepper = ShardedOptimizer(optimizer, [sharded], scaler=scaler)
    run = Run()
    for batch in batches(case.model, steps, SAMPLES):
        parts = micro_batches(batch, MICRO_BATCHES) if case.mode == "accumulated" else [batch]
        total = 0.0
        for i, part in enumerate(parts):
            sharded.sync_gradients = i == len(parts) - 1
            loss = model(**share(part, ranks.rank, ranks.world_size)).loss / len(parts)
            scaler.scale(loss).backward()
            total += loss.item()
        if case.clip is not None:
            run.norms.append(float(stepper.clip_norm(list(model.parameters()), case.clip)))
        optimizer.step()
        assert not stepper.step_was_skipped
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        run.losses.append(mean_over_ranks(ranks, total))
    state = sharded.state_dict()
    assert bool(state) == (ranks.rank == 0), "state_dict gives its tensors to rank 0 only"
    run.weights = {name: state[name].float() for name in names if name in state}
    sharded.release()
    return run


def make_optimizer(name: str, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """The user's optimizer over the trained weights, and a scheduler or None."""
    trained = named_trainable(model)
    weights = [weight for _, weight in trained]
    if name == "sgd":
        return torch.optim.SGD(weights, lr=0.03, momentum=0.9, weight_decay=0.01), None
    if name == "adamw-groups":
        # A group boundary inside each module: every other weight is decayed, at another rate of learning.
        groups = [
            {"params": weights[0::2], "weight_decay": 0.1, "lr": 2e-3},
            {"params": weights[1::2], "weight_decay": 0.0, "betas": (0.8, 0.95)},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, eps=EPS), None
    optimizer = torch.optim.AdamW(weights, lr=2e-3, eps=EPS, weight_decay=0.05)
    if name == "adamw-scheduled":
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + 0.2 * step))
    return optimizer, None


def mean_over_ranks(ranks: Any, value: float) -> float:
    """The mean of a number over the ranks, in float64: the loss of the global batch from those of its equal shares."""
    return sum(ranks.gather_objects(value)) / ranks.world_size


def difference(run: Run, expected: Run) -> dict[str, float]:
    """The largest relative difference of losses and norms, and the largest absolute one of weights."""
    assert len(run.losses) == len(expected.losses)
    assert len(run.norms) == len(expected.norms)
    assert run.weights.keys() == expected.weights.keys(), sorted(run.weights.keys() ^ expected.weights.keys())
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(run.losses, expected.losses, strict=True)),
        "norm": max((abs(a - b) / abs(b) for a, b in zip(run.norms, expected.norms, strict=True)), default=0.0),
        "weight": max((run.weights[name] - weight).abs().max().item() for name, weight in expected.weights.items()),
    }
