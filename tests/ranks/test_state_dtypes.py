"""`optimizer_state_dtype`: moments that visit the device for their step rest as codes, and nothing else changes.

The reference is the engine with nothing offloaded, whose moments are made codes and numbers again after each step, chunk by
chunk as they would rest. Files and host memory then hold the very same, so weights are the same to the bit.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rig.engine import OTHER_PLANS, PLANS, Tower, adamw, as_on_a_device, inputs, loss_of, mine, prepare, states_at_rest
from rig.heard import heard
from shardwise import Accelerator
from shardwise.config.schema import ENVIRONMENT_KEY
from shardwise.config.sections import EngineConfig
from shardwise.plan.blueprint import at_rest, divide
from shardwise.plan.compressed import BLOCK
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.plan.units import find_units
from shardwise.run.process import forget_run
from shardwise.zero.build import BUCKET_NBYTES

optim = torch.optim
# The elements of a chunk that a file of scales takes whole pages of.
PAGES = 1 << 18


class Signs(optim.Optimizer):
    """Keeps a moment, and under `z` what nobody knows: another copy of the weight."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["exp_avg"], state["z"] = torch.zeros_like(p), p.clone()
                    state["exp_avg"].lerp_(p.grad, 0.1)
                    state["z"].sub_(state["exp_avg"], alpha=group["lr"])
                    p.lerp_(state["z"], 0.5)


OPTIMIZERS: dict[str, Any] = {
    "AdamW": adamw,
    "amsgrad": lambda ps: optim.Adam(ps, lr=3e-3, eps=1e-4, amsgrad=True, foreach=False, fused=False),
    "two groups": lambda ps: optim.AdamW(
        [{"params": ps[:3]}, {"params": ps[3:], "weight_decay": 0.1}], lr=3e-3, eps=1e-4
    ),
    "SGD": lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9),
    "Adagrad": lambda ps: optim.Adagrad(ps, lr=1e-2, initial_accumulator_value=0.1),
    "RMSprop": lambda ps: optim.RMSprop(ps, lr=1e-3, centered=True, momentum=0.5),
    "Signs": Signs,
    "vectors": lambda ps: adamw([p for p in ps if p.ndim < 2]),
    "Muon": lambda ps: optim.Muon([p for p in ps if p.ndim == 2], lr=1e-3),
}


def net(width: int = 60) -> nn.Module:
    torch.manual_seed(5)
    model = Tower(depth=2, width=width)
    model.blocks[0].up.requires_grad_(False)
    return model


def _coded_in_place(stepper: Any, dtype: str, chunk: int, *, stepped: bool = True) -> None:
    """Make the moments codes and numbers again, as they lie at rest, by the counts of each chunk. stepped: a step was."""
    from shardwise.offload.codes import Chance, Coding
    from shardwise.step.moments import FIRST, SECOND

    by_unit: dict[int, list[Any]] = {}
    for shard in stepper.groups.stepped:
        if stepper.optimizer.state.get(shard.tensor):
            by_unit.setdefault(id(shard.trained), []).append(shard)
    for shards in by_unit.values():
        numel, footprint = shards[0].trained.master.numel, shards[0].unit_states.footprint
        for key in {key for s in shards for key in stepper.optimizer.state[s.tensor]} & (FIRST | SECOND):
            flat = torch.zeros(footprint.numel)
            for shard in shards:
                flat[shard.state_begin :][: shard.numel] = stepper.optimizer.state[shard.tensor][key]
            for begin in range(0, numel, chunk):
                first = footprint.place(begin)
                part = flat[first : footprint.place(begin + chunk)]
                here = [s for s in shards if s.begin < begin + chunk and begin < s.end and s.gradient() is not None]
                count = sum(int(stepper.optimizer.state[s.tensor].get("step", 0)) for s in here)
                coding, chance = (
                    Coding(dtype, key in SECOND),
                    Chance(first, torch.tensor(count, dtype=torch.int32)) if stepped else None,
                )
                part.copy_(coding.decode(coding.encode(part.clone(), chance), torch.empty_like(part)))
            for shard in shards:
                stepper.optimizer.state[shard.tensor][key].copy_(flat[shard.state_begin :][: shard.numel])


def _steps(ranks: Any, prepared: Any, steps: int, after: Any = lambda: None) -> list[float]:
    sharded, _, stepping = prepared
    losses = []
    for batch in inputs(steps):
        loss = loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size))
        loss.backward()
        stepping.step()
        after()
        stepping.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _both(ranks: Any, folder: str, plan: str, dtype: str, name: str, width: int, chunk: int, steps: int) -> None:
    paths = dict.fromkeys(("param", "optimizer"), folder)
    with as_on_a_device(chunk):
        model = net(width)
        here = prepare(ranks, model, plan[0], optimizer=OPTIMIZERS[name])
        _coded_in_place(here[1], dtype, chunk, stepped=False)  # what a constructor made
        expected = _steps(ranks, here, steps, lambda: _coded_in_place(here[1], dtype, chunk))
        weights, states = here[0].state_dict(), here[2].state_dict()
        there = prepare(
            ranks, net(width), plan, optimizer=OPTIMIZERS[name], optimizer_state_dtype=dtype, nvme_paths=paths
        )
        found = _steps(ranks, there, steps)
        assert found == expected
        for key, value in there[0].state_dict().items():
            assert torch.equal(value, weights[key]), key
        kept = there[2].state_dict()["state"]
        for number, state in states["state"].items():
            for key, value in state.items():
                assert kept[number][key].dtype == value.dtype == torch.float32
                assert torch.equal(kept[number][key], value), (number, key)
    assert steps < 2 or len(set(expected)) > 1


CASES = [
    ("2-opt", "int8", "AdamW"),
    ("2-opt", "bf16", "AdamW"),
    ("3-opt", "int8", "two groups"),
    ("1-disk", "bf16", "amsgrad"),
    ("2-opt", "int8", "amsgrad"),
    ("3-disk", "bf16", "RMSprop"),
    ("2-opt", "int8", "RMSprop"),
    ("2-opt", "int8", "SGD"),
    ("3-opt", "bf16", "Adagrad"),
    ("2-opt", "int8", "Adagrad"),
    ("2-opt", "int8", "Signs"),
    ("2-opt", "int8", "vectors"),
    ("3-opt", "bf16", "vectors"),
]


@pytest.mark.parametrize(("plan", "dtype", "name"), CASES)
def test_moments_are_those_of_the_codes_to_the_bit(world, tmp_path, plan, dtype, name):
    world(2).run(_both, str(tmp_path), plan, dtype, name, 60, 2048, 4)


def test_on_a_drive_chunks_of_codes_and_scales_are_whole_pages(world, tmp_path):
    world(2).run(_both, str(tmp_path), "2-disk", "int8", "AdamW", 12_000, PAGES, 2)


def _counted(ranks: Any, plan: str) -> int:
    from shardwise.offload import codes

    calls = []
    encode, decode = codes.Coding.encode, codes.Coding.decode
    codes.Coding.encode = lambda *_: calls.append("encode")  # type: ignore[method-assign,assignment]
    codes.Coding.decode = lambda *_: calls.append("decode")  # type: ignore[method-assign,assignment]
    try:
        with as_on_a_device():
            expected = _steps(ranks, prepare(ranks, net(), "2"), 3)
            prepared = prepare(ranks, net(), plan, optimizer_state_dtype="fp32")
            assert _steps(ranks, prepared, 3) == expected
            prepared[2].state_dict()
    finally:
        codes.Coding.encode, codes.Coding.decode = encode, decode  # type: ignore[method-assign]
    return len(calls)


@pytest.mark.parametrize("plan", ["2-opt", "1-disk"])
def test_fp32_is_what_it_was(world, plan):
    assert world(2).run(_counted, plan) == [0, 0]


def _losses(ranks: Any, dtype: str, name: str) -> list[float]:
    with as_on_a_device():
        return _steps(
            ranks, prepare(ranks, net(), "2-opt", optimizer=OPTIMIZERS[name], optimizer_state_dtype=dtype), 30
        )


@pytest.mark.parametrize(
    ("dtype", "name", "bound"), [("bf16", "AdamW", 2e-3), ("int8", "AdamW", 2e-2), ("int8", "Muon", 2e-2)]
)
def test_losses_stay_near_those_of_fp32(world, dtype, name, bound):
    expected, found = (world(2).run(_losses, kind, name)[0] for kind in ("fp32", dtype))
    assert found != expected
    assert found == pytest.approx(expected, rel=bound, abs=1e-4)


# Bytes.


def _ledgers(ranks: Any, plan: str, dtype: str) -> Any:
    with as_on_a_device():
        prepared = prepare(ranks, net(), plan, precision="bf16", optimizer_state_dtype=dtype)
        for batch in inputs(1):
            loss_of(prepared[0].model, mine(batch.bfloat16(), ranks.rank, ranks.world_size)).backward()
        prepared[2].step()
        prepared[2].zero_grad()
        model = {key: nbytes for key, nbytes in prepared[0].ledger().items() if key[0] != "gradient"}
        return model, prepared[1].ledger()


@pytest.mark.parametrize(
    ("plan", "dtype"), list(itertools.product(("2-opt", "3-all", "3-disk"), ("fp32", "bf16", "int8")))
)
def test_what_rests_is_what_the_formula_says(world, plan, dtype):
    stage, optimizer, param = (PLANS | OTHER_PLANS)[plan]
    chosen = Plan.from_stage(stage, offload_optimizer=optimizer, offload_param=param)
    model = net()
    blueprints = divide(find_units(model), chosen, Precision.named("bf16"), bucket_nbytes=BUCKET_NBYTES)
    for rank, (weights, states) in enumerate(world(2).run(_ledgers, plan, dtype)):
        assert weights == at_rest(blueprints, 2)
        assert states == states_at_rest(blueprints, model, 2, rank, cuda=True, state_dtype=dtype)


def _over_the_drive(ranks: Any, folder: str, dtype: str) -> tuple[int, int, int]:
    """Of a rank's part of a step: bytes read, bytes written, elements."""
    paths = dict.fromkeys(("param", "optimizer"), folder)
    prepared = prepare(
        ranks, nn.Linear(1024, 2048, bias=False), "2-disk", optimizer_state_dtype=dtype, nvme_paths=paths
    )
    (drive,) = prepared[0].engine.stores.drives
    for _ in range(2):
        before = drive.bytes_read, drive.bytes_written
        prepared[0].model(torch.randn(4, 1024)).square().mean().backward()
        prepared[2].step()
        prepared[2].zero_grad()
        prepared[0].engine.drain()
    (trained,) = prepared[0].trained()
    return drive.bytes_read - before[0], drive.bytes_written - before[1], trained.master.numel


@pytest.mark.parametrize(("dtype", "moment"), [("fp32", 4), ("bf16", 2), ("int8", 1 + 4 / BLOCK)])
def test_what_crosses_the_link_is_counted(world, tmp_path, dtype, moment):
    for read, written, numel in world(2).run(_over_the_drive, str(tmp_path), dtype):
        assert numel == 1 << 20
        assert read == written == numel * (4 + 2 * moment)  # the gradient comes from host memory


# Checkpoints.


class Run:
    """New objects in a new Accelerator. setting: (tier, optimizer_state_dtype, stage); "cpu" visits."""

    def __init__(self, setting: tuple[str, str, int], folder: str, name: str = "AdamW") -> None:
        forget_run()
        tier, dtype, stage = setting
        zero = {"zero_stage": stage, "offload_optimizer_device": tier}
        if tier == "nvme":
            zero["offload_optimizer_nvme_path"] = f"{folder}/drive"
        written = {"distributed_type": "DEEPSPEED", "use_cpu": True, "deepspeed_config": zero}
        written["shardwise_config"] = {"optimizer_state_dtype": dtype}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ENVIRONMENT_KEY, json.dumps(written))
            self.accelerator = Accelerator()
        model = net()
        made = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        self.model, self.optimizer = self.accelerator.prepare(model, made)

    def steps(self, first: int, last: int) -> None:
        ranks = self.accelerator._ranks
        for batch in inputs(last)[first:]:
            self.accelerator.backward(self.model(mine(batch, ranks.rank, ranks.world_size)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def states(self) -> dict[int, dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        return found

    def end(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self.accelerator.get_state_dict(self.model)
        self.accelerator.free_memory()
        return weights


def _goes_on(ranks: Any, folder: str, setting: tuple[str, str, int], name: str) -> None:
    with as_on_a_device():
        run = Run(setting, folder, name)
        run.steps(0, 3)
        run.accelerator.save_state(f"{folder}/state")
        states = run.optimizer.state_dict()
        weights = run.accelerator.get_state_dict(run.model)
        if run.accelerator.is_main_process:
            torch.save((weights, states), f"{folder}/dictionary")
        run.accelerator.wait_for_everyone()
        run.steps(3, 6)
        run.accelerator.load_state(f"{folder}/state")  # into objects that have moments already
        run.steps(3, 6)
        again = run.end()
        for way in ("state", "dictionary"):
            run = Run(setting, folder, name)
            if way == "state":
                run.accelerator.load_state(f"{folder}/state")
            else:
                run.model.load_state_dict(torch.load(f"{folder}/dictionary")[0])
                run.optimizer.load_state_dict(torch.load(f"{folder}/dictionary")[1])
            for number, state in run.states().items():
                assert all(torch.equal(value, states["state"][number][key]) for key, value in state.items())
            run.steps(3, 6)
            for key, value in run.end().items():
                assert torch.equal(value, again[key]), (way, key)
        run = Run(setting, folder, name)
        run.steps(0, 6)
        assert all(torch.equal(value, again[key]) for key, value in run.end().items())


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (("cpu", "int8", 2), "AdamW"),
        (("nvme", "bf16", 3), "AdamW"),
        (("cpu", "bf16", 1), "Adagrad"),
        (("cpu", "int8", 3), "RMSprop"),
        (("cpu", "int8", 2), "Muon"),
    ],
)
def test_a_run_goes_on_to_the_bit(world, tmp_path, setting, name):
    world(2).run(_goes_on, str(tmp_path), setting, name)


def _saved(ranks: Any, folder: str, setting: tuple[str, str, int]) -> Any:
    with as_on_a_device():
        run = Run(setting, folder)
        run.steps(0, 3)
        run.accelerator.save_state(f"{folder}/state")
        found = run.states()
        return found, run.end()


def _loaded(ranks: Any, folder: str, setting: tuple[str, str, int]) -> Any:
    with as_on_a_device():
        run = Run(setting, folder)
        run.accelerator.load_state(f"{folder}/state")
        found = run.states()
        weights = run.accelerator.get_state_dict(run.model)
        run.steps(3, 5)
        assert all(torch.isfinite(value).all() for value in run.end().values())
        return found, weights


INT8, BF16, FP32 = ("cpu", "int8", 2), ("cpu", "bf16", 3), ("none", "fp32", 1)


@pytest.mark.parametrize(
    ("first", "ranks", "then", "others", "bound"),
    [
        (INT8, 2, FP32, 1, 0.0),
        (BF16, 2, ("nvme", "fp32", 3), 2, 0.0),
        (FP32, 2, INT8, 2, 0.02),
        (FP32, 1, ("cpu", "bf16", 2), 2, 2**-8),
        (INT8, 2, INT8, 1, 0.02),
        (("nvme", "bf16", 2), 2, BF16, 1, 0.0),
    ],
)
def test_a_checkpoint_is_of_numbers_and_loads_into_any_setting(world, tmp_path, first, ranks, then, others, bound):
    (states, weights), *_ = world(ranks).run(_saved, str(tmp_path), first)
    (found, loaded), *_ = world(others).run(_loaded, str(tmp_path), then)
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    for number, state in states.items():
        for key, value in state.items():
            assert found[number][key].dtype == torch.float32
            error = (found[number][key] - value).norm() / value.norm()
            assert error <= bound, (number, key)


# What is said.


def _said(ranks: Any, plan: str, name: str, dtype: str, *, visits: bool) -> list[str]:
    with heard() as said, as_on_a_device() if visits else heard():
        prepared = prepare(ranks, net(), plan, optimizer=OPTIMIZERS[name], optimizer_state_dtype=dtype)
        _steps(ranks, prepared, 2)
    return [text for text in said if "optimizer_state_dtype" in text]


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("2", "nothing of the optimizer is offloaded"),
        ("2-opt", "a run on CPUs steps what rests on cpu in place, in fp32; offload_optimizer_device nvme is coded"),
    ],
)
def test_where_it_has_no_effect_that_is_said_once(world, plan, why):
    said = world(2).run(_said, plan, "AdamW", "int8", visits=False)
    assert said == [[f"optimizer_state_dtype: has no effect: {why}."], []]


def test_a_state_that_is_no_moment_rests_as_it_is_and_that_is_said_once(world):
    text = "optimizer_state_dtype: the state z is no moment that is known, and rests as it is."
    assert world(2).run(_said, "1-disk", "Signs", "bf16", visits=True) == [[text], []]
    assert world(2).run(_said, "1-disk", "AdamW", "bf16", visits=True) == [[], []]


def _kept_on_the_device(ranks: Any) -> None:
    from shardwise.step.residency import _keep_optimizer

    with as_on_a_device():
        prepared = prepare(ranks, net(), "2-opt", optimizer_state_dtype="int8")
        _steps(ranks, prepared, 2)
        sharded, stepper, stepping = prepared
        before = stepping.state_dict()["state"]
        for unit in sharded.units:
            if unit.trained is not None:
                _keep_optimizer(sharded, unit, stepping, stepper.groups.stepped)
        for number, state in stepping.state_dict()["state"].items():
            assert all(torch.equal(value, before[number][key]) for key, value in state.items())
        _steps(ranks, prepared, 2)


def test_moments_that_a_budget_moves_to_the_device_are_numbers_there(world):
    world(2).run(_kept_on_the_device)


def test_the_setting_is_one_of_three():
    assert EngineConfig().optimizer_state_dtype == "fp32"
