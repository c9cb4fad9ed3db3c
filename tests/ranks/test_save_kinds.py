"""Saves beyond the plain one: uploads, conversions, pickles, quantised bases, names that are paths, old checkpoints."""

from __future__ import annotations

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardwise
from ranks.test_front_training import fresh
from ranks.test_save_idioms import assert_equal, prepared, quietly
from rig.adapters import QV, adapted, stir, tiny_base
from shardwise.checkpoint.from_checkpoint import export
from shardwise.errors import CheckpointError, RankError
from shardwise.ranks.ranks import Ranks

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


# Uploads.


class Hub:
    """Stands in for the hub: repositories are directories."""

    def __init__(self, folder: Path, broken: str) -> None:
        self.folder = folder
        self.broken = broken

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        if self.broken == "before":
            raise PermissionError("no token")
        self.repo_id = repo_id
        return self

    def upload(self, working_dir: str, repo_id: str, *_: Any, **__: Any) -> str:
        if self.broken == "behind":
            raise ConnectionError("the hub does not answer")
        shutil.copytree(working_dir, self.folder / repo_id)
        return f"pushed {repo_id}"

    def save(self, path: str) -> None:
        Path(path).write_text("a card")


@contextmanager
def _hub(folder: Path, broken: str = "") -> Any:
    from transformers.utils import hub

    fake = Hub(folder, broken)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hub, "hf_api", lambda: fake)
        patched.setattr(hub, "create_and_tag_model_card", lambda *a, **k: fake)
        patched.setattr(hub.PushToHubMixin, "_upload_modified_files", lambda self, *a, **k: fake.upload(*a, **k))
        if broken == "inside":
            from shardwise.weights import save_pretrained

            def fail(*_: Any) -> Any:
                raise OSError("disk full")

            patched.setattr(save_pretrained, "on_whole", fail)
        yield


@quietly
def _push(ranks: Ranks, folder: str) -> None:
    for kind in ("adapter", "whole"):
        model = adapted("LORA", ("default", "ref")) if kind == "adapter" else tiny_base()
        accelerator = prepared(3, model)
        for broken, words in (("before", "no token"), ("inside", "disk full"), ("behind", "does not answer")):
            if kind == "whole" and broken == "inside":
                continue
            with _hub(Path(folder), broken), pytest.raises((OSError, RankError), match=words):
                model.push_to_hub("broken")
        with _hub(Path(folder)):
            pushed = model.push_to_hub(kind)
        assert pushed == (f"pushed {kind}" if accelerator.is_main_process else None)
        accelerator.free_memory()
        if accelerator.is_main_process:
            model.save_pretrained(Path(folder) / f"{kind} stock")
            assert_equal(Path(folder) / kind, Path(folder) / f"{kind} stock")
            assert (Path(folder) / kind / "README.md").read_text() == "a card"


@pytest.mark.parametrize("n", [1, 2])
def test_rank_0_alone_pushes_to_the_hub_and_its_error_is_every_ranks(world, tmp_path, n):
    world(n).run(_push, str(tmp_path), timeout_s=60)


# What peft makes of the weights.


@quietly
def _converted(ranks: Ranks, folder: str) -> None:
    """PiSSA changes the base: its adapter is saved as the difference to the one that it began with."""
    from peft import LoraConfig, get_peft_model

    path = Path(folder)
    torch.manual_seed(3)
    model = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=QV, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(path / f"begun{ranks.rank}")
    stir(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    accelerator = prepared(3, model)
    model.save_pretrained(path / "saved", path_initial_model_for_weight_conversion=str(path / f"begun{ranks.rank}"))
    names = [name for name, _ in model.named_parameters()]
    accelerator.free_memory()
    assert names == [name for name, _ in model.named_parameters()]
    if accelerator.is_main_process:
        model.peft_config["default"].r = 2
        model.peft_config["default"].lora_alpha = 8
        model.peft_config["default"].init_lora_weights = "pissa"
        model.save_pretrained(path / "stock", path_initial_model_for_weight_conversion=str(path / "begun0"))
        assert (
            load_file(path / "stock" / "adapter_model.safetensors").popitem()[1].shape.count(4) == 1
        )  # twice the rank
        assert_equal(path / "saved", path / "stock")


def test_an_adapter_is_converted_on_the_way_into_its_file(world, tmp_path):
    world(2).run(_converted, str(tmp_path), timeout_s=60)


@quietly
def _allocated(ranks: Ranks, folder: str) -> None:
    """AdaLoRA saves only the ranks that it has given out, and says in its configuration which; they change while it trains."""
    path = Path(folder)
    model = adapted("ADALORA")
    accelerator = prepared(3, model)
    modules = [name for name, _ in model.named_parameters() if "lora_E" in name]
    for number, chosen in enumerate(([True, False, True], [False, False, True])):
        model.peft_config["default"].rank_pattern = {
            name.removeprefix("base_model.model."): list(chosen) for name in modules
        }
        accelerator.save_state(path / f"state{number}")
        assert all(name.endswith(".default") for name in model.peft_config["default"].rank_pattern), (
            "asking changes nothing"
        )
        model.save_pretrained(path / f"saved{number}")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            export(path / f"state{number}", path / f"exported{number}")
            assert_equal(path / f"exported{number}", path / f"saved{number}")
            found = load_file(path / f"saved{number}" / "adapter_model.safetensors")
            assert all(value.shape[0] == sum(chosen) for name, value in found.items() if "lora_A" in name)
    accelerator.free_memory()


def test_ranks_that_an_adapter_has_given_up_are_not_saved(world, tmp_path):
    world(2).run(_allocated, str(tmp_path), timeout_s=60)


@quietly
def _pickled_and_embeddings(ranks: Ranks, folder: str) -> None:
    path = Path(folder)
    model = adapted("LORA", ("default", "ref"))
    accelerator = prepared(3, model)
    model.save_pretrained(path / "pickled", safe_serialization=False)
    model.save_pretrained(path / "embedded", save_embedding_layers=True)
    accelerator.free_memory()
    if accelerator.is_main_process:
        model.save_pretrained(path / "stock", safe_serialization=False)
        for name in ("adapter_model.bin", "ref/adapter_model.bin"):
            found, wanted = torch.load(path / "pickled" / name), torch.load(path / "stock" / name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())
        model.save_pretrained(path / "stock embedded", save_embedding_layers=True)
        assert_equal(path / "embedded", path / "stock embedded")
        assert "base_model.model.lm_head.weight" in load_file(path / "embedded" / "adapter_model.safetensors")


def test_pickles_and_embeddings_are_saved_as_peft_would(world, tmp_path):
    world(2).run(_pickled_and_embeddings, str(tmp_path), timeout_s=60)


@quietly
def _quantised(ranks: Ranks, bits: str, folder: str) -> None:
    from ranks.test_quantised import quantisable

    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    path = Path(folder)
    model = quantisable(bits)
    model.add_adapter("ref", model.peft_config["default"])
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".ref." in n or ".default." in n}
    accelerator = prepared(3, model)
    model.save_pretrained(path / "saved")
    accelerator.save_state(path / "state")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        export(path / "state", path / "exported")
        assert_equal(path / "exported", path / "saved")
        for adapter, folder_of in (("default", path / "saved"), ("ref", path / "saved" / "ref")):
            found = load_file(folder_of / "adapter_model.safetensors")
            wanted = {n.replace(f".{adapter}.", "."): v for n, v in before.items() if f".{adapter}." in n}
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
    accelerator.free_memory()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_frozen_adapters_of_a_quantised_base_are_saved(world, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    world(2).run(_quantised, bits, str(tmp_path), timeout_s=60)


@quietly
def _halves(ranks: Ranks, folder: str) -> None:
    """In bf16 trained adapters are saved from their masters, frozen ones as they compute."""
    model = adapted("LORA", ("default", "ref"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    accelerator = fresh(3, mixed_precision="bf16")
    accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for adapter, dtype in (("default", torch.float32), ("ref", torch.bfloat16)):
            path = Path(folder) / ("" if adapter == "default" else adapter) / "adapter_model.safetensors"
            for name, value in load_file(path).items():
                own = name.replace(".weight", f".{adapter}.weight")
                assert torch.equal(value, before[own].to(dtype)), name
    accelerator.free_memory()


def test_trained_adapters_are_saved_from_their_masters_in_bf16(world, tmp_path):
    world(2).run(_halves, str(tmp_path), timeout_s=60)


# Refused.


@quietly
def _empty(ranks: Ranks, folder: str) -> None:
    path = Path(folder)
    mixed = adapted("LORA")
    for n in range(2):
        mixed.save_pretrained(path / "mixed" / str(n)) if ranks.rank == 0 else None
    ranks.barrier()
    model = adapted("XLORA", folder=folder)
    accelerator = prepared(3, model)
    with pytest.raises((CheckpointError, RankError), match="'default' has no tensor that peft would save"):
        model.save_pretrained(path / "saved")
    assert not (path / "saved").exists()
    accelerator.free_memory()
    for name, folder_of in (("/tmp/elsewhere", path / "a"), ("a/b", path / "b")):
        model = adapted("LORA", ("default", name))
        accelerator = prepared(3, model)
        if name == "a/b":
            model.save_pretrained(folder_of)
            assert (folder_of / "a" / "b" / "adapter_model.safetensors").exists() or ranks.rank
        else:
            with pytest.raises((CheckpointError, RankError), match="would be written outside of"):
                model.save_pretrained(folder_of)
        accelerator.free_memory()


def test_empty_files_and_names_that_lead_elsewhere_are_refused_by_every_rank(world, tmp_path):
    world(2).run(_empty, str(tmp_path), timeout_s=60)


# Frozen adapters come back.


@quietly
def _teacher(ranks: Ranks, folder: str, offload: str) -> None:
    """A teacher that is frozen, and written by the script: a mean of the student over the steps."""
    model = adapted("LORA", ("default", "teacher"))
    accelerator = fresh(3, offload)
    accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    accelerator.save_state(f"{folder}/first")
    teacher = [p for name, p in model.named_parameters() if ".teacher." in name]
    with shardwise.gathered(model, teacher, modify=True), torch.no_grad():
        for parameter in teacher:
            parameter.add_(1 + ranks.rank)
    with shardwise.gathered(model, teacher):
        wanted = [parameter.detach().clone() for parameter in teacher]
    accelerator.save_state(f"{folder}/second")
    accelerator.free_memory()

    again = adapted("LORA", ("default", "teacher"))
    accelerator = fresh(3, offload)
    accelerator.prepare(again, torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.1))
    teacher = [p for name, p in again.named_parameters() if ".teacher." in name]
    for state, moved in (("second", 0.0), ("first", -1.0), ("second", 0.0)):
        accelerator.load_state(f"{folder}/{state}")
        with shardwise.gathered(again, teacher):
            for parameter, value in zip(teacher, wanted, strict=True):
                assert torch.allclose(parameter, value + moved, atol=1e-6)
    accelerator.free_memory()


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_frozen_adapter_that_a_script_has_written_comes_back(world, tmp_path, offload):
    world(2).run(_teacher, str(tmp_path), offload, timeout_s=60)
