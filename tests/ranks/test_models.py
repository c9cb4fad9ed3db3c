"""Architectures, one after another: built, loaded, tuned, asked and saved in shards as in one process.

docs/design/models.md has the table of what this runs.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from rig.engine import prepare, trained, weights_of
from rig.tiny import share, step_alone
from rig.zoo import ZOO, batches_of, class_of, config_of, with_all_linear_lora
from shardwise.building import initialising
from shardwise.building.deferred_tensors import sources_of
from shardwise.building.loading import building
from shardwise.weights.integrations import connect

QUICK = ("qwen3_moe", "gpt2", "t5", "vit")


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def _generated(name, model, batch):
    inputs = {ZOO[name].generates: batch[ZOO[name].generates][:2]}
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"][:2]
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def _build(ranks, name):
    """The whole of a model that was built in shards, on rank 0, and of an ordinary build with the same seed."""
    initialising.SMALL_NUMEL = 1
    torch.manual_seed(2)
    expected = class_of(name)(config_of(name)).state_dict()
    torch.manual_seed(2)
    with building():
        model = class_of(name)(config_of(name))
    sharded, _, _ = prepare(ranks, model, "3", sources=sources_of(model))
    state = sharded.state_dict()
    if ranks.rank == 0:
        assert list(state) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


def _tune(ranks, name, base, adapter):
    initialising.SMALL_NUMEL = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and peft about models of these sizes
        expected = with_all_linear_lora(class_of(name).from_pretrained(base, attn_implementation="eager")).train()
        with building():
            model = class_of(name).from_pretrained(base, attn_implementation="eager")
        assert all(parameter.is_meta for parameter in model.parameters())
        model = with_all_linear_lora(model).train()
    plain = torch.optim.AdamW(trained(expected), lr=3e-3, eps=1e-4)
    sharded, _, stepping = prepare(ranks, model, "3", sources=sources_of(model))
    connect(model)
    for step, batch in enumerate(batches_of(name, 3, 12)):
        losses = step_alone(expected, plain, batch, ranks.world_size)
        loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        assert abs(loss.item() - losses[ranks.rank]) <= 1e-6 * max(1.0, abs(loss.item())), (step, loss.item(), losses)
    found = weights_of(sharded)
    for key, value in expected.named_parameters():
        assert (found[key] - value).abs().max() <= 1e-6, key
    batch = batches_of(name, 1, 4, seed=99)[0]
    expected.eval()
    model.eval()
    logits = _logits(model, batch)
    assert torch.allclose(logits, _logits(expected, batch), atol=1e-5)
    if ZOO[name].generates is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(_generated(name, model, batch), _generated(name, expected, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(adapter)
    ranks.barrier()
    return logits


def _reload(ranks, name, base, adapter, logits):
    """With nothing of this library."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = class_of(name).from_pretrained(base, attn_implementation="eager")
        model = PeftModel.from_pretrained(model, adapter).eval()
    batch = batches_of(name, 1, 4, seed=99)[0]
    assert torch.allclose(_logits(model, batch), logits, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(_logits(model, batch), logits, atol=1e-4), "the adapter changes nothing"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in ZOO])
def test_an_architecture_is_built_loaded_tuned_asked_and_saved_as_in_one_process(world, tmp_path, name):
    world(2).run(_build, name)
    torch.manual_seed(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        class_of(name)(config_of(name)).save_pretrained(tmp_path / "base")
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    logits = world(2).run(_tune, name, base, adapter)[0]
    world(1).run(_reload, name, base, adapter, logits)
