"""What compilation takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rig.tiny import checkpointed, tiny
from shardwise.compiling import CompiledBlocks, blocks_to_compile
from shardwise.config.compiling import CompileConfig
from shardwise.config.schema import Config
from shardwise.errors import ConfigError, PrepareError


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
    config = Config.checked(values)
    assert config.compiling is not None
    assert config.compiling.dynamo_backend == "inductor"
    assert Config.checked(config.to_values()) == config


@pytest.mark.parametrize("values", [{}, {"dynamo_backend": "NO"}, {"dynamo_backend": False}, {"dynamo_config": {}}])
def test_without_a_backend_nothing_is_compiled(values):
    assert Config.checked(values).compiling is None


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_record_cuda_graphs_are_refused(mode):
    with pytest.raises(ConfigError, match="records CUDA graphs"):
        Config.checked({"dynamo_config": {"dynamo_backend": "inductor", "dynamo_mode": mode}})


def test_a_keyword_wins_over_the_file():
    config = Config.checked({"dynamo_config": {"dynamo_backend": "inductor"}}).merged(dynamo_backend="eager")
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
