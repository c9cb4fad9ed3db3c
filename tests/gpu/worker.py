"""Parity, repeatability and races on real devices, as one program of two ranks that prints a table.

    torchrun --nproc_per_node 2 tests/gpu/worker.py                    everything, on two GPUs with NCCL
    torchrun --nproc_per_node 2 tests/gpu/worker.py --only stress      the rows whose name contains "stress"
    torchrun --nproc_per_node 2 tests/gpu/worker.py --use-cpu          the same program over gloo
    torchrun --nproc_per_node 2 tests/rig/one_gpu.py tests/gpu/worker.py    with NCCL on one GPU, which the ranks share

Exit code 1 if a row fails. test_parity_gpu.py runs it and reads its JSON. Bounds: fp32 losses 1e-5 relative and weights
1e-5 absolute after 20 steps, because NCCL and cuBLAS sum in another order than one process does on the larger batch;
bf16 losses 5e-3 relative, and the trained change of the weights 5% (in norm), because one bf16 rounding is 2e-3. What
repeats, repeats to the bit.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from codes import SIZES, apart, check_codes, check_moments
from hazards import HAZARDS
from reference import (
    STEPS,
    Curve,
    batch_of,
    build_model,
    checkpoint_blocks,
    optimizer_named,
    train_alone,
)
from routes import train_on_routes
from stress import Delays
from table import Check, Row, run

from shardwise.building.deferred_tensors import sources_of
from shardwise.building.loading import building
from shardwise.config.sections import EngineConfig
from shardwise.offload import host, peers
from shardwise.plan.plan import Plan
from shardwise.plan.precision import LossScaler, Precision
from shardwise.ranks.ranks import Ranks
from shardwise.step import publishing, visits
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero import build
from shardwise.zero.sharded import ShardedModel

CHUNK, BUCKET, GROUP, BLOCK = visits.CHUNK, build.BUCKET_NBYTES, publishing.GROUP_NBYTES, host.BLOCK
FP32_LOSS, FP32_WEIGHT = 1e-5, 1e-5
BF16_LOSS, BF16_CHANGE = 5e-3, 5e-2


@dataclass(frozen=True)
class Setting:
    """One way to train. trains: "lora" or "full" (tied). clip: the bound on the global norm, or None.

    bucket: bytes of a bucket of whole weights, each of which is then stepped and published by itself, or None.
    optimizer: "adamw"; "half", an AdamW of every other parameter; or one whose parameters are stepped whole: "adafactor", or
    "muon", which has no row of parity: it makes orthogonal what it has rounded to bf16, whose least singular values are noise.
    states: `optimizer_state_dtype`.
    block: bytes in which gradients come down to be added in host memory, few enough here to wait for each other, or None.
    """

    stage: int
    offload: tuple[str, ...] = ()
    tier: str = "cpu"
    chunk: int | None = None
    bucket: int | None = None
    block: int | None = None
    precision: str = "no"
    trains: str = "lora"
    accumulation: int = 1
    clip: float | None = None
    checkpointing: bool = False
    prefetch: int = 1
    gather_with: str = "auto"
    gather_dtype: str = "none"  # int8: on ranks that are told that they sit apart
    optimizer: str = "adamw"
    states: str = "fp32"
    layers: int = 4
    hidden: int = 128
    steps: int = STEPS

    @property
    def name(self) -> str:
        words = [f"stage {self.stage}", *(f"+{role}" for role in self.offload), self.trains]
        if self.tier != "cpu":
            words.append(self.tier)
        if self.chunk is not None:
            words.append("chunks")
        if self.bucket is not None:
            words.append("buckets")
        if self.block is not None:
            words.append("blocks")
        words.append("fp32" if self.precision == "no" else self.precision)
        if self.accumulation > 1:
            words.append(f"x{self.accumulation}")
        if self.clip is not None:
            words.append("clip")
        if self.checkpointing:
            words.append("ckpt")
        if self.gather_dtype != "none":
            words.append(self.gather_dtype)
        if self.optimizer != "adamw":
            words.append(self.optimizer)
        if self.states != "fp32":
            words.append(f"{self.states} states")
        return " ".join(words)


# The curves of one process, each trained once: recomputation and sharding do not change them.
_ALONE: dict[tuple[str, str, int, float | None, str], Curve] = {}

BOTH = ("optimizer", "param")
OPT = ("optimizer",)
PARITY = [
    *(Setting(stage) for stage in range(4)),
    *(Setting(stage, OPT) for stage in (1, 2, 3)),
    Setting(3, ("param",)),
    Setting(3, BOTH),
    *(Setting(stage, trains="full") for stage in range(4)),
    Setting(3, BOTH, trains="full"),
    *(Setting(stage, accumulation=4, clip=0.1) for stage in range(4)),
    Setting(2, OPT, accumulation=4, clip=0.1),
    Setting(3, BOTH, accumulation=4, clip=0.1),
    Setting(3, checkpointing=True),
    Setting(3, BOTH, checkpointing=True, trains="full"),
    *(Setting(stage, precision="bf16") for stage in range(4)),
    Setting(3, BOTH, precision="bf16"),
    Setting(2, OPT, precision="bf16", trains="full"),
    Setting(3, precision="bf16", trains="full"),
    Setting(3, precision="bf16", accumulation=4, clip=0.1, checkpointing=True),
    Setting(3, BOTH, "nvme", trains="full", clip=0.1),
    *(Setting(stage, trains="full", optimizer="adafactor") for stage in (0, 1, 3)),
]
# Held to the bit against the same setting with nothing offloaded.
OFFLOADED = [
    Setting(1, OPT, precision="bf16", trains="full", clip=0.1),
    Setting(2, OPT, trains="full", chunk=4096),
    Setting(3, OPT, precision="bf16", trains="full", clip=0.1, chunk=4096),
    Setting(3, BOTH, precision="bf16", trains="full", checkpointing=True),
    Setting(3, BOTH, precision="bf16"),
    Setting(3, BOTH, "nvme", precision="bf16", trains="full", clip=0.1, chunk=4096),
    Setting(3, ("param",), precision="bf16"),
    Setting(3, ("param",), "nvme", precision="bf16"),
    Setting(2, OPT, trains="full", accumulation=3, block=1 << 12),
    Setting(3, OPT, precision="bf16", trains="full", accumulation=3, block=1 << 12),
    Setting(3, BOTH, precision="bf16", gather_dtype="int8"),
    Setting(3, BOTH, "nvme", precision="bf16", trains="full", gather_dtype="int8"),
    Setting(3, BOTH, precision="bf16", trains="full", optimizer="adafactor", clip=0.1),
    Setting(2, OPT, "nvme", precision="bf16", optimizer="muon"),
    Setting(3, OPT, precision="bf16", trains="full", chunk=4096, optimizer="half"),
    Setting(1, OPT, "nvme", precision="bf16", trains="full", chunk=4096, clip=0.1, optimizer="half"),
    Setting(2, OPT, precision="bf16", trains="full", accumulation=3, clip=0.1),
]
# Held to the bit against the same setting with NCCL's gathers.
COPIED = [
    Setting(3, precision="bf16"),
    Setting(3, trains="full", precision="bf16", accumulation=2),
    Setting(3, trains="full", checkpointing=True, clip=0.1),
]
REPEATED = [Setting(3, precision="bf16"), Setting(3, BOTH, precision="bf16"), Setting(2, OPT, trains="full")]
STRESSED = [
    Setting(3, prefetch=1, layers=24, hidden=64, steps=6),
    Setting(3, prefetch=3, layers=24, hidden=64, steps=6, precision="bf16", checkpointing=True),
    Setting(3, BOTH, prefetch=2, layers=24, hidden=64, steps=6, precision="bf16"),
    Setting(3, BOTH, trains="full", prefetch=1, layers=24, hidden=64, steps=6, precision="bf16", clip=0.1, chunk=4096),
    Setting(3, BOTH, "nvme", trains="full", layers=24, hidden=64, steps=6, chunk=4096),
    Setting(3, trains="full", prefetch=2, layers=24, hidden=64, steps=6, precision="bf16", gather_dtype="int8"),
    Setting(
        3, BOTH, prefetch=1, layers=24, hidden=64, steps=6, precision="bf16", checkpointing=True, gather_dtype="int8"
    ),
    Setting(3, BOTH, trains="full", layers=24, hidden=64, steps=6, accumulation=3),
    Setting(3, trains="full", prefetch=2, layers=24, hidden=64, steps=6, accumulation=2, clip=0.1),
    Setting(2, OPT, trains="full", layers=24, hidden=64, steps=6),
    Setting(3, OPT, trains="full", layers=24, hidden=64, steps=6, accumulation=3, block=1 << 12),
    Setting(2, OPT, trains="full", layers=24, hidden=64, steps=6, precision="bf16", accumulation=2, block=1 << 12),
    Setting(1, trains="full", layers=24, hidden=64, steps=6, precision="bf16"),
    Setting(1, trains="full", layers=24, hidden=64, steps=6, precision="bf16", bucket=1),
    Setting(2, trains="full", layers=24, hidden=64, steps=6, accumulation=2, clip=0.1, bucket=1),
    Setting(1, OPT, trains="full", layers=24, hidden=64, steps=6, precision="bf16", chunk=4096, bucket=1),
    Setting(1, layers=24, hidden=64, steps=6, bucket=1 << 15),
    Setting(3, trains="full", prefetch=2, layers=24, hidden=64, steps=6, precision="bf16", optimizer="adafactor"),
    Setting(3, BOTH, layers=24, hidden=64, steps=6, precision="bf16", optimizer="muon", clip=0.1),
    Setting(1, OPT, layers=24, hidden=64, steps=6, precision="bf16", optimizer="muon"),
    Setting(2, OPT, trains="full", layers=24, hidden=64, steps=6, precision="bf16", chunk=4096, optimizer="half"),
    *(
        Setting(3, BOTH, trains="full", layers=24, hidden=64, steps=6, precision="bf16", chunk=4096, states=states)
        for states in ("bf16", "int8")
    ),
    Setting(2, OPT, "nvme", trains="full", layers=24, hidden=64, steps=6, precision="bf16", states="int8"),
]
# Held to the bit against the same buckets in one call of the optimizer and one gather.
GROUPED = [
    Setting(1, trains="full", precision="bf16", bucket=1),
    Setting(2, trains="full", clip=0.1, accumulation=2, bucket=1),
]


def train_sharded(
    setting: Setting,
    ranks: Ranks,
    delays: Delays | None = None,
    inspect: Callable[[ShardedModel, ShardedOptimizer], None] | None = None,
    *,
    group: int | None = None,
    reads: bool = False,
) -> Curve:
    """Train by shardwise for `setting.steps` steps. The weights of the curve are rank 0's; {} elsewhere.

    inspect: called after the last step, while everything is at rest. group: bytes of weights that step together.
    reads: the curve's weights hold also what a read of the parameters right after each step found, on every rank.
    """
    if setting.gather_dtype != "none":
        ranks = apart(ranks)
    model = build_model(setting.trains, ranks.device, setting.layers, setting.hidden)
    if setting.checkpointing:
        checkpoint_blocks(model)
    if delays is not None:
        delays.watch(model)
    plan = Plan.from_stage(setting.stage, **{f"offload_{role}": setting.tier for role in setting.offload})
    visits.CHUNK = setting.chunk or CHUNK
    build.BUCKET_NBYTES = setting.bucket or BUCKET
    host.BLOCK = setting.block or BLOCK
    publishing.GROUP_NBYTES = group or setting.bucket or GROUP
    precision = Precision.named(setting.precision, reduce_dtype="fp32")
    optimizer = optimizer_named(setting.optimizer, model.parameters())
    # Found blocks this small share a unit; named ones are a unit each. Both ways are to hold.
    units = None if setting.checkpointing else ["LlamaDecoderLayer"]
    sharded = ShardedModel(
        model,
        plan=plan,
        ranks=ranks,
        precision=precision,
        options=EngineConfig(
            prefetch_units=setting.prefetch,
            units=units,
            gather_with=setting.gather_with,
            gather_dtype=setting.gather_dtype,
            optimizer_state_dtype=setting.states,
        ),
        nvme_paths=dict.fromkeys(("param", "optimizer"), tempfile.gettempdir()),
    )
    stepper = ShardedOptimizer(optimizer, [sharded], scaler=LossScaler.for_precision(precision), gradient_clipping=None)
    losses, norms, found = [], [], {}
    with delays.lanes() if delays is not None else contextlib.nullcontext():
        for step in range(setting.steps):
            seen = []
            for micro in range(setting.accumulation):
                sharded.sync_gradients = micro == setting.accumulation - 1
                loss = model(**batch_of(step, micro, ranks.rank, ranks.device)).loss
                (loss / setting.accumulation).backward()
                seen.append(loss.detach().float())
            if setting.clip is not None:
                norms.append(stepper.clip_norm(list(model.parameters()), setting.clip))
            optimizer.step()
            if reads:
                found[f"read after step {step}"] = torch.stack([p.data.double().sum() for p in model.parameters()])
            optimizer.zero_grad()
            losses.append(torch.stack(seen).mean())
    mean = torch.stack(losses)
    ranks.all_reduce(mean, "mean")
    if inspect is not None:
        inspect(sharded, stepper)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: value.float() for name, value in sharded.state_dict().items() if name in trained}
    weights |= {name: value.cpu() for name, value in found.items()}
    return Curve(mean.tolist(), weights, [float(norm) for norm in norms])


def check_parity(setting: Setting, ranks: Ranks) -> Row:
    """The curve of one process, within the bound of the dtype."""
    mine = train_sharded(setting, ranks)
    recipe = (setting.trains, setting.precision, setting.accumulation, setting.clip, setting.optimizer)
    if recipe not in _ALONE:
        trains, precision, accumulation, clip, optimizer = recipe
        _ALONE[recipe] = train_alone(
            *(trains, precision, ranks.world_size, ranks.device),
            accumulation=accumulation,
            clip=clip,
            optimizer=optimizer,
        )
    alone = _ALONE[recipe]
    loss = max(abs(a - b) / abs(b) for a, b in zip(mine.losses, alone.losses, strict=True))
    norm = max((abs(a - b) / b for a, b in zip(mine.norms, alone.norms, strict=True)), default=0.0)
    weight, note = 0.0, f"norm {norm:.1e}" if mine.norms else ""
    moved = alone.losses[-1] < alone.losses[0] - 0.01
    if ranks.rank == 0:
        if set(mine.weights) != set(alone.weights):
            return Row("parity", setting.name, loss, float("nan"), False, "other names in state_dict")
        pairs = [(mine.weights[name].cpu(), value) for name, value in alone.weights.items()]
        if setting.precision == "no":
            weight = max(float((a - b).abs().max()) for a, b in pairs)
        else:
            start = dict(build_model(setting.trains, torch.device("cpu")).named_parameters())
            apart = sum(float((a - b).square().sum()) for a, b in pairs)
            change = sum(float((value - start[name].detach()).square().sum()) for name, value in alone.weights.items())
            weight = (apart / change) ** 0.5
    fp32 = setting.precision == "no"
    loss_bound, weight_bound = (FP32_LOSS, FP32_WEIGHT) if fp32 else (BF16_LOSS, BF16_CHANGE)
    ok = loss <= loss_bound and weight <= weight_bound and norm <= (1e-4 if fp32 else 2e-2) and moved
    return Row("parity fp32" if fp32 else "parity bf16", setting.name, loss, weight, ok, note)


def check_offload(setting: Setting, ranks: Ranks) -> Row:
    """The bits of the same run with nothing offloaded: the step is the same, and so is the order of every sum."""
    curves = [train_sharded(replace(setting, offload=()), ranks), train_sharded(setting, ranks)]
    return _same_bits("offload", f"offload, {setting.name}", curves, ranks)


def check_peers(setting: Setting, ranks: Ranks) -> Row:
    """The bits of the same run with weights gathered by NCCL. Where copy engines cannot gather, both are that."""
    curves = [train_sharded(replace(setting, gather_with="nccl"), ranks), train_sharded(setting, ranks)]
    return _same_bits("peers", f"peers, {setting.name}", curves, ranks)


def check_groups(setting: Setting, ranks: Ranks) -> Row:
    """Weights that are stepped and published group by group have the bits of one call and one gather."""
    curves = [train_sharded(setting, ranks, group=1 << 40, reads=True), train_sharded(setting, ranks, reads=True)]
    return _same_bits("groups", f"groups, {setting.name}", curves, ranks)


def check_repeats(setting: Setting, ranks: Ranks) -> Row:
    """Three runs, the same bits."""
    curves = [train_sharded(setting, ranks) for _ in range(3)]
    return _same_bits("repeat", f"3 runs, {setting.name}", curves, ranks)


def check_stress(setting: Setting, ranks: Ranks) -> Row:
    """The same bits with everything late as with nothing late, also for who reads weights right after a step."""
    reads = setting.stage < 3
    curves = [train_sharded(setting, ranks, reads=reads)]
    curves += [train_sharded(setting, ranks, Delays(ranks, seed), reads=reads) for seed in (1, 2)]
    return _same_bits("stress", f"stress, prefetch {setting.prefetch}, {setting.name}", curves, ranks)


def _same_bits(kind: str, name: str, curves: list[Curve], ranks: Ranks) -> Row:
    first = curves[0]
    loss = max(abs(a - b) for curve in curves[1:] for a, b in zip(curve.losses, first.losses, strict=True))
    weight = max(
        (
            float((curve.weights[key] - value).abs().max())
            for curve in curves[1:]
            for key, value in first.weights.items()
        ),
        default=0.0,
    )
    return Row(kind, name, loss, weight, loss == 0.0 and weight == 0.0)


def check_pinned(setting: Setting, ranks: Ranks) -> Row:
    """Host memory is pinned, and of the ledger's size: torch's own pinned allocator would round up to powers of 2."""
    found: dict[str, int] = {}

    def inspect(sharded: ShardedModel, stepper: ShardedOptimizer) -> None:
        entries = [*sharded.ledger().items(), *stepper.ledger().items()]
        found["ledger"] = sum(size for (_, tier), size in entries if str(tier) == "cpu")
        storages = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gc walks over deprecated lazy objects of other libraries
            for thing in gc.get_objects():
                if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.numel():
                    storages[thing.untyped_storage().data_ptr()] = thing
        pinned = [thing.untyped_storage().nbytes() for thing in storages.values() if thing.is_pinned()]
        found["pinned"] = sum(pinned)
        if hasattr(torch.cuda, "host_memory_stats"):
            found["torch_pinned"] = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)

    gc.collect()
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if ranks.device.type == "cuda" else 0
    train_sharded(setting, ranks, inspect=inspect)
    if ranks.device.type != "cuda":
        return Row("pinned", f"pinned bytes, {setting.name}", 0.0, 0.0, True, "no CUDA: nothing to pin")
    grown = found.get("torch_pinned", before) - before
    # Scalars (step counts, flags) are on either side; a slab that was rounded up would show as megabytes.
    ok = found["ledger"] > 0 and abs(found["pinned"] - found["ledger"]) <= 2**16 and grown <= 2**16
    note = f"ledger {found['ledger']}, pinned {found['pinned']}, torch's pinned allocator grew {grown}"
    return Row("pinned", f"pinned bytes, {setting.name}", 0.0, 0.0, ok, note)


class Drawn(torch.nn.Module):
    """Weights that are drawn in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(96, 128, dtype=torch.bfloat16)
        self.embedding = torch.nn.Embedding(211, 96, padding_idx=3)
        self.scaled = torch.nn.Parameter(torch.randn(64, 128) * 0.1 + torch.ones(64, 128))
        self.cut = torch.nn.Parameter(torch.zeros(70, 90))
        self.turned = torch.nn.Parameter(torch.empty(80, 60))
        torch.nn.init.trunc_normal_(self.cut, std=0.7)
        torch.nn.init.orthogonal_(self.turned)
        self.register_buffer("table", torch.rand(80, 60))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def check_built(_: None, ranks: Ranks) -> Row:
    """What is built on the device inside `accelerator.init()` has the numbers of an ordinary build there, of rank 0's seed."""

    def build() -> Drawn:
        with torch.device(ranks.device):
            return Drawn()

    torch.manual_seed(7)
    expected, after = build(), torch.rand(3, device=ranks.device)
    torch.manual_seed(7 + ranks.rank)
    before = torch.cuda.memory_allocated(ranks.device) if ranks.device.type == "cuda" else 0
    with building():
        model = build()
    grown = torch.cuda.memory_allocated(ranks.device) - before if ranks.device.type == "cuda" else 0
    same = ranks.rank > 0 or torch.equal(torch.rand(3, device=ranks.device), after)
    deferred = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    plan, precision = Plan.from_stage(3), Precision.named("no")
    sharded = ShardedModel(model, plan=plan, ranks=ranks, precision=precision, sources=sources_of(model))
    wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    with sharded.gathered():
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        apart = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
        elsewhere = [name for name, value in found.items() if value.device != ranks.device]
    ok = same and not apart and not elsewhere and len(deferred) == 5 and grown < 2**16
    return Row("built", "built on the device", 0.0, 0.0, ok, f"apart {apart}, deferred {len(deferred)}, grew {grown}")


@dataclass(frozen=True)
class Way:
    """How the model of `routes` is gathered. alone: every block is a unit; else all share one, as small ones do."""

    gather_with: str
    alone: bool = True
    prefetch: int = 1

    @property
    def name(self) -> str:
        return f"{self.gather_with}, {'a unit each' if self.alone else 'one unit'}, prefetch {self.prefetch}"


ROUTES = [Way("nccl"), Way("nccl", prefetch=2), Way("nccl", alone=False), Way("auto"), Way("auto", alone=False)]


def check_routes(way: Way, ranks: Ranks) -> Row:
    """Blocks that run in any order, another on each rank, train as they do in a plain model."""
    loss, weight = train_on_routes(ranks, way.gather_with, ["Block"] if way.alone else None, way.prefetch)
    return Row("routes", f"routes, {way.name}", loss, weight, loss <= FP32_LOSS and weight <= FP32_WEIGHT)


def all_checks() -> list[Check]:
    """Every check by name, in the order they run."""
    checks: list[Check] = []
    for prefix, settings, check in (
        ("parity", PARITY, check_parity),
        ("offload", OFFLOADED, check_offload),
        ("peers", COPIED, check_peers),
        ("groups", GROUPED, check_groups),
        ("repeat", REPEATED, check_repeats),
        ("routes", ROUTES, check_routes),
        ("pinned", [Setting(3, BOTH), Setting(2, OPT, trains="full")], check_pinned),
        ("stress", STRESSED, check_stress),
        ("built", [None], check_built),
    ):
        for setting in settings:
            checks.append(
                (
                    f"{prefix} {setting.name if setting else 'on the device'}",
                    lambda ranks, c=check, s=setting: c(s, ranks),
                )
            )  # type: ignore[misc]
    checks += [(f"codes of {numel}", lambda ranks, n=numel: check_codes(n, ranks)) for numel in SIZES]  # type: ignore[misc]
    checks += [(f"moments of {numel}", lambda ranks, n=numel: check_moments(n, ranks)) for numel in SIZES]  # type: ignore[misc]
    return [*checks, *HAZARDS]


if __name__ == "__main__":
    # Shards as small as these models' would go by NCCL.
    peers.MIN_SHARD_NBYTES = 1
    sys.exit(run(all_checks(), __doc__ or ""))
