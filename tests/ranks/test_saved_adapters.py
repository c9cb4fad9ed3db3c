"""What leaves a sharded run of peft equals what stock peft saves of the same model, in names and values, and loads there.

For every method of the peft that is installed; adapters trained, frozen, inactive, several; in each idiom that the libraries
document. The model is the witness for itself: it is saved while it is sharded, given back whole, and saved again by peft.
"""

from __future__ import annotations

import gc
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks.test_front_training import fresh
from rig.adapters import SETTINGS, adapted, tiny_base

# Why a method of peft has no case of its own.
LEFT_OUT = {
    "ADAMSS": "needs scikit-learn to be built",
    "XLORA": "stock peft 0.21 saves an empty file: it takes the .0. in layers' names for its adapter 0; refused, see below",
}
METHODS = [name for name in SETTINGS if name not in LEFT_OUT]
ONE_ADAPTER = {"LORA:bias", "ADALORA"}
NEEDS_TASK = {"POLY", "MULTITASK_PROMPT_TUNING"}


@dataclass(frozen=True)
class Case:
    """adapters: their names, the first one active. trained: an optimizer steps it once; else all is frozen, as for inference.

    switched: the last adapter is made the active one before the saves.
    """

    method: str
    adapters: tuple[str, ...]
    trained: bool = True
    switched: bool = False


def cases_of(method: str) -> list[Case]:
    if method in ONE_ADAPTER:
        return [Case(method, ("default",)), Case(method, ("mine",), trained=False)]
    # This one takes modules out of the model when it switches: a state dict that is given has nothing of them any more.
    switched = method != "ADAPTION_PROMPT"
    return [Case(method, ("default", "other")), Case(method, ("mine", "default"), trained=False, switched=switched)]


def _tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def _configs(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.rglob("adapter_config.json"))}


def _assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], words: object) -> None:
    assert found.keys() == wanted.keys(), (words, sorted(found.keys() ^ wanted.keys())[:4])
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, (words, name)
        assert torch.equal(found[name], value), (words, name)


def _train(accelerator: Any, model: Any, case: Case) -> None:
    if not case.trained:
        accelerator.prepare(model.requires_grad_(False))
        return
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator.prepare(model, optimizer)
    ids = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(accelerator.process_index))
    task = {"task_ids": torch.zeros(2, dtype=torch.long)} if case.method in NEEDS_TASK else {}
    # AdaLoRA's loss reads its weights outside of their modules' forwards, which is for `units` or `gathered`.
    labels = {} if case.method == "ADALORA" else {"labels": ids}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **labels, **task)
    accelerator.backward(output.loss if labels else output.logits.square().mean())
    optimizer.step()
    optimizer.zero_grad()


def save(case: Case, stage: int, folder: Path) -> None:
    """In every idiom below `folder`, and by stock peft once the model is whole again."""
    from shardwise.checkpoint.from_checkpoint import export

    model = adapted(case.method, case.adapters, str(folder))
    accelerator = fresh(stage)
    _train(accelerator, model, case)
    if case.switched:
        model.set_adapter(case.adapters[-1])
    model.save_pretrained(folder / "plain")
    state = accelerator.get_state_dict(model)
    main = accelerator.is_main_process
    model.save_pretrained(folder / "given", is_main_process=main, save_function=accelerator.save, state_dict=state)
    model.save_pretrained(folder / "none", is_main_process=main, state_dict=state or None)
    model.save_pretrained(folder / "one", selected_adapters=[case.adapters[-1]], is_main_process=main)
    accelerator.save_model(model, folder / "whole")
    accelerator.save_state(folder / "state")
    accelerator.free_memory()
    if not main:
        return
    export(folder / "state", folder / "exported")
    whole = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder / "stock")  # CPT's changes its weights
    wanted, configs = _tensors(folder / "stock"), _configs(folder / "stock")
    assert len(wanted) == len(case.adapters)
    for idiom in ("plain", "given", "none", "one", "exported"):
        found = _tensors(folder / idiom)
        last = str(Path("" if case.adapters[-1] == "default" else case.adapters[-1]) / "adapter_model.safetensors")
        expected = {last: wanted[last]} if idiom == "one" else wanted
        assert found.keys() == expected.keys(), (case, stage, idiom)
        for name, tensors in expected.items():
            assert tensors
            _assert_same(found[name], tensors, (case, stage, idiom, name))
        assert all(config == configs[name] for name, config in _configs(folder / idiom).items()), (case, idiom)
    _assert_same(state, whole, (case, stage, "get_state_dict"))
    _check_whole(folder / "whole" / "model.safetensors", whole, case)
    _check_loads(case, folder)


def _check_whole(path: Path, whole: dict[str, torch.Tensor], case: Case) -> None:
    """save_model's file has every name, or the metadata says which of its names it goes by."""
    from safetensors import safe_open

    found = load_file(path)
    with safe_open(path, "pt") as file:
        found |= {name: found[first] for name, first in (file.metadata() or {}).items() if first in found}
    _assert_same(found, {name: value for name, value in whole.items() if value.numel()}, (case, "save_model"))


def _check_loads(case: Case, folder: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    first, *others = [folder / "plain" / ("" if name == "default" else name) for name in case.adapters]
    again = PeftModel.from_pretrained(tiny_base(), first, adapter_name=case.adapters[0])
    for name, path in zip(case.adapters[1:], others, strict=True):
        again.load_adapter(path, adapter_name=name)
    for name, path in zip(case.adapters, [first, *others], strict=True):
        wanted = load_file(path / "adapter_model.safetensors")
        found = get_peft_model_state_dict(again, adapter_name=name)
        assert found.keys() == wanted.keys(), case
        for key, value in wanted.items():  # some are computed from what was loaded
            assert torch.allclose(found[key], value, atol=1e-6), (case, key)


def _save_all(ranks: Any, stage: int, chosen: list[Case], folder: str) -> None:
    from peft import PeftModel

    gc.collect()
    gc.freeze()  # free_memory collects garbage: 0.6 s each time, among what the libraries' imports have made
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("ignore")  # peft's own, about its own
        patched.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)  # a template: 40 ms
        for number, case in enumerate(chosen):
            try:
                save(case, stage, Path(folder) / str(number))
            except Exception as error:
                error.add_note(f"{case}, stage {stage}")
                raise
    gc.unfreeze()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("stage", "n", "number"), [(3, 2, 0), (0, 1, 0), (3, 1, 1), (0, 2, 1)], ids=["3-2", "0-1", "3-1", "0-2"]
)
def test_every_method_of_peft_is_saved_as_stock_peft_saves_it(world, tmp_path, stage, n, number):
    world(n).run(_save_all, stage, [cases_of(method)[number] for method in METHODS], str(tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_method_of_peft_is_saved_as_stock_peft_saves_it_at_every_stage(world, tmp_path, stage, n):
    world(n).run(_save_all, stage, [case for m in METHODS for case in cases_of(m)], str(tmp_path), timeout_s=600)


def test_every_method_of_peft_has_a_case():
    from peft import PeftType

    assert {kind.name for kind in PeftType} == {name.split(":")[0] for name in METHODS} | set(LEFT_OUT)
