"""Numbers and dtypes as a script expects them: fp32 for its eyes, whatever computes, at every stage and in every precision."""

from __future__ import annotations

import copy
import io
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.run.process import forget_run

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = sorted(DTYPES)
OFFLOADED = 2.5  # stage 2, masters in host memory


class Cache:
    def __init__(self, state):
        self.state = state


@dataclass
class Answer:
    logits: Any
    hidden: Any = None
    cache: Any = None


class Out(dict):
    """A mapping of a class of its own, with an attribute of its own."""


Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.kind = "plain"

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        x = x + self.frozen(x)
        out = self.head(x)
        if self.kind == "nested":
            made = Out(tensor=out, pair=Pair(x, [out, "text"]), whole=x.float(), answer=Answer(out, (x,), Cache(x)))
            made.note = self.kind
            return made
        return out


def fresh(precision, stage):
    forget_run()
    plugin = DeepSpeedPlugin(zero_stage=int(stage)) if stage else None
    if stage == OFFLOADED:
        plugin.offload_optimizer_device = "cpu"
    return Accelerator(cpu=True, mixed_precision=precision, deepspeed_plugin=plugin)


def prepared(precision, stage, dtype=torch.float32, rate=0.01):
    accelerator = fresh(precision, stage)
    model = Net().to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    return accelerator, *accelerator.prepare(model, optimizer)


def batch(rank=0):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(7 + rank))


def train(accelerator, model, optimizer, steps=2):
    for _ in range(steps):
        loss = (model(batch(accelerator.process_index)) ** 2).mean()
        assert loss.dtype == torch.float32
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def _outputs(ranks, precision, stage, dtype):
    accelerator, model, optimizer = prepared(precision, stage, dtype)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    train(accelerator, model, optimizer)
    with torch.no_grad():
        model.eval()
        seen.append(model(batch()).dtype)
    inner = model.blocks[0]
    inner.register_forward_hook(lambda module, args, out: seen.append(("inside", out.dtype)))
    with torch.no_grad():
        model(batch())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_outputs_and_losses_are_fp32_in_training_and_evaluation(world, n, precision, stage, dtype):
    if precision == "no" and dtype == torch.bfloat16:
        pytest.skip("without mixed precision a model in 16 bits gives what it computes, as in plain torch")
    for seen in world(n).run(_outputs, precision, stage, dtype):
        *outer, inside, _ = seen
        assert set(outer) == {torch.float32}
        assert inside == ("inside", DTYPES[precision])  # what computes is the precision's


def _nested(ranks, precision):
    accelerator, model, _ = prepared(precision, 0)
    model.kind = "nested"
    out = model(batch())
    cache = out["answer"].cache.state.dtype
    assert type(out) is Out
    assert out.note == "nested"
    assert type(out["pair"]) is Pair
    assert type(out["answer"]) is Answer
    assert out["pair"].second[1] == "text"
    short = [out["tensor"], *out["pair"][:1], out["pair"][1][0], out["answer"].logits, out["answer"].hidden[0]]
    assert {t.dtype for t in short} == {torch.float32}
    out["answer"].logits.sum().backward()
    assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
    assert model(batch())["tensor"].dtype == DTYPES[precision]
    return cache


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nested_outputs_keep_their_types_and_objects_of_the_models_own_are_left_alone(world, precision):
    assert world(1).run(_nested, precision) == [DTYPES[precision]]


def test_what_is_fp32_already_is_the_very_object():
    from shardwise.tuning.outputs import in_fp32

    tensor = torch.ones(2)
    for value in (
        tensor,
        [tensor],
        {"a": (tensor, 3)},
        Answer(tensor),
        Pair(tensor, None),
        Out(a=tensor),
        "text",
        None,
    ):
        assert in_fp32(value) is value


def test_outputs_of_transformers_keep_their_type():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    from shardwise.tuning.outputs import in_fp32

    short = torch.ones(2, dtype=torch.bfloat16)
    given = outputs.CausalLMOutputWithPast(loss=short, logits=torch.ones(3), hidden_states=(short, short))
    found = in_fp32(given)
    assert type(found) is type(given)
    assert list(found.keys()) == list(given.keys())
    assert found.loss.dtype == found["hidden_states"][1].dtype == torch.float32
    assert found.loss is found["loss"] is found[0]
    assert found.logits is given.logits
    assert given.loss is short


def _state(ranks, precision, stage):
    accelerator, model, optimizer = prepared(precision, stage)
    train(accelerator, model, optimizer)
    masters = accelerator.get_state_dict(model)
    with shardwise.gathered(model):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        part = {name: value.clone() for name, value in model.head.state_dict().items()}
    file = io.BytesIO()
    if ranks.rank == 0 and not (stage == 3 and ranks.world_size > 1):  # under `if is_main_process`: nobody waits
        torch.save(accelerator.unwrap_model(model).state_dict(), file)
        file.seek(0)
        read = torch.load(file)
        assert all(torch.equal(value, state[name]) for name, value in read.items())
    train(accelerator, model, optimizer, 1)  # reading has changed nothing
    return masters, state, part


@pytest.mark.parametrize("stage", [0, 2, OFFLOADED, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_a_state_dict_has_the_masters_where_a_rank_has_them_whole_and_else_what_computes(world, n, precision, stage):
    (masters, *_), *_ = found = world(n).run(_state, precision, stage)
    whole = (n == 1 or stage == 0) and stage != OFFLOADED
    for _, state, part in found:
        assert state.keys() == masters.keys()
        for name, value in state.items():
            if whole and "frozen" not in name:
                assert value.dtype == torch.float32
                assert torch.equal(value, masters[name])
            else:
                assert value.dtype == DTYPES[precision]
                assert torch.equal(value, masters[name].to(value.dtype))
        assert torch.equal(part["weight"], state["head.weight"])
        assert part["weight"].dtype == state["head.weight"].dtype


def _short_model(ranks):
    accelerator, model, optimizer = prepared("bf16", 0, torch.bfloat16)
    train(accelerator, model, optimizer)
    return {value.dtype for value in model.state_dict().values()}


def test_a_model_that_came_in_16_bits_has_a_state_dict_of_16_bits(world):
    assert world(1).run(_short_model) == [{torch.bfloat16}]


def _round_trip(ranks, precision, stage, modify):
    accelerator, model, optimizer = prepared(precision, stage)
    train(accelerator, model, optimizer)
    kept = accelerator.get_state_dict(model)
    kept = ranks.broadcast_object(kept)
    train(accelerator, model, optimizer, 3)
    if modify is None:
        model.load_state_dict(kept)
    else:
        with shardwise.gathered(model, modify=modify):
            if not modify or ranks.rank == 0:
                model.load_state_dict(kept)
    with torch.no_grad():
        out = model(batch())
    after = ranks.broadcast_object(accelerator.get_state_dict(model))
    train(accelerator, model, optimizer, 1)
    last = accelerator.get_state_dict(model)
    with shardwise.gathered(model):
        weights = [p.detach().clone() for p in model.parameters()]
    return kept, after, out, last, weights


@pytest.mark.parametrize("stage", [0, 2, OFFLOADED, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_loading_a_state_dict_of_masters_gives_those_masters_to_the_bit(world, n, precision, stage):
    found = world(n).run(_round_trip, precision, stage, False if stage == 3 else None)
    kept, after, out, last, _ = found[0]
    for name, value in kept.items():
        assert torch.equal(after[name], value), name
    assert any(not torch.equal(value, kept[name]) for name, value in last.items())
    for _, _, other, _, weights in found[1:]:
        assert torch.equal(other, out)
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0][4], strict=True))


@pytest.mark.parametrize("stage", [0, 3])
def test_loading_on_the_first_rank_alone_leaves_no_rank_with_masters_of_its_own(world, stage):
    found = world(2).run(_round_trip, "bf16", stage, True)
    kept, after, _, _, _ = found[0]
    for name, value in kept.items():
        assert torch.equal(after[name].bfloat16(), value.bfloat16()), name
    assert all(torch.equal(a, b) for a, b in zip(found[0][4], found[1][4], strict=True))


def _written(ranks, precision):
    accelerator, model, optimizer = prepared(precision, 0)
    train(accelerator, model, optimizer)
    state = model.state_dict()
    state["head.weight"].fill_(0.123456)
    with torch.no_grad():
        model.head.bias.zero_()
        state["head.bias"].add_(0.0)
        model(batch())
    seen = model.head.weight.detach().clone()
    train(accelerator, model, optimizer, 1)
    state["head.weight"].fill_(0.654321)  # it shows the weights of now, as in torch
    return seen, accelerator.get_state_dict(model).get("head.weight")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_written_into_a_state_dict_is_in_the_model(world, precision):
    for seen, master in world(2).run(_written, precision):
        assert (seen == torch.tensor(0.123456).to(DTYPES[precision])).all()
        if master is not None:
            assert (master == 0.654321).all()
            break


def _released(ranks):
    _, model, _ = prepared("bf16", 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with shardwise.gathered(model):
        for name, value in model.state_dict().items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(state[name], value)


def test_a_state_dict_of_released_weights_that_every_rank_asks_for_has_those_that_compute(world):
    world(2).run(_released)


def _copied(ranks):
    accelerator, model, optimizer = prepared("bf16", 0)
    train(accelerator, model, optimizer)
    model.state_dict()
    twin = copy.deepcopy(model)
    out = twin(batch().bfloat16())
    twin.load_state_dict(model.state_dict())
    assert model(batch()).dtype == torch.float32
    assert all(value.dtype == torch.bfloat16 for value in twin.state_dict().values())
    accelerator.free_memory()
    return out.dtype, {value.dtype for value in model.state_dict().values()}, model(batch()).dtype


def test_a_copy_and_a_released_model_are_plain_ones(world):
    assert world(1).run(_copied) == [(torch.bfloat16, {torch.float32}, torch.float32)]


def _as_deepspeed(ranks):
    from shardwise.compat.deepspeed.entry import initialize

    forget_run()
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    model = Net()
    engine, *_ = initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
    found = engine(batch()).dtype, {value.dtype for value in engine.module.state_dict().values()}
    engine.destroy()
    return found


def test_what_answers_for_deepspeed_keeps_deepspeeds_dtypes(world):
    assert world(1).run(_as_deepspeed) == [(torch.bfloat16, {torch.bfloat16})]
