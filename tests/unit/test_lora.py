"""The fast path of PEFT's LoRA linears: its numbers, what it saves, what it costs, and what it leaves to PEFT."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shardwise.tuning.lora import FastLora, lora_linears

peft = pytest.importorskip("peft")

IN, OUT, R = 24, 40, 4


class Pair(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.up = nn.Linear(IN, OUT, bias=bias)
        self.down = nn.Linear(OUT, IN, bias=bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def _adapted(*, dtype=torch.float32, biased=False, seed=0, **settings):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some variants warn about themselves
        config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["up", "down"], **settings)
        model = peft.get_peft_model(Pair(biased), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model.to(dtype).train()


def _results(model, x, needs_x=True):
    """(output, gradient of the input, gradients of the adapters), in fp32."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(needs_x)
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return [y.detach().float(), *([x.grad.float()] if needs_x else []), *grads]


def _taken(model):
    """How many LoRA linears take the fast path in a forward."""
    from shardwise.tuning import lora

    seen = []
    original = lora._LoraLinear.apply
    lora._LoraLinear.apply = lambda *args: seen.append(1) or original(*args)
    try:
        model(torch.ones(3, IN, dtype=next(model.parameters()).dtype))
    finally:
        lora._LoraLinear.apply = original
    return len(seen)


def _apart(found, expected):
    assert len(found) == len(expected)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (IN,), (0, IN)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
def test_it_gives_pefts_numbers_in_fp32(shape, bias, needs_x):
    model = _adapted(biased=bias)
    plain = copy.deepcopy(model)
    fast = FastLora(model)
    assert fast.count == _taken(model) == 2
    x = torch.randn(shape)
    found, expected = _results(model, x, needs_x), _results(plain, x, needs_x)
    assert [t.shape for t in found] == [t.shape for t in expected]
    if x.numel():
        assert _apart(found, expected) <= 1e-6


def test_inputs_that_are_not_contiguous_are_taken():
    model = _adapted()
    plain = copy.deepcopy(model)
    FastLora(model)
    x = torch.randn(IN, 3, 2).permute(2, 1, 0)
    assert _apart(_results(model, x), _results(plain, x)) <= 1e-6


def test_in_bf16_it_is_nearer_to_the_truth_than_peft():
    """Both round; the truth is the same weights in fp64."""
    exact = _adapted(dtype=torch.bfloat16)
    plain, fast = copy.deepcopy(exact), copy.deepcopy(exact)
    exact = exact.double()
    FastLora(fast)
    x = torch.randn(64, IN).bfloat16()
    truth = [t.double() for t in _results(exact, x.double())]
    errors = []
    for model in (fast, plain):
        found = _results(model, x)
        assert _apart(found, truth) <= 4e-2
        errors.append(sum(((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)))
    assert errors[0] <= errors[1]


def _saved_nbytes(model, x):
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


@pytest.mark.parametrize("needs_x", [False, True])
def test_it_keeps_no_more_for_the_backward_than_peft(needs_x):
    model = _adapted()
    plain = copy.deepcopy(model)
    FastLora(model)
    x = torch.randn(32, IN, requires_grad=needs_x)
    assert _saved_nbytes(model, x) <= _saved_nbytes(plain, x)


def _kernels(model, x):
    x = x.requires_grad_()
    for _ in range(2):  # the first makes the gradients
        y, gradient = model(x), torch.ones(len(x), IN)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            model(x)
            y.backward(gradient)
    kernels = (
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::mul",
        "aten::add",
        "aten::add_",
        "aten::copy_",
        "aten::clone",
    )
    return {name: n for name, n in ((e.key, e.count) for e in profiler.key_averages()) if name in kernels}


def test_it_makes_no_pass_but_the_products():
    """Per linear two scalings and a sum are gone, and autograd's sum of the two input gradients; no copy has come."""
    model = _adapted()
    plain = copy.deepcopy(model)
    FastLora(model)
    before, after = _kernels(plain, torch.randn(16, IN)), _kernels(model, torch.randn(16, IN))
    assert before["aten::mul"] >= 4
    assert before["aten::add"] >= 2
    # Autograd adds to the gradients that are there already: four weights and the input.
    assert after.pop("aten::add_") <= 5
    assert set(after) == {"aten::mm", "aten::addmm_"}, (after, before)
    assert sum(after.values()) < sum(before.values())


def test_without_gradients_and_under_checkpointing_it_is_the_same():
    model = _adapted()
    plain = copy.deepcopy(model)
    FastLora(model)
    x = torch.randn(4, IN)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), plain.eval()(x), rtol=1e-6, atol=1e-6)

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    assert _apart(_results(Checkpointed(model.train()), x), _results(plain.train(), x)) <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}],
    ids=["dropout", "dora", "lora_bias", "bias"],
)
def test_what_is_not_plain_stays_pefts(settings):
    model = _adapted(biased=True, **settings)
    plain = copy.deepcopy(model)
    FastLora(model)
    assert _taken(model) == 0
    x = torch.randn(4, IN)
    torch.manual_seed(1)
    found = _results(model, x)
    torch.manual_seed(1)
    assert all(map(torch.equal, found, _results(plain, x)))


def test_adapters_of_another_dtype_and_autocast_stay_pefts():
    model = _adapted()
    FastLora(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert _taken(model) == 0
    model.base_model.model.up.base_layer.bfloat16()
    model.base_model.model.down.base_layer.bfloat16()
    assert _taken(model) == 0


def test_a_hook_on_an_inner_layer_is_heard():
    model = _adapted()
    FastLora(model)
    heard = []
    model.base_model.model.up.lora_A["default"].register_forward_hook(lambda *_: heard.append(1))
    assert _taken(model) == 1
    assert heard == [1]


def test_merging_disabling_and_switching_follow_peft():
    model = _adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["up"]))
    with torch.no_grad():
        model.base_model.model.up.lora_B["other"].weight.normal_()
    plain = copy.deepcopy(model)
    FastLora(model)
    x = torch.randn(4, IN)

    def same():
        return torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-6)

    assert _taken(model) == 2
    assert same()
    with model.disable_adapter(), plain.disable_adapter():
        assert _taken(model) == 0
        assert same()
    for each in (model, plain):
        each.set_adapter("other")
    assert _taken(model) == 1  # "down" has no such adapter: its base alone
    assert same()
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])
    assert _taken(model) == 0
    assert same()
    for each in (model, plain):
        each.set_adapter("default")
        each.merge_adapter()
    assert _taken(model) == 0
    assert same()
    for each in (model, plain):
        each.unmerge_adapter()
    assert _taken(model) == 2
    assert same()


def test_a_copy_of_the_model_runs_on_its_own_weights():
    model = _adapted()
    FastLora(model)
    other = copy.deepcopy(model)
    x = torch.randn(4, IN)
    before = model(x)
    with torch.no_grad():
        other.base_model.model.up.lora_B["default"].weight.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(other(x), before)
    assert _taken(other) == 0  # a copy is a plain model


def test_a_forward_that_somebody_has_replaced_is_left():
    model = _adapted()
    model.base_model.model.up.forward = lambda x: torch.zeros(len(x), OUT)
    assert FastLora(model).count == 1


def test_undo_leaves_no_trace_and_other_models_have_nothing_to_replace():
    model = _adapted()
    FastLora(model).undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert lora_linears(Pair()) == []
    assert FastLora(Pair()).count == 0
