"""`shardwise export` of adapters: by what peft said when the checkpoint was saved, and never outside of the directory."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks.test_save_idioms import prepared, quietly
from rig.adapters import Normed, adapted, stir
from shardwise.checkpoint.from_checkpoint import export
from shardwise.errors import CheckpointError
from shardwise.ranks.ranks import Ranks

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def _forge(folder: Path, change: Any) -> None:
    """Change the manifest of a checkpoint, with a sum that fits."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    del content["checksum"]
    content["checksum"] = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    path.write_text(json.dumps(content))


@quietly
def _state(ranks: Ranks, folder: str) -> None:
    model = adapted("LORA", ("default", "ref"))
    accelerator = prepared(3, model)
    accelerator.save_state(f"{folder}/state")
    model.save_pretrained(f"{folder}/saved")
    accelerator.free_memory()


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory) -> Path:
    """state: a checkpoint of an adapter and a frozen one. saved: what the run itself saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    world(2).run(_state, str(folder), timeout_s=60)
    return folder


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a/../../x", "a\0b", ""])
def test_an_exported_adapter_never_leaves_the_directory(checkpoint, tmp_path, name):
    state = Path(shutil.copytree(checkpoint / "state", tmp_path / "state"))

    def rename(content: dict[str, Any]) -> None:
        for facts in (content["facts"]["model0"]["peft"], content["facts"]["model0"]["adapters"]):
            facts[name] = facts.pop("ref")

    _forge(state, rename)
    with pytest.raises(CheckpointError, match="would be written outside of"):
        export(state, tmp_path / "out" / "put")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x").exists()


def _adapters(content: dict[str, Any]) -> dict[str, Any]:
    return content["facts"]["model0"]["adapters"]


FORGED: dict[str, tuple[Any, str]] = {
    "missing": (lambda c: _adapters(c)["ref"]["weights"].update(more="not there"), "holds 8 of the 9 tensors"),
    "error": (lambda c: _adapters(c).update(ref={"error": "a reason."}), "peft could not save .* a reason"),
    "no record": (lambda c: _adapters(c).update(ref=[1]), "does not say what the adapter 'ref' consists of"),
    "no names": (lambda c: _adapters(c)["ref"].update(weights={"a": 3}), "does not say what the adapter 'ref'"),
    "no list": (lambda c: _adapters(c)["ref"].update(computed={}), "does not say what the adapter 'ref'"),
}


@pytest.mark.parametrize(("change", "words"), FORGED.values(), ids=list(FORGED))
def test_what_a_manifest_says_of_an_adapter_is_held_against_the_checkpoint(checkpoint, tmp_path, change, words):
    state = Path(shutil.copytree(checkpoint / "state", tmp_path / "state"))
    _forge(state, change)
    with pytest.raises(CheckpointError, match=words):
        export(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_before_is_exported_by_names_as_before(checkpoint, tmp_path):
    state = Path(shutil.copytree(checkpoint / "state", tmp_path / "state"))

    def age(content: dict[str, Any]) -> None:
        del content["facts"]["model0"]["adapters"]
        del content["facts"]["model0"]["peft"]["ref"]

    _forge(state, age)
    export(state, tmp_path / "out")
    wanted = load_file(checkpoint / "saved" / "adapter_model.safetensors")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@quietly
def _injected(ranks: Ranks, folder: str) -> None:
    """Adapters in a module that is no model of peft, as diffusers has them."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), Normed())
    stir(model)
    accelerator = prepared(3, model)
    accelerator.save_state(f"{folder}/state")
    accelerator.free_memory()
    if accelerator.is_main_process:
        export(f"{folder}/state", f"{folder}/out")
        found, wanted = load_file(f"{folder}/out/adapter_model.safetensors"), get_peft_model_state_dict(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_adapters_that_were_injected_are_exported_by_pefts_names(world, tmp_path):
    world(2).run(_injected, str(tmp_path), timeout_s=60)
