"""What a script does to weights without memory between building and prepare: never lost, or an error at that call."""

from __future__ import annotations

import copy
import io
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn.init import orthogonal_
from transformers import LlamaForCausalLM

from rig.engine import shard, weights_of
from rig.tiny import tiny_llama
from shardwise import Accelerator, DeepSpeedPlugin, gathered
from shardwise.building import initialising
from shardwise.building.deferred_tensors import deferred_if_it_fails, sources_of
from shardwise.building.initialising import is_deferred
from shardwise.building.loading import building
from shardwise.errors import PrepareError
from shardwise.run.process import forget_run


def _values(shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _quietly(action):
    with torch.no_grad():
        action()


def _half_rows(model):
    weight = model.lm_head.weight
    weight.data[3:5] = 0
    weight.data[7, 2:] = 1.5
    weight.data[weight.data > 1.0] = -1.0


def _into_another_weight(model):
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers[:2])
    with torch.no_grad():
        second.copy_(first * 2 + 1)
        first.copy_(second.flip(0))


def _own_state(model):
    state = {name: _values(p.shape, seed) for seed, (name, p) in enumerate(model.named_parameters())}
    model.load_state_dict(state, strict=False)


def _state_of_itself(model):
    state = {name: value * 2 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def _through_kept_views(model):
    kept = model.lm_head.weight.detach()
    row, flat = kept[1], kept.view(-1)
    row.zero_()
    flat[-3:].add_(5)


def _assigned(model):
    model.lm_head.weight.data = _values(model.lm_head.weight.shape)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data * 3


def _new_parameters(model):
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.data.clone())
    head.weight.data.mul_(0.5)
    model.model.embed_tokens.weight = nn.Parameter(_values(model.model.embed_tokens.weight.shape))
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight, requires_grad=False)
    assert isinstance(projection.weight, nn.Parameter)
    assert not isinstance(projection.weight.detach(), nn.Parameter)
    projection.weight.mul_(0.25)


def _drawn(model):
    torch.manual_seed(9)
    nn.init.normal_(model.lm_head.weight, std=0.3)
    nn.init.trunc_normal_(model.model.embed_tokens.weight, std=0.3)
    nn.init.orthogonal_(model.model.layers[0].mlp.up_proj.weight)
    orthogonal_(model.model.layers[1].mlp.up_proj.weight)
    nn.init.sparse_(model.model.layers[1].mlp.down_proj.weight, 0.5)
    _quietly(lambda: model.model.layers[0].self_attn.q_proj.weight.uniform_(-1, 1))


def _all_at_once(model):
    weights = [layer.mlp.gate_proj.weight.data for layer in model.model.layers]
    torch._foreach_mul_(weights, 3.0)
    torch._foreach_add_(weights, [_values(weight.shape) for weight in weights])


def _out(model):
    weight = model.lm_head.weight.data
    torch.mul(weight, 2.0, out=weight)
    torch.add(_values(weight.shape), weight, out=model.model.embed_tokens.weight.data)


def _copied(model):
    model.other = copy.deepcopy(model.lm_head)
    model.other.weight.data.add_(1)


WRITES = {
    "zeros_": lambda model: nn.init.zeros_(model.lm_head.weight),
    "copy_ into data": lambda model: model.lm_head.weight.data.copy_(_values(model.lm_head.weight.shape)),
    "rows": _half_rows,
    "mul_": lambda model: _quietly(lambda: model.lm_head.weight.mul_(2)),
    "from another weight": _into_another_weight,
    "load_state_dict": _own_state,
    "its own state": _state_of_itself,
    "kept views": _through_kept_views,
    "data =": _assigned,
    "new parameters": _new_parameters,
    "draws": _drawn,
    "foreach": _all_at_once,
    "out=": _out,
    "resize and tie": lambda model: (model.resize_token_embeddings(70, mean_resizing=False), model.tie_weights()),
    "tied by hand": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
    "set_": lambda model: _quietly(lambda: model.lm_head.weight.set_(model.model.embed_tokens.weight.clone())),
    "half": lambda model: model.to(torch.bfloat16).float(),
    "cpu": lambda model: model.cpu().double().float(),
    "init_weights": lambda model: [model._init_weights(module) for module in model.modules()],
    "deepcopy": _copied,
}


def _written(ranks, name):
    initialising.SMALL_NUMEL = 1
    write = WRITES[name]
    torch.manual_seed(3)
    expected = tiny_llama()
    write(expected)
    torch.manual_seed(3)
    with building():
        model = tiny_llama()
    assert all(is_deferred(parameter) for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model)
    wanted = dict(expected.named_parameters())
    for read, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().cpu(), wanted[read]), read
    sharded = shard(ranks, model, "3", "no", sources=sources_of(model))
    found = weights_of(sharded)
    assert found.keys() == wanted.keys()
    for read, value in wanted.items():
        assert torch.equal(found[read], value), read


@pytest.mark.parametrize("name", WRITES)
def test_a_write_between_building_and_prepare_is_not_lost(world, name):
    world(2).run(_written, name)


READS = {
    "item": lambda model: model.lm_head.weight.sum().item(),
    "tolist": lambda model: model.lm_head.weight.tolist(),
    "numpy": lambda model: model.lm_head.weight.detach().numpy().sum(),
    "asarray": lambda model: numpy.asarray(model.lm_head.weight.detach()).sum(),
    "norms": lambda model: [float(p.detach().norm()) for p in model.parameters()],
    "equal": lambda model: torch.equal(model.lm_head.weight, model.model.embed_tokens.weight),
    "if": lambda model: bool((model.lm_head.weight.abs() > 0).all()),
    "forward": lambda model: model(torch.arange(8)[None]).logits.sum().item(),
    "saved": lambda model: _through_a_file(model.state_dict()),
    "a whole model saved": lambda model: _through_a_file(model).lm_head.weight.sum().item(),
    "empty_like": lambda model: torch.zeros_like(model.lm_head.weight).sum().item(),
    "new_zeros": lambda model: model.lm_head.weight.new_ones(5).sum().item(),
}


def _through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    return found if isinstance(found, nn.Module) else {name: tensor.sum().item() for name, tensor in found.items()}


@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(initialising, "SMALL_NUMEL", 1)
    torch.manual_seed(3)
    with building():
        return tiny_llama()


@pytest.mark.parametrize("name", READS)
def test_a_read_between_building_and_prepare_gives_the_numbers(deferred, name):
    torch.manual_seed(3)
    assert READS[name](deferred) == READS[name](tiny_llama())


def test_a_file_of_safetensors_has_the_numbers(deferred, tmp_path):
    deferred.save_pretrained(tmp_path)
    torch.manual_seed(3)
    wanted = dict(tiny_llama().named_parameters())
    for name, parameter in LlamaForCausalLM.from_pretrained(tmp_path).named_parameters():
        assert torch.equal(parameter, wanted[name]), name


REFUSED = {
    "a backward": (lambda model: model.lm_head.weight.sum().backward(), PrepareError, "Prepare the model first"),
    "a pass": (lambda model: model(torch.arange(8)[None]).logits.sum().backward(), PrepareError, "Prepare the model"),
    "resize_": (lambda model: model.lm_head.weight.data.resize_(3, 3), PrepareError, "cannot be recorded"),
    "apply_": (lambda model: model.lm_head.weight.data.apply_(abs), PrepareError, "cannot be recorded"),
    "an array": (
        lambda model: model.lm_head.weight.detach().numpy().__setitem__(0, 1.0),
        ValueError,
        "read-only",
    ),
    "another shape": (lambda model: model.lm_head.weight.data.copy_(torch.ones(3, 4, 5)), RuntimeError, "size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_an_error_at_that_call(deferred, name):
    action, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        action(deferred)


def _on_one_rank(ranks, write):
    initialising.SMALL_NUMEL = 1
    torch.manual_seed(3 + ranks.rank)  # whoever draws: rank 0's numbers
    with building():
        model = tiny_llama()
    with torch.no_grad():
        write(ranks.rank, model.lm_head.weight)
    torch.manual_seed(3)
    expected = tiny_llama().lm_head.weight.detach()
    write(0, expected)
    sharded = shard(ranks, model, "3", "no", sources=sources_of(model))
    with gathered(model):
        assert torch.equal(model.lm_head.weight, expected)
    sharded.release()


def _only_rank_0(rank, weight):
    if rank == 0:
        weight.zero_()


def _own_number(rank, weight):
    weight.mul_(1 + rank)


def _own_rows(rank, weight):
    weight[rank] = 0


@pytest.mark.parametrize("write", [_only_rank_0, _own_number, _own_rows])
def test_where_ranks_write_differently_rank_0s_values_are_everybodys(world, write):
    world(2).run(_on_one_rank, write)


def _fails(model):
    with deferred_if_it_fails(model):
        assert sources_of(model)
        assert type(model.lm_head.weight) is nn.Parameter
        raise ZeroDivisionError


def _taken(ranks):
    initialising.SMALL_NUMEL = 1
    with building():
        model = tiny_llama()
    weight = model.lm_head.weight
    with pytest.raises(ZeroDivisionError):
        _fails(model)
    nn.init.ones_(weight)
    sharded = shard(ranks, model, "3", "no", sources=sources_of(model))
    with gathered(model):
        assert type(weight) is nn.Parameter
        assert bool((weight == 1).all())
    sharded.release()
    assert type(weight) is nn.Parameter


def test_a_parameter_is_an_ordinary_one_when_the_engine_has_it(world):
    world(2).run(_taken)


def _by_flag(ranks, folder):
    forget_run()
    initialising.SMALL_NUMEL = 1
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(folder)
    expected = model.lm_head.weight.detach().cpu()
    nn.init.zeros_(model.model.embed_tokens.weight)
    model.lm_head.weight.data[3:5] *= 2
    expected[3:5] *= 2
    model = accelerator.prepare(model)
    with gathered(model):
        assert bool((model.model.embed_tokens.weight == 0).all())
        assert torch.equal(model.lm_head.weight, expected)
    accelerator.free_memory()


def test_a_model_that_was_loaded_under_the_flag_is_written_before_prepare(world, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    world(2).run(_by_flag, str(tmp_path))
