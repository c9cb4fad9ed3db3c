"""The loss in chunks where the head is a sharded unit: called for each chunk, gathered once for each direction."""

from __future__ import annotations

import pytest

from rig.engine import adamw, prepare, trained
from rig.tiny import batches, checkpointed, share, tiny
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.config.check import merged
from shardwise.run.process import forget_run
from shardwise.tuning.losses import LeanLoss, LogitsLoss

UNITS = ["LlamaDecoderLayer", "*lm_head"]


def _train(ranks, tuning, plan, chunk, name="llama", keeps=False):
    """Losses of some steps, and the gathers of the last."""
    model = tiny(name, tuning)
    if tuning == "lora":
        model = checkpointed(model, reentrant=False)
    _, _, optimizer = prepare(ranks, model, plan, optimizer=adamw, units=UNITS if name == "llama" else None)
    assert trained(model)
    if chunk is not None:
        (LogitsLoss if keeps else LeanLoss)(model, chunk)
    losses = []
    for batch in batches("llama", 4, 2 * ranks.world_size):
        ranks.counts.clear()
        loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, ranks.counts["all_gather"]


def _both(ranks, *case):
    return [_train(ranks, *case, chunk) for chunk in (None, 3)]


@pytest.mark.parametrize("plan", ["2", "3", "3-all"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_sharded_head_trains_the_same_and_is_not_gathered_for_each_chunk(world, tuning, plan):
    for (plain, gathers), (lean, lean_gathers) in world(2).run(_both, tuning, plan):
        assert lean == pytest.approx(plain, rel=1e-5)
        assert lean_gathers == gathers


def _from_logits(ranks):
    return [_train(ranks, "full", "3", chunk, keeps=True) for chunk in (None, 3)]


def test_chunks_of_logits_that_stay_train_the_same(world):
    for (plain, gathers), (lean, lean_gathers) in world(2).run(_from_logits):
        assert lean == pytest.approx(plain, rel=1e-5)
        assert lean_gathers == gathers


def _tied(ranks):
    return [_train(ranks, "full", "3", chunk, "tied")[0] for chunk in (None, 3)]


def test_a_head_that_is_the_embedding_trains_the_same(world):
    for plain, lean in world(3).run(_tied):
        assert lean == pytest.approx(plain, rel=1e-5)


def _configured(ranks):
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    accelerator._run.config = merged(accelerator._run.config, loss_chunk_tokens=4)
    model = tiny("llama", "lora")
    optimizer = adamw(trained(model))
    accelerator.prepare(model, optimizer)
    output = model(**share(batches("llama", 1, 4)[0], ranks.rank, ranks.world_size))
    accelerator.backward(output.loss)
    optimizer.step()
    without = output.logits is None
    accelerator.free_memory()
    return without, model(**batches("llama", 1, 4)[0]).logits is not None


def test_the_setting_acts_in_prepare_and_ends_with_free_memory(world):
    assert world(2).run(_configured) == [(True, True)] * 2
