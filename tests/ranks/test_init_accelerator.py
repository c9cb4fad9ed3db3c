"""`accelerator.init()` and `zero3_init_flag` as a script uses them, and what they say when a checkpoint is damaged."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from rig.heard import heard
from rig.tiny import batches, share, tiny_llama, with_lora
from shardwise import Accelerator, DeepSpeedPlugin, gathered
from shardwise.building import initialising
from shardwise.building.loading import build_without_memory
from shardwise.errors import LoadingError, PrepareError, RankError
from shardwise.run.process import forget_run


def fresh(stage=3, **plugin):
    forget_run()
    initialising.SMALL_NUMEL = 1
    return Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, **plugin))


def _saved(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_llama().save_pretrained(folder, **options)


def _load(folder, **options):
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    model.config.use_cache = False
    return model


def _train(accelerator, model, optimizer):
    losses = []
    for batch in batches("llama", 3, 12):
        loss = model(**share(batch, accelerator.process_index, accelerator.num_processes)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def _script(ranks, folder, way, stage):
    """A script's lines, with and without memory for the whole model."""
    accelerator = fresh(stage, zero3_init_flag=way == "flag")
    if way == "init":
        with accelerator.init():
            model = _load(folder)
    else:
        model = _load(folder)
    assert all(parameter.is_meta == (way != "plain") for parameter in model.parameters())
    model = with_lora(model).train()
    # The optimizer is made before prepare, as scripts do; its parameters stay the same objects.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    count = sum(parameter.numel() for parameter in model.parameters())
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert prepared is model
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    losses = _train(accelerator, model, optimizer)
    state = accelerator.get_state_dict(model)
    again = _load(folder)  # a model that nobody prepares is an ordinary one
    assert not any(parameter.is_meta for parameter in again.parameters())
    accelerator.free_memory()
    return losses, state


@pytest.mark.parametrize("stage", [2, 3])
def test_a_script_trains_the_same_with_init_with_the_flag_and_without(world, tmp_path, stage):
    _saved(tmp_path)
    plain = world(2).run(_script, str(tmp_path), "plain", stage)[0]
    for way in ("init", "flag") if stage == 3 else ("init",):
        losses, state = world(2).run(_script, str(tmp_path), way, stage)[0]
        assert losses == plain[0]
        assert state.keys() == plain[1].keys()
        assert all(torch.equal(value, plain[1][name]) for name, value in state.items())


def _from_config(ranks, flag):
    from transformers import AutoModelForCausalLM

    config = tiny_llama().config
    torch.manual_seed(31)
    expected = AutoModelForCausalLM.from_config(config).state_dict()
    accelerator = fresh(zero3_init_flag=flag)
    torch.manual_seed(31)
    model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta == flag for parameter in model.parameters())
    accelerator.prepare(model)
    state = accelerator.get_state_dict(model)
    accelerator.free_memory()
    build_without_memory(False)
    if ranks.rank == 0:
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("flag", [False, True])
def test_from_config_under_the_flag_starts_with_the_numbers_of_an_ordinary_build(world, flag):
    world(2).run(_from_config, flag)


def _text_of(ranks, folder, kind, whose=None):
    """What a rank reads of the error when it, or only rank `whose`, has the damaged checkpoint."""
    accelerator = fresh()
    own = folder if whose is None or ranks.rank == whose else f"{folder}-good"
    with pytest.raises(kind) as caught, accelerator.init():
        _load(own)
    accelerator.free_memory()
    # And the ranks can go on together.
    with accelerator.init():
        model = _load(f"{folder}-good")
    accelerator.prepare(model)
    accelerator.free_memory()
    return str(caught.value)


def _damaged(tmp_path, damage, **options):
    folder = tmp_path / "model"
    _saved(folder, **options)
    shutil.copytree(folder, tmp_path / "model-good")
    damage(folder)
    return str(folder)


def _cut(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def _without_one(folder):
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["model.norm.weight"]
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})


def _without_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (_cut, {}, "model.safetensors is cut off: its header describes"),
        (_without_header, {}, "is cut off or is no safetensors file"),
        (_without_one, {"max_shard_size": "30KB"}, "lacks model.norm.weight, which model.safetensors.index.json says"),
    ],
    ids=["truncated", "no header", "missing tensor"],
)
def test_a_damaged_checkpoint_is_a_clear_error_on_every_rank(world, tmp_path, damage, options, words):
    folder = _damaged(tmp_path, damage, **options)
    texts = world(2).run(_text_of, folder, LoadingError)
    assert texts[0] == texts[1]
    assert words in texts[0]


def test_a_checkpoint_damaged_on_one_rank_alone_is_every_ranks_error(world, tmp_path):
    folder = _damaged(tmp_path, _cut)
    texts = world(2).run(_text_of, folder, (LoadingError, RankError), 1)
    assert "is cut off" in texts[1]
    assert texts[0] == f"rank 1 failed: LoadingError: {texts[1]}"


def _mismatch(ranks, folder):
    accelerator = fresh()
    with pytest.raises(RuntimeError) as caught, accelerator.init():
        _load(folder, vocab_size=67)
    return str(caught.value)


def test_a_shape_that_differs_from_the_checkpoint_is_an_error_on_every_rank(world, tmp_path):
    _saved(tmp_path)
    texts = world(2).run(_mismatch, str(tmp_path))
    assert texts[0] == texts[1]
    assert "mismatch" in texts[0]


def _vanishing(ranks, folder):
    accelerator = fresh()
    with accelerator.init():
        model = _load(folder)
    ranks.barrier()
    if ranks.rank == 1:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    ranks.barrier()
    with pytest.raises((LoadingError, RankError)) as caught:
        accelerator.prepare(model)
    return str(caught.value)


def test_a_file_that_is_cut_between_init_and_prepare_is_an_error_on_every_rank(world, tmp_path):
    _saved(tmp_path)
    for text in world(2).run(_vanishing, str(tmp_path)):
        assert "ends in the middle of" in text


def _gathered_too_early(ranks):
    accelerator = fresh()
    with accelerator.init():
        model = tiny_llama()
    with pytest.raises(PrepareError, match="have no memory yet"), gathered(model.lm_head):
        pass


def test_gathering_before_prepare_is_a_clear_error(world):
    world(2).run(_gathered_too_early)


def _built_differently(ranks):
    accelerator = fresh()
    if ranks.rank == 0:
        model = tiny_llama()
        accelerator._ranks.agree(None)
    else:
        with accelerator.init():
            model = tiny_llama()
    with pytest.raises((PrepareError, RankError), match="Build the same model in the same way on every rank"):
        accelerator.prepare(model)


def test_a_model_that_only_some_ranks_built_inside_is_an_error_on_every_rank(world):
    world(2).run(_built_differently)


def _changed_outside(ranks):
    accelerator = fresh()
    torch.manual_seed(3)
    with accelerator.init():
        model = tiny_llama()
    model.to(torch.bfloat16)
    torch.manual_seed(3)
    expected = tiny_llama().to(torch.bfloat16)
    model = accelerator.prepare(model)
    with gathered(model):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_a_change_outside_of_the_block_is_made_at_prepare(world):
    world(2).run(_changed_outside)


def _made_on_meta(ranks):
    accelerator = fresh()
    with accelerator.init():
        model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32, device=model.lm_head.weight.device))
    with pytest.raises(PrepareError, match=r"is on the meta device and has no values.*accelerator\.init"):
        accelerator.prepare(model)


def test_a_weight_that_is_made_on_the_meta_device_is_a_clear_error(world):
    world(2).run(_made_on_meta)


def _no_effect(ranks, words):
    accelerator = fresh(zero3_init_flag=True)
    with heard() as records:
        accelerator.prepare(tiny_llama())  # its class is called, which the flag does not see
    accelerator.free_memory()
    return [text for text in records if words in text]


def test_a_flag_without_effect_is_said_once_on_rank_0(world):
    first, second = world(2).run(_no_effect, "zero3_init_flag had no effect on this LlamaForCausalLM")
    assert len(first) == 1
    assert second == []


def _switched(ranks, folder):
    for flag in (True, False):
        accelerator = fresh(3, zero3_init_flag=flag)
        plugin = accelerator.state.deepspeed_plugin
        with plugin.zero3_init_context_manager(enable=not flag):
            inside = _load(folder)
        outside = _load(folder)
        assert all(parameter.is_meta != flag for parameter in inside.parameters())
        assert all(parameter.is_meta == flag for parameter in outside.parameters())
    build_without_memory(False)


def test_a_plugin_switches_building_without_memory_for_a_block(world, tmp_path):
    _saved(tmp_path)
    world(2).run(_switched, str(tmp_path))
