"""`optimizer.state_dict()` and `load_state_dict` of a prepared optimizer are those of the optimizer as it was before."""

from __future__ import annotations

import copy
import datetime
import io
import re
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rig.engine import Tower, inputs, mine, prepare
from rig.heard import heard
from shardwise.errors import OptimizerError, RankError, StoreError
from shardwise.plan.plan import Tier

PLANS = ("0", "1", "3", "3-all", "3-disk")


class Scaled(Tower):
    """A tower with a temperature, which has no dimensions, and a frozen block."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature.exp()


def scaled() -> Scaled:
    torch.manual_seed(5)
    return Scaled()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Biases before weights, the frozen ones among them."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        {"params": [p for n, p in named if not n.endswith("bias")], "lr": 5e-3},
    ]


OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(groups_of(m), lr=3e-3, eps=1e-4),
    "Adagrad": lambda m: torch.optim.Adagrad(groups_of(m), lr=1e-2, initial_accumulator_value=0.1, eps=1e-4),
    "ASGD": lambda m: torch.optim.ASGD(groups_of(m), lr=1e-2),
    "SGD": lambda m: torch.optim.SGD(groups_of(m), lr=1e-2, momentum=0.9),
    "NAdam by name": lambda m: torch.optim.NAdam(m.named_parameters(), lr=3e-3, eps=1e-4),
}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def _prepared(ranks: Any, plan: str, make: Any, **settings: Any) -> tuple[Any, Any, Any]:
    model = scaled()
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda _: make(model), **settings)
    return sharded, model, stepping


def _plain(make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = scaled()
    return model, make(model)


def _step(ranks: Any, model: nn.Module, optimizer: Any, batch: Tensor) -> None:
    _loss(model, mine(batch, ranks.rank, ranks.world_size)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _plain_step(ranks: Any, model: nn.Module, optimizer: Any, batch: Tensor) -> None:
    for rank in range(ranks.world_size):
        (_loss(model, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
    optimizer.step()
    optimizer.zero_grad()


def check_alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    """The same keys, settings, shapes and dtypes, and equal values. Of frozen weights nothing is kept."""
    assert list(found) == list(expected) == ["state", "param_groups"]
    assert found["param_groups"] == expected["param_groups"]
    assert set(found["state"]) <= set(expected["state"])
    for index in set(expected["state"]) - set(found["state"]):
        assert float(expected["state"][index]["step"]) == 0, "a constructor's, of a frozen weight"
    for index, state in found["state"].items():
        assert set(state) == set(expected["state"][index])
        for key, value in state.items():
            other = expected["state"][index][key]
            if isinstance(other, Tensor):
                assert (value.shape, value.dtype, value.device) == (other.shape, other.dtype, other.device), (
                    index,
                    key,
                )
                assert (value - other).abs().max() <= tolerance, (index, key)
            else:
                assert value == other


def check_same_weights(sharded: Any, reference: nn.Module, tolerance: float = 1e-6) -> None:
    with sharded.gathered():
        for (name, p), other in zip(sharded.model.named_parameters(), reference.parameters(), strict=True):
            assert (p - other).abs().max() <= tolerance, name


@contextmanager
def _small_rounds(nbytes: int) -> Any:
    from shardwise.step import exchange

    whole, exchange.ROUND_NBYTES = exchange.ROUND_NBYTES, nbytes
    try:
        yield
    finally:
        exchange.ROUND_NBYTES = whole  # the ranks are those of the tests to come


def _there_and_back(ranks: Any, plan: str, name: str) -> None:
    make = OPTIMIZERS[name]
    batches = inputs(9)
    reference, plain = _plain(make)
    sharded, model, stepping = _prepared(ranks, plan, make)
    check_alike(stepping.state_dict(), plain.state_dict())
    for batch in batches[:3]:
        _plain_step(ranks, reference, plain, batch)
        _step(ranks, model, stepping, batch)
    for nbytes in (40, 16 << 20):
        with _small_rounds(nbytes):
            found = stepping.state_dict()
        check_alike(found, plain.state_dict())
    assert ranks.gather_objects(_sums(found)) == [_sums(found)] * ranks.world_size

    # Into an optimizer that was never prepared, over the weights as they are now.
    other, unprepared = _plain(make)
    with sharded.gathered():
        other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    unprepared.load_state_dict(torch.load(file))
    for batch in batches[3:6]:
        _plain_step(ranks, reference, plain, batch)
        _plain_step(ranks, other, unprepared, batch)
        _step(ranks, model, stepping, batch)
    check_same_weights(sharded, reference)
    check_same_weights(sharded, other)

    # From one that was never prepared, into a new one.
    anew = scaled()
    anew.load_state_dict(other.state_dict())
    sharded, _, stepping = prepare(ranks, anew, plan, optimizer=lambda _: make(anew))
    given = copy.deepcopy(unprepared.state_dict())
    stepping.load_state_dict(given)
    before = _sums(given)
    for batch in batches[6:]:
        _plain_step(ranks, reference, plain, batch)
        _step(ranks, anew, stepping, batch)
    check_same_weights(sharded, reference)
    check_alike(stepping.state_dict(), plain.state_dict())
    assert _sums(given) == before, "what was loaded is the caller's own"


def _sums(state_dict: dict[str, Any]) -> list[Any]:
    return [
        (index, key, float(value.double().sum()) if isinstance(value, Tensor) else value)
        for index, state in state_dict["state"].items()
        for key, value in state.items()
    ]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS)
def test_the_dictionary_is_torchs_and_goes_both_ways(world, plan, name):
    world(2).run(_there_and_back, plan, name)


@pytest.mark.parametrize(("plan", "n"), [("0", 1), ("3-disk", 1), ("0", 3), ("2", 3), ("3-all", 3)])
def test_the_dictionary_is_torchs_on_any_number_of_ranks(world, plan, n):
    world(n).run(_there_and_back, plan, "AdamW")


def _rolled_back(ranks: Any, plan: str) -> None:
    """Bit for bit, in the same process: what was trained since is undone, settings included."""
    sharded, model, stepping = _prepared(ranks, plan, OPTIMIZERS["AdamW"])
    for batch in inputs(3):
        _step(ranks, model, stepping, batch)
    states = stepping.state_dict()
    rates = [group["lr"] for group in stepping.param_groups]
    with sharded.gathered():
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    runs = []
    for _ in range(2):
        for group in stepping.param_groups:
            group["lr"] *= 0.9
        for batch in inputs(3, seed=8):
            _step(ranks, model, stepping, batch)
        runs.append(sharded.state_dict())
        with sharded.gathered(modify=True), torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        stepping.load_state_dict(states)
        assert [group["lr"] for group in stepping.param_groups] == rates
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("plan", PLANS)
def test_a_roll_back_is_exact(world, plan):
    world(2).run(_rolled_back, plan)


def _hooked(ranks: Any, plan: str) -> None:
    _, model, stepping = _prepared(ranks, plan, OPTIMIZERS["AdamW"])
    _step(ranks, model, stepping, inputs(1)[0])
    seen: list[Any] = []
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups_of(model)]

    def shapes_in(optimizer: Any) -> bool:
        return [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups] == shapes

    def after_give(optimizer: Any, state_dict: Any) -> Any:
        assert optimizer is stepping
        seen.append(("gave", shapes_in(optimizer), state_dict["state"][0]["exp_avg"].shape))
        return {**state_dict, "mine": 3}

    def before_take(optimizer: Any, state_dict: Any) -> Any:
        seen.append(("takes", shapes_in(optimizer), state_dict.pop("mine")))
        state_dict["state"] = {k: {**v, "exp_avg": v["exp_avg"] * 2} for k, v in state_dict["state"].items()}
        return state_dict

    stepping.register_state_dict_pre_hook(lambda optimizer: seen.append(("gives", shapes_in(optimizer))))
    stepping.register_state_dict_post_hook(after_give)
    stepping.register_load_state_dict_pre_hook(before_take)
    stepping.register_load_state_dict_post_hook(lambda optimizer: seen.append(("took", shapes_in(optimizer))))
    held = [group["params"] for group in stepping.param_groups]
    first = stepping.state_dict()
    stepping.load_state_dict(first)
    second = stepping.state_dict()
    assert [group["params"] for group in stepping.param_groups] == held
    gave = [("gives", True), ("gave", True, first["state"][0]["exp_avg"].shape)]
    assert seen == [*gave, ("takes", True, 3), ("took", True), *gave]
    assert torch.equal(second["state"][0]["exp_avg"], first["state"][0]["exp_avg"] * 2)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_hooks_run_where_torch_runs_them(world, plan):
    world(2).run(_hooked, plan)


class Counting(torch.optim.SGD):
    """Keeps a number of its own under a key that is no parameter, and adds to its dictionary, as a class may."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2, momentum=0.9)

    def step(self, closure: Any = None) -> Any:
        self.state["all"]["seen"] = self.state["all"].get("seen", 0) + 1  # type: ignore[index]
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "version": 2}


def _of_its_class(ranks: Any, plan: str) -> None:
    from shardwise.step.optimizer import find_sharded_optimizer

    _, model, stepping = _prepared(ranks, plan, lambda m: Counting(m.parameters()))
    for batch in inputs(2):
        _step(ranks, model, stepping, batch)
    found = stepping.state_dict()
    assert found["version"] == 2
    assert found["state"]["all"] == {"seen": 2}
    _, model, stepping = _prepared(ranks, plan, lambda m: Counting(m.parameters()))
    stepping.load_state_dict(copy.deepcopy(found))
    _step(ranks, model, stepping, inputs(1)[0])
    assert stepping.state_dict()["state"]["all"] == {"seen": 3}
    bystander = torch.optim.SGD([nn.Parameter(torch.zeros(2))], momentum=0.9)
    assert find_sharded_optimizer(bystander) is None
    assert "state_dict" not in vars(bystander)
    assert "load_state_dict" not in vars(bystander)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_what_the_class_adds_and_keeps_beside_parameters_is_there(world, plan):
    world(2).run(_of_its_class, plan)


def _spoilt(state_dict: dict[str, Any], how: str) -> Any:
    spoilt = copy.deepcopy(state_dict)
    if how == "a group less":
        del spoilt["param_groups"][1]
    elif how == "a parameter less":
        spoilt["param_groups"][0]["params"].pop()
    elif how == "a part of a state":
        spoilt["state"][0]["exp_avg"] = spoilt["state"][0]["exp_avg"][:2]
    elif how == "a flat state":
        number = next(n for n, state in spoilt["state"].items() if state["exp_avg"].ndim == 2)
        spoilt["state"][number]["exp_avg"] = spoilt["state"][number]["exp_avg"].reshape(-1)
    elif how == "no groups":
        del spoilt["param_groups"]
    elif how == "another step":
        spoilt["state"][0]["step"] += 1
    elif how == "another rate":
        spoilt["param_groups"][0]["lr"] = 0.5
    return spoilt


def _refused(ranks: Any, plan: str, how: str, where: tuple[int, ...]) -> str:
    _, model, stepping = _prepared(ranks, plan, OPTIMIZERS["AdamW"])
    for batch in inputs(2):
        _step(ranks, model, stepping, batch)
    good = stepping.state_dict()
    given = _spoilt(good, how) if ranks.rank in where else good
    with pytest.raises((OptimizerError, RankError, KeyError)) as caught:
        stepping.load_state_dict(given)
    check_alike(stepping.state_dict(), good, 0.0)
    _step(ranks, model, stepping, inputs(1)[0])
    return f"{type(caught.value).__name__}: {caught.value}"


WORDS = {
    "a group less": "different number of parameter groups. Nothing was loaded. It has 2 parameter group(s)",
    "a parameter less": "doesn't match the size of optimizer's group. Nothing was loaded",
    "a part of a state": "the state exp_avg of parameter 0 (first.bias) has shape (2,), but the parameter's is (12,)",
    "a flat state": "Nothing was loaded. The dictionary is of another model, or a part of one",
    "no groups": "param_groups",
}


@pytest.mark.parametrize("where", [(1,), (0, 1)])
@pytest.mark.parametrize("how", WORDS)
def test_a_dictionary_that_does_not_fit_is_one_error_everywhere_and_changes_nothing(world, how, where):
    for text in world(2).run(_refused, "3", how, where):
        assert WORDS[how] in text


@pytest.mark.parametrize("how", ["another step", "another rate"])
@pytest.mark.parametrize("plan", ["0", "3-disk"])
def test_ranks_that_load_different_dictionaries_are_told(world, plan, how):
    for text in world(2).run(_refused, plan, how, (1,)):
        assert "one dictionary on rank 0 and another on rank 1" in text


def _alone(ranks: Any, verb: str) -> Any:
    """The usual `if main:`; then all ranks, to whom nothing has happened."""
    _, model, stepping = _prepared(ranks, "2", OPTIMIZERS["AdamW"])
    _step(ranks, model, stepping, inputs(1)[0])
    state = stepping.state_dict()
    ranks._timeout, timeout = datetime.timedelta(seconds=1.5), ranks._timeout
    assemble = type(ranks).assemble
    type(ranks).assemble = lambda self, call, where="": assemble(self, call, where, say_after_s=0.3)  # type: ignore[method-assign]
    text = ""
    try:
        with heard() as lines:
            if ranks.rank == 0:
                with pytest.raises(RankError) as caught:
                    getattr(stepping, verb)(*[state][: verb == "load_state_dict"])
                text = str(caught.value)
    finally:
        ranks._timeout = timeout
        type(ranks).assemble = assemble  # type: ignore[method-assign]
    ranks.barrier()
    stepping.load_state_dict(stepping.state_dict())
    _step(ranks, model, stepping, inputs(1)[0])
    return text, lines


@pytest.mark.parametrize(("verb", "where"), [("state_dict", " under zero_stage 2"), ("load_state_dict", "")])
def test_a_rank_that_calls_alone_says_so_and_ends_in_one_error(world, verb, where):
    rule = f"optimizer.{verb}() is collective{where}: call it on every rank, not only on the main process."
    (text, lines), (_, others) = world(2).run(_alone, verb)
    waited = re.escape(rule) + r" Rank 0 has waited \d+ s for rank 1"
    assert re.search(waited + ", which did not call it.", text)
    assert text.startswith("rank 1 keeps the others waiting: ")
    assert len(lines) == 1
    assert re.fullmatch(waited + ".", lines[0])
    assert others == []


def _without_a_message(ranks: Any, plan: str) -> None:
    _, model, stepping = _prepared(ranks, plan, OPTIMIZERS["AdamW"])
    _step(ranks, model, stepping, inputs(1)[0])
    ranks.counts.clear()
    if ranks.rank == 0:  # alone: nobody is there to answer
        stepping.state_dict()
    assert not ranks.counts
    ranks.barrier()


def test_where_nothing_is_sharded_no_rank_needs_another(world):
    world(2).run(_without_a_message, "0")
    world(1).run(_without_a_message, "3-disk")


def _two_optimizers(ranks: Any, plan: str) -> None:
    """Over one model, whose units they share; each loads for itself."""
    from rig.engine import adamw, shard, trained
    from shardwise.step.optimizer import ShardedOptimizer

    model = scaled()
    sharded = shard(ranks, model, plan)
    halves = [trained(model)[0::2], trained(model)[1::2]]
    pair = [adamw(halves[0]), torch.optim.RMSprop(halves[1], lr=1e-3, momentum=0.9, eps=1e-4)]
    for optimizer in pair:
        ShardedOptimizer(optimizer, [sharded])

    def step(batch: Tensor) -> None:
        _loss(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in pair:
            optimizer.step()
        for optimizer in pair:
            optimizer.zero_grad()

    for batch in inputs(2):
        step(batch)
    kept = [optimizer.state_dict() for optimizer in pair]
    step(inputs(1)[0])
    later = [optimizer.state_dict() for optimizer in pair]
    pair[0].load_state_dict(kept[0])
    check_alike(pair[0].state_dict(), kept[0], 0.0)
    check_alike(pair[1].state_dict(), later[1], 0.0)
    pair[1].load_state_dict(kept[1])
    check_alike(pair[0].state_dict(), kept[0], 0.0)
    check_alike(pair[1].state_dict(), kept[1], 0.0)


@pytest.mark.parametrize("plan", ["1", "3", "3-disk"])
def test_one_of_two_optimizers_loads_without_touching_the_other(world, plan):
    world(2).run(_two_optimizers, plan)


def _files(ranks: Any, folder: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(number, bytes) of the files of states on the drive, before and after loading again."""
    paths = dict.fromkeys(("param", "optimizer"), folder)
    sharded, model, stepping = _prepared(ranks, "3-disk", OPTIMIZERS["AdamW"], nvme_paths=paths)
    _step(ranks, model, stepping, inputs(1)[0])
    store = sharded.engine.stores.of(Tier.NVME, "optimizer")
    before = store.open_files, store.nbytes
    for _ in range(3):
        stepping.load_state_dict(stepping.state_dict())
    return before, (store.open_files, store.nbytes)


def test_loading_again_takes_no_more_room_on_a_drive(world, tmp_path):
    for before, after in world(2).run(_files, str(tmp_path)):
        assert before == after
        assert all(number > 0 for number in before)


def _failing_drive(ranks: Any) -> str:
    from shardwise.offload.nvme import FileSlab

    _, model, stepping = _prepared(ranks, "3-disk", OPTIMIZERS["AdamW"])
    _step(ranks, model, stepping, inputs(1)[0])
    real = FileSlab.read_part

    def failing(*_: Any) -> Any:
        raise StoreError("rank 1 could not read it.")

    if ranks.rank == 1:
        FileSlab.read_part = failing
    try:
        with pytest.raises((StoreError, RankError)) as caught:
            stepping.state_dict()
    finally:
        FileSlab.read_part = real
    check_alike(stepping.state_dict(), stepping.state_dict(), 0.0)
    return str(caught.value)


def test_a_drive_that_fails_on_one_rank_is_every_ranks_error(world):
    assert all("rank 1 could not read it" in text for text in world(2).run(_failing_drive))


def _loaded_before(ranks: Any, plan: str, where: tuple[int, ...]) -> str:
    """The plain order: build, load, prepare."""
    make = OPTIMIZERS["AdamW"]
    reference, plain = _plain(make)
    for batch in inputs(3):
        _plain_step(ranks, reference, plain, batch)
    model = scaled()
    model.load_state_dict(reference.state_dict())
    optimizer = make(model)
    if ranks.rank in where:
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    try:
        sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda _: optimizer)
    except OptimizerError as error:
        return str(error)
    check_alike(stepping.state_dict(), plain.state_dict())
    for batch in inputs(3, seed=9):
        _plain_step(ranks, reference, plain, batch)
        _step(ranks, model, stepping, batch)
    check_same_weights(sharded, reference)
    return ""


@pytest.mark.parametrize("plan", PLANS)
def test_an_optimizer_that_has_loaded_before_it_is_prepared_goes_on(world, plan):
    assert world(2).run(_loaded_before, plan, (0, 1)) == ["", ""]


def test_states_that_only_one_rank_has_loaded_before_prepare_are_refused(world):
    for text in world(2).run(_loaded_before, "2", (0,)):
        assert "this AdamW has other states on rank 1 than on rank 0" in text


def _without_memory(ranks: Any, stage: int) -> None:
    """Adagrad's constructor runs over a model that has no values yet."""
    from shardwise import Accelerator, DeepSpeedPlugin
    from shardwise.run.process import forget_run
    from shardwise.zero.sharded import find_sharded

    def build() -> nn.Module:
        torch.manual_seed(4)
        return Tower(depth=1, width=480)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)

    reference = build()
    plain = make(reference)
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))
    with accelerator.init():
        model = build()
    assert any(p.is_meta for p in model.parameters())
    model, optimizer = accelerator.prepare(model, make(model))
    for batch in inputs(3):
        _plain_step(ranks, reference, plain, batch)
        loss = _loss(model, mine(batch, ranks.rank, ranks.world_size))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    check_same_weights(find_sharded(model), reference)
    check_alike(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("stage", [2, 3])
def test_states_that_a_constructor_made_without_memory_have_its_values(world, stage):
    world(2).run(_without_memory, stage)
