"""The ways in which scripts save a sharded model: whoever is given what, nobody waits for somebody who does not come."""

from __future__ import annotations

import datetime
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import shardwise
from ranks.test_front_training import fresh
from rig.adapters import Normed, adapted, config_of, stir, tiny_base
from rig.heard import heard
from shardwise.errors import CheckpointError, ConfigError, RankError
from shardwise.ranks.ranks import Ranks

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def quietly(function: Any) -> Any:
    """The function on a rank, without peft's and transformers' own warnings."""

    @functools.wraps(function)
    def run(ranks: Ranks, *args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(ranks, *args)

    return run


def prepared(stage: int, model: Any) -> Any:
    accelerator = fresh(stage)
    weights = [p for p in model.parameters() if p.requires_grad]
    accelerator.prepare(*([model, torch.optim.SGD(weights, lr=0.1)] if weights else [model]))
    return accelerator


def _files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_equal(folder: Path, stock: Path) -> None:
    found, wanted = _files(folder), _files(stock)
    assert found.keys() == wanted.keys()
    assert wanted
    for name, tensors in wanted.items():
        assert found[name].keys() == tensors.keys(), (folder, name, sorted(found[name].keys() ^ tensors.keys())[:3])
        assert tensors
        for key, value in tensors.items():
            assert torch.equal(found[name][key], value), (folder, name, key)


# Who is given what.

GIVEN = {
    "every rank its own": lambda state, rank: {"state_dict": state},
    "None elsewhere": lambda state, rank: {"state_dict": state or None},
    "nothing elsewhere": lambda state, rank: {"state_dict": state} if rank == 0 else {},
    "nothing anywhere": lambda state, rank: {},
    "None anywhere": lambda state, rank: {"state_dict": None},
}


@quietly
def _idioms(ranks: Ranks, stage: int, kind: str, folder: str) -> None:
    model = adapted("LORA:head", ("default", "ref")) if kind == "adapters" else tiny_base()
    accelerator = prepared(stage, model)
    main = accelerator.is_main_process
    state = accelerator.get_state_dict(model)
    assert bool(state) == main
    saved = []
    for idiom, given in GIVEN.items():
        for says in ({}, {"is_main_process": main}, {"is_main_process": main, "save_function": accelerator.save}):
            saved.append(Path(folder) / f"{idiom} {len(says)}")
            model.save_pretrained(saved[-1], **given(state, ranks.rank), **says)
    if main:  # and without the others, as transformers' Trainer does
        for n in range(3):
            saved.append(Path(folder) / f"alone {n}")
            model.save_pretrained(saved[-1], state_dict=state)
    saved.append(Path(folder) / "behind it")
    model.save_pretrained(saved[-1])
    accelerator.free_memory()
    if main:
        model.save_pretrained(Path(folder) / "stock")
        for path in saved:
            assert_equal(path, Path(folder) / "stock")


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_every_variant_of_the_idioms_saves_and_nobody_waits(world, tmp_path, kind, stage, n):
    world(n).run(_idioms, stage, kind, str(tmp_path), timeout_s=60)


@quietly
def _whose(ranks: Ranks, folder: str) -> None:
    model = tiny_base()
    accelerator = prepared(3, model)
    state = {} if ranks.rank == 1 else None
    if ranks.rank == 1:
        model.save_pretrained(folder, state_dict=state)  # it was told that there is nothing to do
    else:
        with pytest.raises(ConfigError, match="rank 1 was given a state_dict, and rank 0 none"):
            model.save_pretrained(folder, state_dict=state)
    model.save_pretrained(folder)
    accelerator.free_memory()


def test_a_state_dict_for_another_rank_than_the_first_is_an_error_for_those_without(world, tmp_path):
    world(3).run(_whose, str(tmp_path), timeout_s=60)


@quietly
def _late(ranks: Ranks, folder: str) -> None:
    model = tiny_base()
    accelerator = prepared(3, model)
    if ranks.rank:
        accelerator._ranks.words.timeout = datetime.timedelta(seconds=0.2)
        with pytest.raises(RankError, match=r"rank 0 has not come to it .* every rank has to call it"):
            model.save_pretrained(folder)
    ranks.barrier()


def test_a_rank_that_waits_for_the_first_in_vain_says_so(world, tmp_path):
    world(2).run(_late, str(tmp_path), timeout_s=60)


ALONE = {
    "get_state_dict": lambda accelerator, model, folder: accelerator.get_state_dict(model),
    "save_model": lambda accelerator, model, folder: accelerator.save_model(model, folder),
    "save_pretrained": lambda accelerator, model, folder: accelerator.unwrap_model(model).save_pretrained(folder),
}


@quietly
def _alone(ranks: Ranks, stage: int, verb: str, folder: str) -> list[str]:
    """The usual `if main:` of a script for DDP; then all ranks, to whom nothing has happened."""
    model = tiny_base()
    accelerator = prepared(stage, model)
    assemble, words = Ranks.assemble, accelerator._ranks.words
    lines: list[str] = []
    if ranks.rank == 0:
        with pytest.MonkeyPatch.context() as patch, heard() as lines:
            patch.setattr(Ranks, "assemble", functools.partialmethod(assemble, say_after_s=0.2))
            patch.setattr(accelerator._ranks, "_timeout", datetime.timedelta(seconds=0.6))
            patch.setattr(words, "timeout", datetime.timedelta(seconds=0.6))
            patch.setattr(type(words), "say_after_s", 0.2)
            with pytest.raises(RankError):
                ALONE[verb](accelerator, model, folder)
    ranks.barrier()
    ALONE[verb](accelerator, model, folder)
    return lines


@pytest.mark.parametrize("verb", ALONE)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_save_of_the_main_process_alone_says_early_that_it_takes_every_rank(world, tmp_path, stage, verb):
    lines = world(2).run(_alone, stage, verb, str(tmp_path), timeout_s=60)[0]
    assert len(lines) == 1
    assert verb in lines[0]
    assert "every rank" in lines[0]
    assert lines[0].endswith("for rank 1.")


@quietly
def _incomplete(ranks: Ranks, folder: str) -> None:
    from peft import get_peft_model_state_dict

    path = Path(folder)
    model = adapted("LORA", ("default", "ref"))
    accelerator = prepared(3, model)
    state = accelerator.get_state_dict(model)
    own = {name: value for name, value in state.items() if ".ref." not in name}
    half = {name: value for name, value in state.items() if "lora_A" not in name}
    broken = {name: value[:0] if "lora_B" in name else value for name, value in state.items()}
    for given, words in (
        (own, r"holds 0 of the 8 tensors of the adapter 'ref'"),
        (half, r"holds 4 of the 8 tensors of the adapter 'default'"),
        (broken, r"has no elements"),
        ({}, r"holds 0 of the 8 tensors of the adapter 'default'"),
    ):
        if ranks.rank == 0:
            with pytest.raises(CheckpointError, match=words):
                model.save_pretrained(folder, state_dict=given)
    model.save_pretrained(path / "one", state_dict=own, selected_adapters=["default"])
    # By the names of peft's files, as scripts make them that read the weights themselves.
    with shardwise.gathered(model):
        by_file = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    model.save_pretrained(path / "named", state_dict=by_file, selected_adapters=["default"])
    accelerator.free_memory()
    if ranks.rank == 0:
        model.save_pretrained(path / "stock", selected_adapters=["default"])
        assert_equal(path / "one", path / "stock")
        assert_equal(path / "named", path / "stock")


def test_a_given_state_dict_is_held_against_what_peft_keeps_of_the_adapter(world, tmp_path):
    world(2).run(_incomplete, str(tmp_path), timeout_s=60)


# What is saved.


@quietly
def _normed(ranks: Ranks, stage: int, folder: str) -> None:
    """Running statistics of a module that is trained whole, and an adapter of which one half is frozen."""
    from peft import LoraConfig, get_peft_model

    from shardwise.checkpoint.from_checkpoint import export

    model = get_peft_model(Normed(), LoraConfig(r=2, target_modules=["first"], modules_to_save=["norm", "last"]))
    stir(model)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    accelerator = prepared(stage, model)
    accelerator.backward(model(torch.randn(4, 6)).square().mean())
    path = Path(folder)
    model.save_pretrained(path / "plain")
    state = accelerator.get_state_dict(model)
    model.save_pretrained(path / "given", state_dict=state, is_main_process=accelerator.is_main_process)
    accelerator.save_state(path / "state")
    accelerator.free_memory()
    if accelerator.is_main_process:
        export(path / "state", path / "exported")
        model.save_pretrained(path / "stock")
        assert any("running_mean" in name for name in load_file(path / "stock" / "adapter_model.safetensors"))
        for idiom in ("plain", "given", "exported"):
            assert_equal(path / idiom, path / "stock")
            found, wanted = (json.loads((path / f / "adapter_config.json").read_text()) for f in (idiom, "stock"))
            assert found == wanted


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_running_statistics_and_frozen_halves_are_saved(world, tmp_path, stage):
    world(2).run(_normed, stage, str(tmp_path), timeout_s=60)


class Policy(nn.Module):
    """A model of peft inside a script's own module, beside a head."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.value = nn.Linear(16, 1)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.value(self.inner(**inputs, output_hidden_states=True).hidden_states[-1]).mean()


@quietly
def _parts(ranks: Ranks, folder: str) -> None:
    path = Path(folder)
    for kind in ("peft", "transformers", "whole"):
        inner = adapted("LORA:head") if kind == "peft" else tiny_base()
        if kind == "transformers":
            inner.add_adapter(config_of("LORA"), "mine")
            stir(inner)
        model = Policy(inner) if kind != "transformers" else inner
        accelerator = prepared(3, model)
        inner.save_pretrained(path / kind / "plain")
        state = accelerator.get_state_dict(model)
        inner.save_pretrained(path / kind / "given", state_dict=state, is_main_process=accelerator.is_main_process)
        if kind == "peft":
            inner.get_base_model().save_pretrained(path / "base" / "plain")
        accelerator.free_memory()
        if accelerator.is_main_process:
            inner.save_pretrained(path / kind / "stock")
            for idiom in ("plain", "given") if kind != "peft" else ("plain",):
                assert_equal(path / kind / idiom, path / kind / "stock")
            if kind == "peft":
                inner.get_base_model().save_pretrained(path / "base" / "stock")
                assert_equal(path / "base" / "plain", path / "base" / "stock")


def test_models_inside_others_and_adapters_inside_transformers_models_are_saved(world, tmp_path):
    world(2).run(_parts, str(tmp_path), timeout_s=60)


class Twins(nn.Module):
    """Two modules with one buffer, which is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.one, self.other = nn.Module(), nn.Module()
        shared = torch.arange(12.0).reshape(3, 4).T
        self.one.register_buffer("table", shared)
        self.other.register_buffer("table", shared)


@quietly
def _shared(ranks: Ranks, folder: str) -> None:
    model = Twins()
    accelerator = prepared(3, model)
    assert model.one.table is model.other.table
    accelerator.save_model(model, folder)
    state = accelerator.get_state_dict(model)
    accelerator.free_memory()
    if state:
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            assert set(file.keys()) == {*state} - {"other.table"}
            assert file.metadata()["other.table"] == "one.table"
            assert torch.equal(file.get_tensor("one.table"), state["other.table"])
        assert torch.equal(state["one.table"], torch.arange(12.0).reshape(3, 4).T)


def test_a_buffer_of_two_modules_stays_one_and_is_written_once(world, tmp_path):
    world(2).run(_shared, str(tmp_path), timeout_s=60)
