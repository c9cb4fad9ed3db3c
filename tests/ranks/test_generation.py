"""Generation at stage 3: the tokens of one process, no collective where the model fits, and in step by itself where not."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch

from rig.engine import inputs as batches_of_numbers
from rig.engine import loss_of, mine, prepare, tower
from rig.tiny import batches, share, tiny, tiny_llama
from shardwise.errors import PrepareError, ScheduleError
from shardwise.weights.integrations import connect, generation

PLANS = ("3", "3-all", "3-disk")
# Everything fits; nothing does; and the first units do.
BUDGETS = ("auto", None, 100_000)


def prompts(rank):
    return torch.tensor([[[5, 9, 17], [23, 4, 31]], [[44, 8, 12], [3, 3, 50]], [[6, 7, 8], [60, 59, 58]]][rank])


def options(rank, beams, synced=None):
    """Ranks stop at different lengths: 3, 7 and 11 new tokens."""
    length = 3 + 4 * rank
    found = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    return {**found, "num_beams": beams, **({} if synced is None else {"synced_gpus": synced})}


def generate(model, rank, beams, synced=None):
    ids = prompts(rank)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options(rank, beams, synced))


def _expected(ranks, name, tuning, beams, count):
    model = tiny(name, tuning).eval()
    model.config.use_cache = True
    return [generate(model, rank, beams) for rank in range(count)]


def _tokens(ranks, name, tuning, plan, beams, budget, synced=None):
    model = tiny(name, tuning)
    prepare(ranks, model, plan, generation_memory_budget=budget)
    connect(model)
    model.eval()
    model.config.use_cache = True
    return [generate(model, ranks.rank, beams, synced) for _ in range(2)]


WAYS = list(itertools.product((("llama", "lora"), ("bart", "full")), (2, 3), PLANS, (1, 3), BUDGETS))


def check_tokens(world, model, n, plan, beams, budget):
    expected = world(1).run(_expected, *model, beams, n)[0]
    found = world(n).run(_tokens, *model, plan, beams, budget, timeout_s=30)
    for rank in range(n):
        for tokens in found[rank]:
            assert torch.equal(tokens, expected[rank])


# 7 is prime to the lengths of the axes: every value of each is met, and most pairs.
@pytest.mark.parametrize(("model", "n", "plan", "beams", "budget"), WAYS[::7])
def test_ranks_that_stop_at_different_lengths_write_what_one_process_writes(world, model, n, plan, beams, budget):
    check_tokens(world, model, n, plan, beams, budget)


@pytest.mark.full
@pytest.mark.parametrize(("model", "n", "plan", "beams", "budget"), WAYS)
def test_ranks_write_what_one_process_writes_every_way(world, model, n, plan, beams, budget):
    check_tokens(world, model, n, plan, beams, budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_synced_gpus_does_no_harm(world, budget):
    expected = world(1).run(_expected, "llama", "lora", 1, 2)[0]
    found = world(2).run(_tokens, "llama", "lora", "3", 1, budget, True, timeout_s=30)
    assert all(torch.equal(found[rank][1], expected[rank]) for rank in range(2))


def _counted(ranks, plan, budget):
    """Collectives of each kind inside, how many units leave, and the forwards of all ranks."""
    model = tiny_llama(layers=6)
    sharded, _, _ = prepare(ranks, model, plan, generation_memory_budget=budget)
    connect(model)
    model.eval()
    model.config.use_cache = True
    generate(model, ranks.rank, 1)
    with generation(sharded):
        ranks.counts.clear()
        generate(model, ranks.rank, 1)
        inside = dict(ranks.counts)
        kept = len(sharded.schedule.gathers.kept)
    return inside, kept, sum(unit.leaves for unit in sharded.units)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n", [2, 3])
def test_a_model_that_fits_generates_without_a_collective(world, n, plan):
    for inside, _, _ in world(n).run(_counted, plan, "auto"):
        assert sum(inside.values()) == 0, inside


@pytest.mark.parametrize("budget", [None, 140_000])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n", [2, 3])
def test_a_model_that_does_not_fit_gathers_each_unit_once_per_forward_with_one_message(world, n, plan, budget):
    forwards = 3 + 4 * (n - 1)  # the longest rank's
    for inside, kept, units in world(n).run(_counted, plan, budget):
        # A block has 30 kB and what is not in a block 16; on the way are two blocks, or three where they come from afar.
        assert kept == (0 if budget is None else 3 if plan == "3" else 2)
        assert units == 7
        assert inside["all_gather"] == forwards * (units - kept)
        assert inside["gather_numbers"] == forwards + 1  # at the end nobody runs any more


def _trained(ranks, plan, budget, generates):
    model = tiny("llama", "lora")
    sharded, _, stepping = prepare(ranks, model, plan, generation_memory_budget=budget)
    connect(model)
    for batch in batches("llama", 4, 12):
        model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
        stepping.step()
        stepping.zero_grad()
        if generates:
            model.eval()
            with generation(sharded):
                generate(model, ranks.rank, 1)
            generate(model, ranks.rank, 2)
            model.train()
    return sharded.state_dict()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("plan", PLANS)
def test_training_goes_on_as_if_nothing_had_been_generated(world, plan, budget):
    expected = world(2).run(_trained, plan, budget, False)[0]
    found = world(2).run(_trained, plan, budget, True)[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _prompt_tuned(ranks, budget, method):
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    settings = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = get_peft_model(tiny("llama"), settings[method]).eval()
        model.config.use_cache = True
        expected = generate(copy.deepcopy(model), ranks.rank, 1)
        prepare(ranks, model, "3", generation_memory_budget=budget, whole_adapters=False)
        connect(model)
        return all(torch.equal(generate(model, ranks.rank, 1), expected) for _ in range(2))


@pytest.mark.parametrize("method", ["prompt", "p", "prefix"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_virtual_tokens_are_embedded_between_forwards(world, budget, method):
    assert all(world(2).run(_prompt_tuned, budget, method, timeout_s=30))


def _unequal(ranks, budget):
    """Plain forwards, a different number on every rank, one of them broken; then all go on."""
    sharded, _, stepping = prepare(ranks, tower(), "3", generation_memory_budget=budget)
    model, (x,) = sharded.model, batches_of_numbers(1)
    expected = tower()(x)
    with sharded.generation(), torch.no_grad():
        for _ in range(2 * ranks.rank):
            assert torch.allclose(model(x), expected, atol=1e-6)
        if ranks.rank == 0:
            handle = model.blocks[1].register_forward_pre_hook(_blow)
            with pytest.raises(RuntimeError, match="blown"):
                model(x)
            handle.remove()
    loss_of(model, mine(x, ranks.rank, ranks.world_size)).backward()
    stepping.step()
    return [unit.state.name for unit in sharded.units]


def _blow(module, args):
    raise RuntimeError("blown")


@pytest.mark.parametrize("budget", ["auto", None, 3_000])
def test_plain_forwards_may_differ_in_number_and_one_may_fail(world, budget):
    for states in world(3).run(_unequal, budget, timeout_s=20):
        assert len(states) == 4


def _apart_without_gathers(ranks, plan):
    """Where every weight is whole: a generation of another length on each rank, then an evaluation of rank 0 alone."""
    model = tiny("llama", "full")
    _, _, stepping = prepare(ranks, model, plan)
    connect(model)
    for batch in batches("llama", 3, 12):
        model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
        generate(model, ranks.rank, 1)  # between a backward and its step
        stepping.step()
        stepping.zero_grad()
        if ranks.rank == 0:
            with torch.no_grad():
                model(input_ids=prompts(0))
    ranks.agree(None)


@pytest.mark.parametrize("plan", ["0", "2", "1-disk", "2-disk"])
def test_where_weights_are_whole_a_forward_asks_nobody(world, plan):
    world(2).run(_apart_without_gathers, plan, timeout_s=20)


def _other_parts(ranks):
    """Ranks that run different modules, and units that a kind of pass did not need at first."""
    sharded, _, _ = prepare(ranks, tower(4), "3", generation_memory_budget=None)
    model, (x,) = sharded.model, batches_of_numbers(1)
    wide = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    plain = tower(4)
    skip = [True]
    handle = model.blocks[2].register_forward_pre_hook(lambda module, args: None)
    original = type(model).forward

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if not (skip[0] and i == 2):
                x = block(x)
        if not skip[0] and ranks.rank == 1:
            x = self.blocks[0](x)  # once more, after its last turn
        return self.head(x)

    type(model).forward = forward
    try:
        with sharded.generation(), torch.no_grad():
            for step in range(4):
                skip[0] = step < 2
                assert torch.allclose(model(x), plain(x), atol=1e-6)
                if ranks.rank == 0:
                    assert torch.allclose(model.blocks[3](wide), plain.blocks[3](wide), atol=1e-6)
    finally:
        type(model).forward = original
        handle.remove()


def test_ranks_may_run_other_modules_and_other_units(world):
    world(2).run(_other_parts, timeout_s=20)


def _gradients_inside(ranks):
    sharded, _, _ = prepare(ranks, tower(), "3", generation_memory_budget=None)
    with sharded.generation(), pytest.raises(ScheduleError, match="no_grad"):
        sharded.model(batches_of_numbers(1)[0])


def test_training_inside_is_refused(world):
    world(2).run(_gradients_inside, timeout_s=20)


def _released(ranks, plan, budget):
    sharded, _, _ = prepare(ranks, tower(), plan, generation_memory_budget=budget)
    before = [unit.state.name for unit in sharded.units]
    with sharded.generation(), torch.no_grad():
        sharded.model(batches_of_numbers(1)[0])
    return before, [unit.state.name for unit in sharded.units], sharded.schedule.gathers.kept


@pytest.mark.parametrize("budget", ["auto", None, 3_000])
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_stays_gathered_behind_the_block(world, plan, budget):
    for before, after, kept in world(2).run(_released, plan, budget):
        assert before == after
        assert not kept


def _resident(ranks):
    """Evaluations before and after units have become resident."""
    model = tower(4)
    model.blocks[1].requires_grad_(False)
    sharded, _, stepping = prepare(ranks, model, "3-all", gpu_memory_budget=1 << 30, generation_memory_budget=None)
    (x,) = batches_of_numbers(1)
    for _ in range(4):
        with sharded.generation(), torch.no_grad():
            ranks.counts.clear()
            found = model(x)
            gathers = ranks.counts["all_gather"]
        with sharded.gathered(), torch.no_grad():
            assert torch.equal(model(x), found)
        loss_of(model, mine(x, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    return gathers, [unit.leaves for unit in sharded.units]


def test_units_that_became_resident_are_not_gathered_for_an_evaluation(world):
    for gathers, leaves in world(2).run(_resident, timeout_s=20):
        assert leaves.count(False) == 1
        assert gathers == leaves.count(True)


def _script(ranks):
    from shardwise import Accelerator, DeepSpeedPlugin
    from shardwise.run.process import forget_run

    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    model = tiny("llama", "lora").eval()
    with pytest.raises(PrepareError, match="prepare"), accelerator.generation(model):
        pass
    model = accelerator.prepare(model)
    model.config.use_cache = True
    with accelerator.generation(model):
        assert not torch.is_grad_enabled()
        before = dict(accelerator._ranks.counts)
        tokens = generate(model, ranks.rank, 1)
        accelerator.wait_for_everyone()
        assert dict(accelerator._ranks.counts) == before
    forget_run()
    return tokens


def test_the_accelerator_makes_it_explicit(world):
    expected = world(1).run(_expected, "llama", "lora", 1, 2)[0]
    found = world(2).run(_script)
    assert all(torch.equal(tokens, wanted) for tokens, wanted in zip(found, expected, strict=True))
