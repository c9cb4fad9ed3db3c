"""Short ways to put the engine to work in a rank, and to hold it against plain torch in the same process.

`train_both` is the heart: it trains a plain copy of a model on every rank's part of the batches, and the sharded
model on this rank's part alone, and compares. What the ranks do may differ (another branch, another number of calls):
the plain copy plays all ranks, one after another, so it is always what one process would have done.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# A stage, and what of it rests on the CPU, by a short name for test ids.
PLANS: dict[str, tuple[int, str, str]] = {
    "0": (0, "none", "none"),
    "1": (1, "none", "none"),
    "2": (2, "none", "none"),
    "3": (3, "none", "none"),
    "2-opt": (2, "cpu", "none"),
    "3-all": (3, "cpu", "cpu"),
    "3-disk": (3, "nvme", "nvme"),
}
# Some that a test asks for by name, and the tables of all plans do not have.
OTHER_PLANS = {
    "1-opt": (1, "cpu", "none"),
    "1-disk": (1, "nvme", "none"),
    "2-disk": (2, "nvme", "none"),
    "3-opt": (3, "cpu", "none"),
}
STAGES = ("0", "1", "2", "3")
SHARDED = ("3", "3-all", "3-disk")

LossOf = Callable[[nn.Module, Tensor, int, int], Tensor]


class Block(nn.Module):
    """x + down(relu(up(x))): 12 -> 20 -> 12, sizes that no world size divides."""

    def __init__(self, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    """A first layer, `depth` blocks and a head: four units with depth 3 (the first layer and the head are the
    root's)."""

    def __init__(self, depth: int = 3, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CheckpointedTower(Tower):
    """Recomputes every block in the backward."""

    def __init__(self, reentrant: bool, depth: int = 3) -> None:
        super().__init__(depth)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def tower(depth: int = 3, seed: int = 5) -> Tower:
    torch.manual_seed(seed)
    return Tower(depth)


def inputs(steps: int, samples: int = 12, seed: int = 6) -> list[Tensor]:
    """`steps` global batches of (samples, 5)."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 5, generator=source) for _ in range(steps)]


def mine(batch: Tensor, rank: int, world_size: int) -> Tensor:
    return batch[rank::world_size].contiguous()


def loss_of(model: nn.Module, x: Tensor, rank: int = 0, step: int = 0) -> Tensor:
    return model(x).square().mean()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Its eps is above rounding noise, see tests/parity/training.py."""
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def shard(ranks: Any, model: nn.Module, plan: str = "3", precision: str = "no", **settings: Any) -> Any:
    """The ShardedModel of `model` under one of PLANS. settings: keywords of it, and options by their names in a file."""
    from shardwise.config.sections import EngineConfig
    from shardwise.plan.plan import Plan
    from shardwise.plan.precision import Precision
    from shardwise.zero.sharded import ShardedModel

    stage, optimizer, param = (PLANS | OTHER_PLANS)[plan]
    chosen = Plan.from_stage(stage, offload_optimizer=optimizer, offload_param=param)
    if "nvme" in (optimizer, param) and "nvme_paths" not in settings:
        settings["nvme_paths"] = dict.fromkeys(("param", "optimizer"), tempfile.gettempdir())
    if "prefetch" in settings:
        settings["prefetch_units"] = settings.pop("prefetch")
    options = EngineConfig(**{key: settings.pop(key) for key in list(settings) if key in EngineConfig.model_fields})
    precise = Precision.named(precision)
    return ShardedModel(model, plan=chosen, ranks=ranks, precision=precise, options=options, **settings)


def prepare(
    ranks: Any,
    model: nn.Module,
    plan: str = "3",
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    precision: str = "no",
    clipping: float | None = None,
    scale: float = 2.0**10,
    **settings: Any,
) -> tuple[Any, Any, torch.optim.Optimizer]:
    """(ShardedModel, ShardedOptimizer, the user's optimizer) over the trained weights of `model`."""
    from shardwise.plan.precision import LossScaler, Precision
    from shardwise.step.optimizer import ShardedOptimizer

    stepping = optimizer(trained(model))
    sharded = shard(ranks, model, plan, precision, **settings)
    scaler = LossScaler.for_precision(Precision.named(precision), init_scale=scale)
    return sharded, ShardedOptimizer(stepping, [sharded], scaler=scaler, gradient_clipping=clipping), stepping


def states_at_rest(
    blueprints: Any, model: nn.Module, size: int, rank: int, optimizer: Callable[[Any], Any] = adamw, **settings: Any
) -> dict[Any, int]:
    """The ledger of an optimizer's states on `rank` of `size`, by arithmetic. settings: as States takes them."""
    from shardwise.estimate.keeping import Stepper
    from shardwise.estimate.states import States

    found = States(blueprints, [Stepper(optimizer, trained(model), "it")], size, **settings)
    return found.ledgers[rank % found.places]


def weights_of(sharded: Any) -> dict[str, Tensor]:
    """Every parameter by name, cloned, on every rank."""
    with sharded.gathered():
        return {name: p.detach().clone() for name, p in sharded.model.named_parameters()}


def largest_difference(found: dict[str, Tensor], expected: nn.Module) -> float:
    """Between weights by name and those of a plain model."""
    wanted = dict(expected.named_parameters())
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    return max((found[n].float() - p.detach().float()).abs().max().item() for n, p in wanted.items() if p.numel())


def plain_step(reference: nn.Module, batch: Tensor, world_size: int, step: int, loss_of: LossOf) -> list[float]:
    """One backward over all ranks' parts of a batch, in one process. Each rank's loss."""
    losses = []
    for rank in range(world_size):
        loss = loss_of(reference, mine(batch, rank, world_size), rank, step)
        if loss.requires_grad:
            (loss / world_size).backward()
        losses.append(loss.item())
    return losses


def train_both(
    ranks: Any,
    model: nn.Module,
    plan: str = "3",
    *,
    loss_of: LossOf = loss_of,
    steps: int = 6,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    tolerance: float = 1e-6,
    between: Callable[[Any, torch.optim.Optimizer, int], None] | None = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """Train `model` under `plan` and a plain copy of it; assert equal losses at each step and equal weights at the end.

    loss_of: (model, this rank's batch, rank, step) -> loss. between: called with (sharded, the optimizer, step) after
    each step. Returns (ShardedModel, the plain copy).
    """
    reference = copy.deepcopy(model)
    plain = optimizer(trained(reference))
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=optimizer, **settings)
    for step, batch in enumerate(inputs(steps)):
        expected = plain_step(reference, batch, ranks.world_size, step, loss_of)[ranks.rank]
        plain.step()
        plain.zero_grad()
        loss = loss_of(model, mine(batch, ranks.rank, ranks.world_size), ranks.rank, step)
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        assert abs(loss.item() - expected) <= tolerance * max(1.0, abs(expected)), (step, loss.item(), expected)
        if between is not None:
            between(sharded, stepping, step)
    assert largest_difference(weights_of(sharded), reference) <= tolerance
    return sharded, reference


def train_changed(ranks: Any, plan: str, precision: str, change: Callable[[nn.Module, int], None]) -> float:
    """Train a tower and a plain copy for 5 steps by SGD; the largest difference of their weights.

    change: called with (model, step) before steps 1 and 3, for the copy too; inside `gathered` where weights are sharded.
    """
    import shardwise

    model = tower()
    reference = copy.deepcopy(model)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = make(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=make, precision=precision)
    for step, batch in enumerate(inputs(5)):
        if step in (1, 3):
            change(reference, step)
            with shardwise.gathered(model) if plan.startswith("3") else nullcontext():
                change(model, step)
        for rank in range(ranks.world_size):
            (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).float().backward()
        stepping.step()
        stepping.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@contextmanager
def as_on_a_device(chunk: int = 2048, *, visits: bool = True) -> Iterator[None]:
    """Small chunks, a page of 16 bits; and with `visits` nothing that rests on the CPU is stepped in place."""
    from shardwise.plan.plan import Tier
    from shardwise.step import visits as stepping
    from shardwise.zero.trained import Trained

    before, stepping.CHUNK = stepping.CHUNK, chunk
    in_place = Trained.in_place
    if visits:
        Trained.in_place = property(lambda self: self.master.tier is Tier.GPU)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        stepping.CHUNK = before  # the ranks are those of the tests to come
        Trained.in_place = in_place  # type: ignore[method-assign]


def step_both(
    ranks: Any,
    batch: Tensor,
    plain: tuple[nn.Module, torch.optim.Optimizer],
    stepping: tuple[nn.Module, torch.optim.Optimizer],
) -> None:
    """One step of a plain model over all ranks' parts of a batch, and of a prepared one over this rank's."""
    plain_step(plain[0], batch, ranks.world_size, 0, loss_of)
    loss_of(stepping[0], mine(batch, ranks.rank, ranks.world_size)).backward()
    for _, optimizer in (plain, stepping):
        optimizer.step()
        optimizer.zero_grad()
