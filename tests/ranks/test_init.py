"""Models built and loaded without memory: the same numbers as an ordinary build, in shards."""

from __future__ import annotations

import datetime
import io
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rig.engine import PLANS, prepare, shard, trained, weights_of
from rig.tiny import batches, share, tiny_llama, with_lora
from shardwise.building import initialising, recorded_source
from shardwise.building.deferred_tensors import sources_of
from shardwise.building.loading import building
from shardwise.errors import LoadingError, RankError


class Odd(nn.Module):
    """Everything that torch's modules do to their weights when they are made, and some that scripts do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.embedding = nn.Embedding(17, 12, padding_idx=3)
        self.attention = nn.MultiheadAttention(12, 4)
        self.lstm = nn.LSTM(12, 7)
        self.convolution = nn.Conv1d(12, 9, 3)
        self.norm = nn.BatchNorm1d(12)
        self.scaled = nn.Parameter(torch.randn(30, 5) * 0.1 + torch.eye(30, 5))
        self.ones = nn.Parameter(torch.ones(13))
        self.cut = nn.Parameter(torch.zeros(7, 9))
        self.half = nn.Linear(6, 10, dtype=torch.bfloat16)
        self.register_buffer("table", torch.arange(40.0).sin()[:, None] * torch.rand(1, 20))
        self.register_buffer("hidden", torch.rand(3, 3), persistent=False)
        nn.init.orthogonal_(self.convolution.weight)
        nn.init.trunc_normal_(self.cut, std=0.7)
        nn.init.kaiming_normal_(self.first.weight)
        with torch.no_grad():
            self.embedding.weight[5:9] = self.embedding.weight[1:5]
            self.embedding.weight[10] = 7.0
            self.scaled[::2].mul_(3)
        self.tied = nn.Linear(12, 17, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, x):
        return self.first(x)


def _built_inside(ranks, build, plan, precision, small=1):
    initialising.SMALL_NUMEL = small
    # Every rank has a seed of its own: rank 0's numbers are everybody's, as with a model that has memory.
    torch.manual_seed(7)
    expected = build()
    after = torch.rand(3)
    torch.manual_seed(7 + ranks.rank)
    with building():
        model = build()
    if ranks.rank == 0:
        assert torch.equal(torch.rand(3), after)
    assert all(parameter.is_meta == (parameter.numel() >= small) for parameter in model.parameters())
    sharded = shard(ranks, model, plan, precision, sources=sources_of(model))
    found = weights_of(sharded)
    names = dict(expected.named_parameters())
    assert found.keys() == names.keys()
    for name, value in names.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    state = sharded.state_dict()
    if ranks.rank == 0:
        assert list(state) == list(expected.state_dict())
        for name, value in expected.state_dict().items():
            # Masters keep the user's own values, whatever the weights compute in.
            assert torch.equal(state[name], value), name
    for (name, found_buffer), (_, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(found_buffer, wanted), name


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("plan", PLANS)
def test_own_modules_start_with_the_numbers_of_an_ordinary_build(world, plan, size):
    world(size).run(_built_inside, Odd, plan, "no")


@pytest.mark.parametrize("plan", PLANS)
def test_small_weights_with_memory_go_with_large_ones_without(world, plan):
    world(3).run(_built_inside, Odd, plan, "bf16", 100)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_transformers_model_starts_with_the_numbers_of_an_ordinary_build(world, precision):
    world(2).run(_built_inside, tiny_llama, "3", precision)


def _save(folder, tied=False, dtype=None, **options):
    model = tiny_llama(tied=tied)
    if dtype is not None:
        model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return model


def _loaded_equals_ordinary(ranks, load, plan="3", precision="no"):
    initialising.SMALL_NUMEL = 1
    torch.manual_seed(3)
    expected = load()
    after = torch.rand(3)
    torch.manual_seed(3 + ranks.rank)
    with building():
        model = load()
    if ranks.rank == 0:
        assert torch.equal(torch.rand(3), after)
    assert type(model) is type(expected)
    assert all(parameter.is_meta for parameter in model.parameters())
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in expected.named_parameters()}
    sharded = shard(ranks, model, plan, precision, sources=sources_of(model))
    found = weights_of(sharded)
    names = dict(expected.named_parameters())
    assert found.keys() == names.keys()
    for name, value in names.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    for (name, buffer), (_, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    return model, expected


def _load(folder, kind="AutoModelForCausalLM", **options):
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, kind).from_pretrained(folder, **options)


def _load_and_compare(ranks, folder, options, plan="3", precision="no"):
    _loaded_equals_ordinary(ranks, lambda: _load(folder, **options), plan, precision)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_loaded_as_an_ordinary_load_does(world, tmp_path, plan, tied):
    _save(tmp_path, tied)
    world(2).run(_load_and_compare, str(tmp_path), {}, plan)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_parts_and_another_dtype_are_loaded_as_an_ordinary_load_does(world, tmp_path, precision):
    _save(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    world(3).run(_load_and_compare, str(tmp_path), {"dtype": torch.bfloat16}, "3", precision)


def _not_mapped(ranks, folder):
    initialising.SMALL_NUMEL = 1
    with building():
        model = _load(folder, disable_mmap=True)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_file_that_must_not_be_mapped_is_not_read_whole_either(world, tmp_path):
    import inspect

    from transformers import PreTrainedModel

    if "disable_mmap" not in inspect.signature(PreTrainedModel.from_pretrained).parameters:
        pytest.skip("this transformers always maps")
    _save(tmp_path)
    world(1).run(_not_mapped, str(tmp_path))


def test_a_head_that_the_checkpoint_lacks_is_drawn_as_an_ordinary_load_does(world, tmp_path):
    _save(tmp_path)
    world(2).run(_load_and_compare, str(tmp_path), {"kind": "AutoModelForSequenceClassification", "num_labels": 7}, "3")


def _weight_file(folder):
    return Path(folder) / "model.safetensors"


def _rename(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(_weight_file(folder))
    save_file({change(name): value.clone() for name, value in tensors.items()}, _weight_file(folder), {"format": "pt"})


def test_old_prefixes_are_renamed_as_an_ordinary_load_does(world, tmp_path):
    """A checkpoint of the base model alone, and one whose names have another prefix."""
    _save(tmp_path, tied=True)
    _rename(tmp_path, lambda name: name.removeprefix("model."))
    world(2).run(_load_and_compare, str(tmp_path), {})
    _rename(tmp_path, lambda name: f"old.{name}")
    world(2).run(_load_and_compare, str(tmp_path), {"key_mapping": {r"^old\.": "model."}})


def test_a_tied_weight_that_the_file_holds_twice_is_one_weight(world, tmp_path):
    from safetensors.torch import load_file, save_file

    _save(tmp_path, tied=True)
    tensors = load_file(_weight_file(tmp_path))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, _weight_file(tmp_path), {"format": "pt"})
    world(2).run(_load_and_compare, str(tmp_path), {})
    tensors["lm_head.weight"] += 1
    save_file(tensors, _weight_file(tmp_path), {"format": "pt"})
    world(2).run(_load_and_compare, str(tmp_path), {})


def _adapters(ranks, folder, where, save, resize):
    """The same script with and without memory: load, perhaps resize, add adapters, train three steps."""
    initialising.SMALL_NUMEL = 1

    def base():
        model = _load(folder, attn_implementation="eager")
        model.config.use_cache = False
        return model

    def finish(model):
        if resize:
            model.resize_token_embeddings(70)
        return with_lora(model, save=save).train()

    torch.manual_seed(5)
    expected = finish(base())
    torch.manual_seed(5)
    with building():
        model = base()
        if where == "inside":
            model = finish(model)
    if where == "after":
        model = finish(model)
    plain = torch.optim.AdamW(trained(expected), lr=3e-3, eps=1e-4)
    names = {name: p.requires_grad for name, p in expected.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == names
    sharded, _, stepping = prepare(ranks, model, "3", sources=sources_of(model))
    found = weights_of(sharded)
    for name, value in expected.named_parameters():
        assert torch.equal(found[name], value), name
    for batch in batches("llama", 3, 12):
        expected(**batch).loss.backward()
        plain.step()
        plain.zero_grad()
        model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
        stepping.step()
        stepping.zero_grad()
    found = weights_of(sharded)
    for name, value in expected.named_parameters():
        assert (found[name] - value).abs().max() <= 1e-6, name


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("where", ["inside", "after"])
def test_adapters_and_new_tokens_are_added_to_a_model_without_memory(world, tmp_path, where, save, resize):
    _save(tmp_path)
    world(2).run(_adapters, str(tmp_path), where, save, resize)


def _save_torch(folder, model, zipped, parts=1):
    """As transformers wrote checkpoints before safetensors: one file, or several with an index."""
    _weight_file(folder).unlink()
    state = list(model.state_dict().items())
    names = [f"pytorch_model-{n + 1:05}-of-{parts:05}.bin" if parts > 1 else "pytorch_model.bin" for n in range(parts)]
    places = {}
    for number, name in enumerate(names):
        part = dict(state[number::parts])
        torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)
        places |= dict.fromkeys(part, name)
    if parts > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as saved", "bf16"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_checkpoint_that_is_not_safetensors_is_loaded_as_an_ordinary_load_does(
    world, tmp_path, tied, options, zipped, parts
):
    _save_torch(tmp_path, _save(tmp_path, tied), zipped, parts)
    world(3 if parts == 3 else 2).run(_load_and_compare, str(tmp_path), options)


def _reader(kind, path, rank):
    from safetensors.torch import load_file

    if kind == "safetensors":
        return load_file(path)
    if kind == "in memory":
        state = torch.load(io.BytesIO(Path(path).read_bytes()))
        return {name: value * (rank + 1) for name, value in state.items()}  # rank 0's are everybody's
    return torch.load(path, map_location="cpu")


class Loading(nn.Module):
    """Loads a state dict when it is made, and changes it on the way: nothing that this library knows of."""

    def __init__(self, kind, path, rank=0):
        super().__init__()
        self.up = nn.Linear(30, 130)
        self.down = nn.Linear(130, 30)
        self.table = nn.Embedding(100, 30)
        self.head = nn.Linear(30, 100)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        state = _reader(kind, path, rank)
        fused = state.pop("fused")
        state["up.weight"], state["down.weight"] = fused[:, :130].t(), fused[:, 130:]
        state["table.weight"] = state["table.weight"] * 2
        self.load_state_dict(state)

    def forward(self, x):
        return self.head(self.down(self.up(x)))


def _loading(ranks, kind, path):
    # Everything is larger than a fact in the case of memory, so that it is sent.
    recorded_source._FACT_NBYTES = 100 if kind == "in memory" else 1 << 16
    expected = Loading(kind, path)
    initialising.SMALL_NUMEL = 1
    with building():
        model = Loading(kind, path, ranks.rank)
    assert all(parameter.is_meta for parameter in model.parameters())
    sources = sources_of(model)
    made_by = {name: sources[id(p)].made_by for name, p in model.named_parameters()}
    if kind == "in memory":
        assert made_by["head.weight"] == "rank 0"
    else:
        assert made_by["head.weight"] == made_by["up.bias"] == "each rank"
        assert made_by["up.weight"] == made_by["down.weight"] == made_by["table.weight"] == "one rank"
    sharded = shard(ranks, model, "3", sources=sources)
    found = weights_of(sharded)
    for name, value in expected.named_parameters():
        assert torch.equal(found[name], value), name
    assert torch.equal(model.steps, expected.steps)
    assert model.steps[1] == 8


def _save_loading(folder, kind):
    from safetensors.torch import save_file

    torch.manual_seed(8)
    state = {
        "fused": torch.randn(30, 260),
        "up.bias": torch.randn(130),
        "down.bias": torch.randn(30),
        "head.bias": torch.randn(100),
        "table.weight": torch.randn(100, 30),
        "steps": torch.tensor([7, 8, 9]),
    }
    state["head.weight"] = state["table.weight"] if kind != "safetensors" else state["table.weight"].clone()
    path = str(folder / "state")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    return path


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "in memory"])
def test_a_module_that_loads_its_own_state_dict_starts_with_the_numbers_of_an_ordinary_build(
    world, tmp_path, kind, size
):
    world(size).run(_loading, kind, _save_loading(tmp_path, kind))


def _lost_on_one_rank(ranks, path, rank):
    initialising.SMALL_NUMEL = 1
    with building():
        model = Loading("zip", path if ranks.rank != rank else path + ".own")
    if ranks.rank == rank:
        Path(path + ".own").unlink()
    with pytest.raises((LoadingError, RankError)) as caught:
        shard(ranks, model, "3", sources=sources_of(model))
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_make_what_it_is_to_send_is_every_ranks_error(world, tmp_path, rank):
    path = _save_loading(tmp_path, "zip")
    Path(path + ".own").write_bytes(Path(path).read_bytes())
    told = world(2).run(_lost_on_one_rank, path, rank, timeout_s=20)
    assert told[rank][0] == "LoadingError"
    assert told[1 - rank][0] == "RankError"
    assert told[rank][1] in told[1 - rank][1]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_that_is_cut_off_is_an_error_before_anything_is_built(tmp_path, zipped):
    path = tmp_path / "cut.bin"
    torch.save({"weight": torch.randn(300, 300)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-1000])
    with building(), pytest.raises(LoadingError if not zipped else RuntimeError):
        torch.load(path)


def test_what_is_not_read_here_is_left_to_torch(tmp_path):
    """Other objects, other devices and other pickles: what torch.load gives outside of a block."""
    torch.save({"weight": torch.randn(300, 300), "when": datetime.date(2020, 2, 2)}, tmp_path / "dated.bin")
    with building():
        found = torch.load(tmp_path / "dated.bin", weights_only=False)
        assert found["when"].year == 2020
        assert not found["weight"].is_meta
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "dated.bin")
        assert torch.load(tmp_path / "dated.bin", map_location="meta", weights_only=False)["weight"].is_meta
    assert not hasattr(torch.load, "_shardwise_lazy")


def _method(name):
    import peft

    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    virtual = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    return {
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **targets),
        "embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
        "loha": lambda: peft.LoHaConfig(r=4, **targets),
        "lokr": lambda: peft.LoKrConfig(r=4, **targets),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **targets),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual),
    }[name]()


def _other_adapters(ranks, folder, name, where):
    from peft import get_peft_model as get

    def get_peft_model(model, config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers in an old way
            return get(model, config)

    initialising.SMALL_NUMEL = 1
    torch.manual_seed(9)
    expected = get_peft_model(_load(folder), _method(name))
    torch.manual_seed(9)
    with building():
        model = _load(folder)
        if where == "inside":
            model = get_peft_model(model, _method(name))
    if where == "after":
        model = get_peft_model(model, _method(name))
    sharded = shard(ranks, model, "3", sources=sources_of(model))
    found = weights_of(sharded)
    names = {key: p.requires_grad for key, p in expected.named_parameters()}
    assert {key: p.requires_grad for key, p in model.named_parameters()} == names
    for key, value in expected.named_parameters():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("where", ["after", pytest.param("inside", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["dora", "pissa", "embedding", "loha", "lokr", "ia3", "prefix", "prompt", "p-tuning"])
def test_every_kind_of_adapter_starts_with_the_numbers_of_an_ordinary_build(world, tmp_path, name, where):
    _save(tmp_path)
    world(2).run(_other_adapters, str(tmp_path), name, where)
