"""`offload_param_source: model_files`: frozen weights on a drive are read where they lie, in the files of the model."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rig.heard import heard
from rig.tiny import batches, share, tiny_llama, with_lora
from shardwise import Accelerator, gathered
from shardwise.building import initialising
from shardwise.errors import LoadingError, RankError, StoreError
from shardwise.offload.borrowed import BorrowedSlab
from shardwise.run.process import forget_run

USE_CPU = True  # tests/gpu runs the same on devices


def saved(folder: Path, **options: Any) -> Path:
    """A small Llama in several files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_llama().to(options.pop("dtype", torch.float32)).save_pretrained(folder, max_shard_size="60kB")
    return folder


class Run:
    """A LoRA fine-tune of the model in `folder`/model, with its base on a drive."""

    def __init__(self, folder: str, source: str, change: Any = None, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        forget_run()
        initialising.SMALL_NUMEL = 64
        os.environ["SHARDWISE_CONFIG"] = json.dumps(
            {
                "distributed_type": "DEEPSPEED",
                "use_cpu": USE_CPU,
                "deepspeed_config": {
                    "zero_stage": 3,
                    "offload_param_device": "nvme",
                    "offload_param_nvme_path": f"{folder}/drive",
                },
                "shardwise_config": {"offload_param_source": source, "whole_adapters": True},
            }
        )
        try:
            self.accelerator = Accelerator(cpu=USE_CPU)
        finally:
            del os.environ["SHARDWISE_CONFIG"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self.accelerator.init():
                model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_implementation="eager", **options)
                model.config.use_cache = False
                if change is not None:
                    change(model)
                self.model = with_lora(model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.accelerator.prepare(self.model, self.optimizer)
        (prepared,) = self.accelerator._run.models
        self.sharded = prepared.sharded

    def train(self, steps: int = 3) -> list[float]:
        losses = []
        for batch in batches("llama", steps, 12):
            mine = share(batch, self.accelerator.process_index, self.accelerator.num_processes)
            loss = self.model(**{name: value.to(self.accelerator.device) for name, value in mine.items()}).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(self.accelerator.reduce(loss.detach(), "mean").item())
        return losses

    @property
    def borrowed(self) -> list[bool]:
        """Of each unit of frozen weights, whether it is read in the model's files."""
        found = [unit.frozen.slab for unit in self.sharded.units if unit.frozen is not None]
        return [isinstance(slab, BorrowedSlab) and slab.is_borrowed for slab in found]

    @property
    def drive_nbytes(self) -> int:
        """Bytes that are written on the drive."""
        return sum(store.nbytes for store in self.sharded.engine.stores.drives)

    def weights(self) -> dict[str, torch.Tensor]:
        with gathered(self.model):
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def close(self) -> None:
        self.accelerator.free_memory()
        forget_run()


def both(ranks: Any, folder: str, options: dict[str, Any]) -> tuple[list[bool], int, int]:
    """The same run with and without a copy: (what is borrowed, bytes on the drive without a copy, with one)"""
    runs = []
    for source in ("copy", "model_files"):
        run = Run(folder, source, **options)
        runs.append((run.weights(), run.train(), run.weights(), run.borrowed, run.drive_nbytes))
        run.close()
    one, other = runs
    for before, after in ((one[0], other[0]), (one[2], other[2])):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert one[1] == other[1]
    return other[3], other[4], one[4]


def double_norms(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(2)


@pytest.mark.parametrize("change", [None, double_norms], ids=["as_they_are", "norms_changed"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_has_the_numbers_of_one_with_a_copy(world, tmp_path, ranks, change):
    """The little that no file has stays in host memory."""
    saved(tmp_path / "model")
    for borrowed, own, copied in world(ranks).run(both, str(tmp_path), {"change": change}):
        assert len(borrowed) > 1
        assert all(borrowed)
        assert own == 0
        assert copied > 0


def test_what_computes_in_another_dtype_is_copied(world, tmp_path):
    saved(tmp_path / "model")
    for borrowed, own, copied in world(2).run(both, str(tmp_path), {"dtype": torch.bfloat16}):
        assert not any(borrowed)
        assert own == copied


@pytest.mark.parametrize("bits", [4, 8])
def test_a_little_that_is_quantised_computes_as_with_a_copy(world, tmp_path, bits):
    """Its codes are in no file; the layer must compute with those in the buffer."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    others = ["lm_head", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=others,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    saved(tmp_path / "model")
    for borrowed, _, _ in world(2).run(both, str(tmp_path), {"quantization_config": config, "dtype": torch.float32}):
        assert all(borrowed)


def _changed(ranks: Any, folder: str) -> list[str]:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(0.5)

    with heard() as said:
        run = Run(folder, "model_files", change)
        assert sorted(run.borrowed) == [False, *[True] * (len(run.borrowed) - 1)]
        run.train()
        run.close()
        both(ranks, folder, {"change": change})
    return [text for text in said if "offload_param_source" in text]


def test_a_weight_that_a_script_has_changed_is_copied_and_named(world, tmp_path):
    saved(tmp_path / "model")
    first, second = world(2).run(_changed, str(tmp_path))
    assert "1 were copied to the drive, the first for" in first[0]
    assert "layers.1.mlp.up_proj" in first[0]
    assert second == []


def _written(ranks: Any, folder: str) -> None:
    run = Run(folder, "model_files")
    before = run.weights()
    name = next(name for name in before if "layers.0.mlp.up_proj" in name and "lora" not in name)
    weight = dict(run.model.named_parameters())[name]
    with gathered(weight, modify=True), torch.no_grad():
        weight[3] = 7.0
    before[name][3] = 7.0
    after = run.weights()
    assert all(torch.equal(after[other], value) for other, value in before.items())
    assert run.borrowed.count(False) == 1
    run.accelerator.save_state(f"{folder}/state", include_frozen=True)
    losses = run.train()
    run.accelerator.load_state(f"{folder}/state")
    assert run.train() == losses
    again = run.weights()
    assert all(torch.equal(again[n], after[n]) for n in after if "lora" not in n)
    run.close()


def test_what_a_script_writes_is_kept_and_the_files_stay(world, tmp_path):
    folder = saved(tmp_path / "model")
    files = {path: path.read_bytes() for path in folder.iterdir()}
    world(2).run(_written, str(tmp_path))
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def _overwritten(ranks: Any, folder: str) -> None:
    run = Run(folder, "model_files")
    run.train(1)
    ranks.barrier()
    if ranks.rank == 0:
        for path in Path(folder, "model").glob("*.safetensors"):
            with path.open("r+b") as file:
                file.write(file.read(8))
            os.utime(path, ns=(1, 1))
    ranks.barrier()
    run.train(1)


def test_files_that_are_written_meanwhile_are_an_error_on_every_rank(world, tmp_path):
    saved(tmp_path / "model")
    with pytest.raises(StoreError) as caught:
        world(2).run(_overwritten, str(tmp_path))
    words = str(caught.value)
    assert "it has been written since the run has begun" in words
    assert "set offload_param_source: copy" in words
    assert str(tmp_path / "model") in words


def _second_model(ranks: Any, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    def replaced(seed: int) -> None:
        """By a rename, as a download and most savers do it."""
        ranks.barrier()
        if ranks.rank == 0:
            for path in Path(folder, f"model{seed}").glob("*.safetensors"):
                shutil.copy(path, f"{folder}/new")
                os.replace(f"{folder}/new", f"{folder}/model/{path.name}")
        ranks.barrier()

    run = Run(folder, "model_files")
    before = run.weights()
    replaced(1)
    with run.accelerator.init():
        second = AutoModelForCausalLM.from_pretrained(f"{folder}/model", attn_implementation="eager")
    run.accelerator.prepare(second.eval().requires_grad_(False))
    expected = tiny_llama(seed=1).state_dict()
    with gathered(second):
        assert all(torch.equal(value, expected[name]) for name, value in second.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    run.close()


def test_a_second_model_from_a_path_with_another_file_by_now_has_its_own_weights(world, tmp_path):
    saved(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_llama(seed=1).save_pretrained(tmp_path / "model1", max_shard_size="60kB")
    world(2).run(_second_model, str(tmp_path))


def _gone(ranks: Any, folder: str) -> None:
    def change(model: Any) -> None:
        ranks.barrier()
        if ranks.rank == 0:
            shutil.rmtree(Path(folder, "model"))
        ranks.barrier()

    Run(folder, "model_files", change)


def test_files_that_are_gone_before_prepare_are_a_sentence(world, tmp_path):
    saved(tmp_path / "model")
    with pytest.raises(LoadingError, match=r"safetensors: there is no such file"):
        world(2).run(_gone, str(tmp_path))


def _stale_on_one(ranks: Any, folder: str) -> None:
    shutil.copytree(f"{folder}/model", f"{folder}/{ranks.rank}/model")
    run = Run(f"{folder}/{ranks.rank}", "model_files")
    if ranks.rank == 1:
        for path in Path(folder, "1/model").glob("*.safetensors"):
            os.utime(path, ns=(1, 1))
    with pytest.raises((StoreError, RankError), match="rank 1 could not read"):
        run.accelerator.save_state(f"{folder}/state")
    assert run.accelerator.reduce(torch.ones(())).item() == 2
    run.close()


def test_a_save_that_cannot_sum_up_the_base_on_one_rank_is_an_error_on_every_rank(world, tmp_path):
    saved(tmp_path / "model")
    world(2).run(_stale_on_one, str(tmp_path))
