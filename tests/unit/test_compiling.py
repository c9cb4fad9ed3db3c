"""What compilation takes, and what it refuses."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

from rig.tiny import batches, checkpointed, tiny
from shardwise.config.check import checked, merged
from shardwise.config.compiling import CompileConfig
from shardwise.errors import ConfigError, PrepareError
from shardwise.tuning.blocks import recomputed
from shardwise.tuning.compiling import CompiledBlocks, CompiledLoss, blocks_to_compile


def test_blocks_are_those_that_repeat():
    assert [type(b).__name__ for b in blocks_to_compile(tiny("llama", "lora"))] == ["LlamaDecoderLayer"] * 3


def test_a_model_without_blocks_is_refused():
    with pytest.raises(PrepareError, match="no block that repeats"):
        blocks_to_compile(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpointing_is_refused():
    with pytest.raises(PrepareError, match="use_reentrant"):
        blocks_to_compile(checkpointed(tiny("llama"), reentrant=True))


@pytest.mark.parametrize(
    "values",
    [
        {"dynamo_backend": "INDUCTOR"},
        {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}},
        {"dynamo_config": "inductor"},
    ],
)
def test_every_spelling_of_the_backend_is_read(values):
    config = checked(values)
    assert config.compiling is not None
    assert config.compiling.dynamo_backend == "inductor"
    assert checked(config.to_values()) == config


@pytest.mark.parametrize("values", [{}, {"dynamo_backend": "NO"}, {"dynamo_backend": False}, {"dynamo_config": {}}])
def test_without_a_backend_nothing_is_compiled(values):
    assert checked(values).compiling is None


def _graphs(stage, mode="reduce-overhead", **engine):
    return {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": stage},
        "dynamo_config": {"dynamo_backend": "inductor", "dynamo_mode": mode},
        "shardwise_config": engine,
    }


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_where_weights_do_not_stay_at_one_address(mode):
    with pytest.raises(ConfigError, match="records CUDA graphs, and gathered weights do not stay at one address"):
        checked(_graphs(3, mode))
    assert checked(_graphs(3, mode, gpu_memory_budget="auto")).compiling.records_graphs
    assert checked(_graphs(2, mode)).compiling.records_graphs


def test_cuda_graphs_are_refused_where_blocks_change_after_some_steps():
    with pytest.raises(ConfigError, match="activation_checkpointing: auto changes"):
        checked(_graphs(2, activation_checkpointing="auto"))


def _loss_and_gradient(model, batch):
    loss = model(**batch).loss
    loss.backward()
    gradient = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    return loss.detach(), gradient


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_causal_loss_is_compiled_and_given_back(tuning):
    model = tiny("llama", tuning)
    if tuning == "lora":
        model.get_output_embeddings().weight.requires_grad_(True)
    batch = batches("llama", 1, 3)[0]
    expected = _loss_and_gradient(model, batch)
    inner = next(module for module in model.modules() if type(module).__name__ == "LlamaForCausalLM")
    plain = inner.loss_function
    compiled = CompiledLoss(model, CompileConfig(dynamo_backend="aot_eager"))
    assert inner.loss_function is not plain
    found = _loss_and_gradient(model, batch)
    assert torch.allclose(found[0], expected[0], rtol=1e-6)
    assert torch.allclose(found[1], expected[1], atol=1e-7)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, expected[0])
    compiled.undo()
    assert inner.loss_function is plain


def test_another_loss_is_left_as_it_is():
    model = tiny("bart")
    before = dict(vars(model))
    CompiledLoss(model, CompileConfig(dynamo_backend="aot_eager")).undo()
    CompiledLoss(nn.Linear(2, 2), CompileConfig(dynamo_backend="aot_eager")).undo()
    assert vars(model) == before


def test_a_keyword_wins_over_the_file():
    config = merged(checked({"dynamo_config": {"dynamo_backend": "inductor"}}), dynamo_backend="eager")
    assert config.compiling is not None
    assert config.compiling.dynamo_backend == "eager"


def test_a_forward_that_a_script_has_replaced_is_compiled_and_comes_back():
    block = nn.Linear(2, 2)
    block.forward = own = lambda x: x * 2
    compiled = CompiledBlocks([block], CompileConfig(dynamo_backend="eager"))
    assert block.forward is not own
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(block(x), x * 2)
    compiled.undo()
    assert block.forward is own


class _Recomputes(nn.Module):
    """A block as transformers once made them: the checkpoint lies around the module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gradient_checkpointing = True
        self.around = 0

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            self.around += 1
        return super().__call__(*args, **kwargs)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.linear(x)) * scale


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_around_the_call_is_taken_into_the_graph_and_given_back():
    blocks = [_Recomputes() for _ in range(2)]
    x = torch.randn(3, 4, requires_grad=True)
    blocks[1](blocks[0](x), scale=0.5).square().sum().backward()
    expected = [p.grad.clone() for block in blocks for p in block.parameters()]
    for block in blocks:
        block.zero_grad()
    compiled = CompiledBlocks(blocks, CompileConfig(dynamo_backend="aot_eager"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = blocks[1](blocks[0](x), scale=0.5).square().sum()
    loss.backward()
    assert [block.around for block in blocks] == [1, 1]
    for found, wanted in zip([p.grad for block in blocks for p in block.parameters()], expected, strict=True):
        assert torch.allclose(found, wanted)
    # A graph keeps its input; what tanh made is computed again. The third is what the square keeps.
    assert sum(tensor.shape == (3, 4) for tensor in kept) == 3
    assert all(block.gradient_checkpointing is False for block in blocks)
    compiled.undo()
    assert all(block.gradient_checkpointing for block in blocks)


class _Drops(nn.Module):
    """Its output is the mask that its dropout drew, and so is its input's gradient, if the recomputation draws the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x, scale=None):
        return nn.functional.dropout(x * self.weight * scale, 0.5, self.training)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_recomputed_block_drops_what_its_forward_dropped(backend, keyword):
    torch._dynamo.reset()
    block = _Drops()
    if backend is None:
        again = recomputed(_Drops.forward, block)
        block.forward = MethodType(again, block)
    else:
        CompiledBlocks([block], CompileConfig(dynamo_backend=backend), recompute=True)
    torch.manual_seed(0)
    x = torch.ones(64, requires_grad=True)
    scale = torch.ones(64)
    y = block(x=x, scale=scale) if keyword else block(x, scale)
    torch.rand(5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert 0 < y.detach().count_nonzero() < 64


def test_torch_is_told_the_device_of_a_recomputed_block_however_it_is_called(monkeypatch):
    found = []

    def get_device_states(*args):
        found.append([value.device for value in args if isinstance(value, torch.Tensor)])
        return [], []

    monkeypatch.setattr(torch.utils.checkpoint, "get_device_states", get_device_states)
    monkeypatch.setattr(torch.utils.checkpoint, "_get_device_module", lambda _: SimpleNamespace(_initialized=True))
    block = _Drops()
    again = recomputed(_Drops.forward, block)
    x = torch.ones(64, requires_grad=True)
    again(block, x, scale=torch.ones(64))
    again(block, x=x, scale=torch.ones(64))
    assert found == [[x.device], [x.device]]


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_transformers_that_recompute_drop_what_their_forwards_dropped_with_every_backend():
    found = []
    for backend, again in ((None, False), ("eager", True), ("aot_eager", True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny("llama", "full")
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        model = checkpointed(model.train(), reentrant=False) if again else model.train()
        CompiledBlocks(blocks_to_compile(model), CompileConfig(dynamo_backend=backend) if backend else None)
        torch.manual_seed(1)
        model(**batches("llama", 1, 2)[0]).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for grads in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, found[0], strict=True))
