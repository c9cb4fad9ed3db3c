"""Compiled blocks train as eager ones do, are compiled once, and stand under the engine's hooks."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from rig.engine import adamw, inputs, loss_of, mine, prepare, tower
from rig.tiny import batches, checkpointed, share, tiny
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.config.compiling import CompileConfig
from shardwise.run.process import forget_run
from shardwise.tuning.compiling import CompiledBlocks, blocks_to_compile

STEPS = 4


def _settings(backend):
    return CompileConfig(dynamo_backend=backend)


def _train(ranks, model, plan, backend, precision):
    """Losses of every step, and how many graphs had been compiled after each."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    blocks = blocks_to_compile(model)
    _, _, optimizer = prepare(ranks, model, plan, optimizer=adamw, precision=precision)
    compiled = CompiledBlocks(blocks, None if backend is None else _settings(backend))
    losses, graphs = [], []
    name = "bart" if type(model).__name__.startswith("Bart") else "llama"
    for batch in batches(name, STEPS, 2 * ranks.world_size):
        loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    compiled.undo()
    return losses, graphs


def _both(ranks, name, tuning, plan, backend, checkpointing, precision="no", cached=False):
    found = []
    for chosen in (None, backend):
        torch.manual_seed(0)
        model = tiny(name, tuning)
        if checkpointing:
            model = checkpointed(model, reentrant=False)
        model.config.use_cache = cached
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler, about itself
            found.append(_train(ranks, model, plan, chosen, precision))
    return found


@pytest.mark.parametrize(
    ("tuning", "plan", "checkpointing", "artefacts"),
    [
        ("full", "2", True, 1),
        ("full", "3-all", True, 1),
        ("lora", "3", True, 1),
        # Behind a frozen embedding the first block's input needs no gradient: its graph is another one.
        ("lora", "3-all", False, 2),
    ],
)
def test_compiled_blocks_train_as_eager_ones_and_are_compiled_once(world, tuning, plan, checkpointing, artefacts):
    for eager, compiled in world(2).run(_both, "llama", tuning, plan, "aot_eager", checkpointing):
        assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
        assert eager[1][-1] == 0
        # Three blocks, one artefact; and nothing is compiled anew after the first step.
        assert compiled[1] == [artefacts] * STEPS


def test_the_cache_that_a_model_makes_in_training_does_not_split_the_artefact(world):
    for eager, compiled in world(1).run(_both, "llama", "full", "3", "aot_eager", False, cached=True):
        assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
        assert compiled[1] == [1] * STEPS


def _prefixed(ranks):
    from torch._dynamo.utils import counters
    from transformers import DynamicCache

    torch._dynamo.reset()
    counters.clear()
    model = tiny("llama", "full")
    batch = batches("llama", 1, 2)[0]
    cache = DynamicCache()
    model(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True)
    compiled = CompiledBlocks(blocks_to_compile(model), _settings("aot_eager"))
    model(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True)
    compiled.undo()
    return counters["stats"]["unique_graphs"], int(cache.get_seq_length())


def test_a_filled_cache_is_continued_in_eager(world):
    assert world(1).run(_prefixed) == [(0, 16)]


def test_an_encoder_and_a_decoder_are_one_artefact_each(world):
    for eager, compiled in world(2).run(_both, "bart", "full", "3", "aot_eager", False):
        assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
        assert compiled[1][1] == compiled[1][-1]
        assert compiled[1][-1] <= 4


needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("cc") is None, reason="inductor needs a C++ compiler on a CPU"
)


def _towers(ranks):
    found = []
    for backend in (None, "inductor"):
        torch._dynamo.reset()
        model = tower()
        blocks = blocks_to_compile(model)
        _, _, optimizer = prepare(ranks, model, "3-all", optimizer=adamw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CompiledBlocks(blocks, None if backend is None else _settings(backend))
            losses = []
            for batch in inputs(3):
                loss = loss_of(model, mine(batch, ranks.rank, ranks.world_size))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        found.append(losses)
    return found


@needs_compiler
def test_inductor_trains_a_small_model_as_eager(world):
    for eager, compiled in world(2).run(_towers):
        assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.full
@needs_compiler
def test_inductor_gives_eager_losses_within_rounding(world):
    for eager, compiled in world(1).run(_both, "llama", "lora", "3", "inductor", True, "bf16", timeout_s=300):
        assert compiled[0] == pytest.approx(eager[0], rel=5e-3)
        assert compiled[1] == [1] * STEPS


def _evaluate(ranks):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny("llama", "full")
    blocks = blocks_to_compile(model)
    prepare(ranks, model, "3")
    compiled = CompiledBlocks(blocks, _settings("aot_eager"))
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    seen = counters["stats"]["unique_graphs"]
    assert all("forward" in vars(block) for block in blocks)
    compiled.undo()
    assert not any("forward" in vars(block) for block in blocks)
    return seen


def test_evaluation_stays_eager_and_undo_leaves_no_trace(world):
    assert world(2).run(_evaluate) == [0, 0]


def _through_the_accelerator(ranks):
    forget_run()
    accelerator = Accelerator(
        cpu=True, dynamo_backend="aot_eager", deepspeed_plugin=DeepSpeedPlugin(zero_stage=3, mixed_precision="no")
    )
    model = tiny("llama", "full")
    optimizer = adamw(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator.prepare(model, optimizer)
        batch = share(batches("llama", 1, 2 * ranks.world_size)[0], ranks.rank, ranks.world_size)
        accelerator.backward(model(**batch).loss)
    was = ["forward" in vars(layer) for layer in model.model.layers]
    accelerator.free_memory()
    return was, ["forward" in vars(layer) for layer in model.model.layers]


def test_the_accelerator_compiles_when_told_and_gives_the_model_back(world):
    for was, after in world(2).run(_through_the_accelerator):
        assert was == [True] * 3
        assert after == [False] * 3
