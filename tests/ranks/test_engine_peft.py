"""PEFT adapters and generation under every stage, against one process of stock peft and transformers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from rig.engine import PLANS, largest_difference, prepare, shard, trained, weights_of
from rig.tiny import batches, share, tiny
from shardwise.weights.integrations import connect


def train(ranks, model, plan, name, steps=4, **settings):
    sharded, stepper, stepping = prepare(ranks, model, plan, **settings)
    connect(model)
    for batch in batches(name, steps, 12):
        model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
        stepping.step()
        stepping.zero_grad()
    return sharded, stepper, stepping


def _train_and_save(ranks, folder, name, tuning, plan):
    model = tiny(name, tuning)
    sharded, _, _ = train(ranks, model, plan, name)
    model.eval()
    batch = batches(name, 1, 4, seed=99)[0]
    with torch.no_grad():
        logits = model(**batch).logits
    state = sharded.state_dict(trainable_only=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(state) == (sorted(names) if ranks.rank == 0 else [])
    # As the guide's script does it: on all ranks, with no state dict.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder)
    ranks.barrier()
    # And training goes on.
    model.train()
    model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
    return logits


def _load_and_compare(ranks, folder, name, logits):
    from peft import PeftModel

    model = tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model, folder).eval()
    batch = batches(name, 1, 4, seed=99)[0]
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, logits, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(**batch).logits, logits, atol=1e-4), "the adapter changes nothing"


@pytest.mark.parametrize(("name", "tuning"), [("llama", "lora"), ("llama", "lora+save"), ("bart", "lora")])
@pytest.mark.parametrize("plan", PLANS)
def test_an_adapter_saved_by_all_ranks_loads_in_stock_peft_with_equal_logits(world, tmp_path, plan, name, tuning):
    logits = world(2).run(_train_and_save, str(tmp_path), name, tuning, plan)[0]
    world(1).run(_load_and_compare, str(tmp_path), name, logits)


def _save_whole(ranks, folder, plan):
    from transformers import LlamaForCausalLM

    model = tiny("tied")
    train(ranks, model, plan, "tied")
    model.eval()
    batch = batches("tied", 1, 4, seed=99)[0]
    with torch.no_grad():
        logits = model(**batch).logits
    model.save_pretrained(folder)
    ranks.barrier()
    loaded = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, logits, atol=1e-5)


@pytest.mark.parametrize("plan", ["0", "3", "3-all"])
def test_a_whole_model_saved_by_all_ranks_loads_in_stock_transformers(world, tmp_path, plan):
    world(2).run(_save_whole, str(tmp_path), plan)


def _names(ranks, plan):
    model = tiny("llama", "lora")
    before = [n for n, _ in model.named_parameters()], list(model.state_dict()), type(model)
    counted = model.get_nb_trainable_parameters()
    shard(ranks, model, plan)
    assert ([n for n, _ in model.named_parameters()], type(model)) == (before[0], before[2])
    assert model.get_nb_trainable_parameters() == counted
    assert model.active_adapter == "default"


@pytest.mark.parametrize("plan", ["0", "3"])
def test_names_classes_and_counts_of_a_peft_model_stay(world, plan):
    world(2).run(_names, plan)


def _reference_adapter_off(ranks, plan):
    """Preference training with the base model as the reference: the adapter switched off inside a step."""
    model = tiny("llama", "lora")
    reference = copy.deepcopy(model)
    plain = torch.optim.AdamW(trained(reference), lr=3e-3, eps=1e-4)
    sharded, _, stepping = prepare(ranks, model, plan)

    def loss(model, batch):
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=batch["input_ids"]).logits
        return (model(input_ids=batch["input_ids"]).logits - 0.9 * base).square().mean()

    for batch in batches("llama", 4, 12):
        loss(reference, batch).backward()
        plain.step()
        plain.zero_grad()
        loss(model, share(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-all"])
def test_an_adapter_switched_off_for_a_reference_forward_trains_as_in_one_process(world, plan):
    world(2).run(_reference_adapter_off, plan)


def prompts(rank):
    return torch.tensor([[[5, 9, 17], [23, 4, 31]], [[44, 8, 12], [3, 3, 50]], [[6, 7, 8], [60, 59, 58]]][rank])


def settings(rank, unequal):
    # Ranks stop at different lengths: 3, 7 and 11 new tokens.
    length = 3 + 4 * rank if unequal else 6
    return {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}


def _expected(ranks, name, tuning, rank, unequal):
    model = tiny(name, tuning).eval()
    model.config.use_cache = True
    inputs = prompts(rank)
    return model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings(rank, unequal))


def _generate(ranks, which, plan, synced, unequal):
    name = which[0]
    model = tiny(*which)
    _, _, stepping = prepare(ranks, model, plan)
    connect(model)
    model.eval()
    model.config.use_cache = True
    inputs = prompts(ranks.rank)
    options = {"synced_gpus": synced} if synced is not None else {}
    for _ in range(2):
        tokens = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), **options, **settings(ranks.rank, unequal)
        )
    model.train()
    model.config.use_cache = False
    for batch in batches(name, 2, 12):
        model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
        stepping.step()
        stepping.zero_grad()
    return tokens


@pytest.mark.thinned(2)
@pytest.mark.parametrize("synced", [None, True])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_ranks_generate_what_one_process_does_also_at_different_lengths(world, plan, unequal, synced):
    name, tuning = ("bart", "full") if plan == "3" and unequal else ("llama", "lora")
    found = world(2).run(_generate, (name, tuning), plan, synced, unequal, timeout_s=20)
    for rank in range(2):
        expected = world(1).run(_expected, name, tuning, rank, unequal)[0]
        assert torch.equal(found[rank], expected)
