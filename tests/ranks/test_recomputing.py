"""Recomputed blocks train to the same bits as kept ones, and `auto` keeps as many as a budget holds."""

from __future__ import annotations

import warnings

import pytest
import torch

from rig.engine import adamw, prepare
from rig.heard import heard
from rig.tiny import batches, checkpointed, share, tiny
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.config.check import merged
from shardwise.config.compiling import CompileConfig
from shardwise.errors import PrepareError
from shardwise.run.process import forget_run
from shardwise.tuning.compiling import CompiledBlocks, blocks_to_compile
from shardwise.tuning.recomputing import RecomputedBlocks, blocks_to_recompute

STEPS = 5


def _train(ranks, name, tuning, plan, budget, *, mode="auto", lengths=None, precision="no", cached=False, aot=False):
    """(losses, weights, blocks kept after each step, forwards of each block a step, the RecomputedBlocks)."""
    torch.manual_seed(0)
    model = tiny(name, tuning)
    model.config.use_cache = cached
    blocks = blocks_to_recompute(model, "auto") if mode != "none" else []
    compiled_blocks = blocks_to_compile(model) if aot else []
    sharded, _, optimizer = prepare(ranks, model, plan, optimizer=adamw, precision=precision)
    compiled = CompiledBlocks(compiled_blocks, CompileConfig(dynamo_backend="aot_eager") if aot else None)
    recomputed = RecomputedBlocks(blocks, sharded, budget if mode == "auto" else None)
    losses, kept = [], []
    for step, batch in enumerate(batches(name, STEPS, 2 * ranks.world_size)):
        part = share(batch, ranks.rank, ranks.world_size)
        if lengths is not None:
            part = {key: value[:, : lengths[step]] for key, value in part.items()}
        loss = model(**part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        kept.append(recomputed.kept)
    with sharded.gathered():
        weights = [parameter.detach().clone() for parameter in model.parameters()]
    recomputed.undo()
    compiled.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    return losses, weights, kept


def _same_bits(ranks, name, tuning, plan, **settings):
    """How many blocks were kept under each budget, where every budget and `all` gave the bits of no recomputation."""
    torch.manual_seed(0)
    expected, wanted, _ = _train(ranks, name, tuning, plan, 0, mode="none", **settings)
    kept = []
    for mode, budget in (("all", 0), ("auto", 0), ("auto", 1), ("auto", 1 << 30)):
        torch.manual_seed(0)
        losses, weights, counts = _train(ranks, name, tuning, plan, budget, mode=mode, **settings)
        assert losses == expected
        assert all(map(torch.equal, weights, wanted))
        kept.append(counts)
    return kept


@pytest.mark.parametrize(
    ("name", "tuning", "plan", "precision"),
    [
        ("llama", "full", "3", "no"),
        ("llama", "lora", "3-all", "bf16"),
        ("tied", "lora", "2", "no"),
        ("bart", "lora", "3", "no"),
    ],
)
def test_no_bit_depends_on_what_is_recomputed(world, name, tuning, plan, precision):
    blocks = 4 if name == "bart" else 3
    for kept in world(2).run(_same_bits, name, tuning, plan, precision=precision):
        assert kept == [[0] * STEPS, [0] * STEPS, [0] * STEPS, [0, 0, *[blocks] * 3]]


def test_a_cache_that_the_model_makes_in_training_is_kept_from_recomputed_blocks(world):
    for kept in world(1).run(_same_bits, "llama", "full", "3", cached=True):
        assert kept[-1][-1] == 3


def _compiled(ranks):
    from torch._dynamo.utils import counters

    graphs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler, about itself
        losses = []
        for mode, budget in (("none", 0), ("all", 0), ("auto", 1 << 30)):
            torch._dynamo.reset()
            counters.clear()
            losses.append(_train(ranks, "llama", "full", "3", budget, mode=mode, aot=True)[0])
            graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


def test_compiled_blocks_are_one_artefact_recomputed_or_kept(world):
    for losses, graphs in world(1).run(_compiled):
        assert losses[0] == losses[1] == losses[2]
        assert graphs == [1, 1, 1]


def _measured(ranks, budget_of_rank):
    """The bytes counted for a block, and how many are kept where a budget holds so many on this rank."""
    found = []
    for blocks in budget_of_rank:
        nbytes = _bytes_of_a_block(ranks)
        budget = (blocks[ranks.rank] if isinstance(blocks, tuple) else blocks) * nbytes
        found.append(_train(ranks, "llama", "full", "3", budget)[2][-1])
    return found


def _bytes_of_a_block(ranks):
    model = tiny("llama", "full")
    blocks = blocks_to_recompute(model, "auto")
    sharded, _, optimizer = prepare(ranks, model, "3")
    recomputed = RecomputedBlocks(blocks, sharded, 1 << 30)
    for batch in batches("llama", 2, 2 * ranks.world_size):
        model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return recomputed._blocks[-1].measured.nbytes


def test_as_many_blocks_are_kept_as_the_rank_with_the_least_room_holds(world):
    assert world(2).run(_measured, (1, 2, (3, 1), (0, 3))) == [[1, 2, 1, 0]] * 2


def _counted(ranks):
    """Bytes counted, and bytes that autograd saved by another way: the difference of what a step keeps in its graph."""
    counted = _bytes_of_a_block(ranks)
    model = tiny("llama", "full")
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    layer = model.model.layers[-1]
    saved = {}

    def before(module, args, kwargs):
        saved["held"] = {
            t.untyped_storage().data_ptr() for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor)
        }
        saved["held"] |= {t.untyped_storage().data_ptr() for t in kwargs["position_embeddings"]}
        seen.clear()

    def after(module, args, output):
        kept = [
            t for key, t in seen.items() if key not in weights | saved["held"] | {output.untyped_storage().data_ptr()}
        ]
        saved["bytes"] = sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in kept)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**share(batches("llama", 1, 2)[0], 0, 1))
    return counted, saved["bytes"]


def test_a_blocks_bytes_are_what_autograd_keeps_without_inputs_and_weights(world):
    [(counted, expected)] = world(1).run(_counted)
    assert counted == expected > 0


def _longer(ranks):
    calls = []
    model = tiny("llama", "full")
    blocks = blocks_to_recompute(model, "auto")
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    sharded, _, optimizer = prepare(ranks, model, "3")
    RecomputedBlocks(blocks, sharded, 1 << 30)
    ran = []
    for length in (4, 4, 4, 4, 8, 3):
        calls.clear()
        part = {key: value[:, :length] for key, value in share(batches("llama", 1, 2)[0], ranks.rank, 1).items()}
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ran.append(len(calls))
    return ran


def test_a_longer_batch_than_the_measured_ones_is_recomputed(world):
    assert world(1).run(_longer) == [[2, 2, 2, 1, 2, 1]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_auto_is_refused_over_the_models_own_checkpointing_and_all_leaves_it():
    model = checkpointed(tiny("llama"), reentrant=False)
    with pytest.raises(PrepareError, match="auto chooses which blocks"):
        blocks_to_recompute(model, "auto")
    assert blocks_to_recompute(model, "all") == []
    with pytest.raises(PrepareError, match="no block that repeats"):
        blocks_to_recompute(torch.nn.Linear(2, 2), "all")


def _through_the_accelerator(ranks, mode, budget):
    forget_run()
    with heard() as said:
        plugin = DeepSpeedPlugin(zero_stage=3, mixed_precision="no")
        accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
        accelerator._run.config = merged(
            accelerator._run.config, activation_checkpointing=mode, gpu_memory_budget=budget
        )
        model = tiny("llama", "full")
        optimizer = adamw(model.parameters())
        accelerator.prepare(model, optimizer)
        losses = []
        for batch in batches("llama", STEPS, 2 * ranks.world_size):
            loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.free_memory()
    left = any("forward" in vars(module) for module in model.modules())
    return losses, [text for text in said if "activation_checkpointing" in text], left


def test_the_accelerator_recomputes_as_told_says_so_once_and_gives_the_model_back(world):
    plain = world(2).run(_through_the_accelerator, "none", None)
    for mode, budget in (("all", None), ("auto", 1 << 30), ("auto", None)):
        found = world(2).run(_through_the_accelerator, mode, budget)
        assert [losses for losses, *_ in found] == [losses for losses, *_ in plain]
        assert not any(left for *_, left in found)
        said = [texts for _, texts, _ in found]
        assert said[1] == []
        if mode == "all":
            assert said[0] == []
        else:
            kept = 3 if budget else 0
            assert len(said[0]) == 1
            assert f"{3 - kept} of 3 blocks are recomputed; the last {kept} keep" in said[0][0]
