"""Weights that leave shardwise load in stock transformers and peft, in one process, with the same numbers; and no rank has
held the model on the way."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ranks.test_checkpoint_resume import Case, build, steps
from rig.engine import shard
from rig.tiny import tiny, tiny_llama
from shardwise.checkpoint.from_checkpoint import export
from shardwise.checkpoint.merge import merge
from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.files.writer import Spec, TensorFile
from shardwise.weights.export import save_weights
from shardwise.weights.stream import save_streamed

# transformers and peft call functions of their own that they deprecate.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

IDS = torch.arange(3, 19).reshape(2, 8)


def _inputs(name: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if name == "bart" else {})}


def _save_pretrained(ranks: Any, name: str, folder: str) -> torch.Tensor:
    from shardwise.weights.integrations import connect

    model = tiny(name)  # type: ignore[arg-type]
    sharded = shard(ranks, model, "3")
    connect(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    with sharded.gathered(), torch.no_grad():
        logits = model.eval()(**_inputs(name)).logits
    sharded.release()
    return logits


@pytest.mark.parametrize("name", ["llama", "tied", "bart"])
def test_a_streamed_model_loads_in_transformers_with_equal_logits(world, tmp_path, name):
    from transformers import AutoModelForCausalLM, BartForConditionalGeneration

    logits = world(2).run(_save_pretrained, name, str(tmp_path))[0]
    cls = BartForConditionalGeneration if name == "bart" else AutoModelForCausalLM
    model, found = cls.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model.eval()(**_inputs(name)).logits, logits)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) == len(set(index["weight_map"].values())) > 2
    stored = {key for path in tmp_path.glob("*.safetensors") for key in load_file(path)}
    assert ("lm_head.weight" in stored) == (name == "llama"), "tied weights are written once"


def _large(count: int = 80, width: int = 640) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def _peak(ranks: Any, folder: str) -> tuple[int, int]:
    """(bytes of the model, what the process's resident set rose by while it was exported)."""
    # What a first export loads (code, buffers of the network), and what a first pass over the units leaves in the
    # allocator, as a training step would, is not the export's.
    warm = shard(ranks, _large(4, 64), "3", units=["Linear"])
    save_streamed(warm, f"{folder}/warm")
    warm.release()
    sharded = shard(ranks, _large(), "3", units=["Linear"])
    for _ in sharded.whole.stream(lambda name: True):
        pass

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    save_streamed(sharded, folder)
    rise = _status("VmHWM") - before
    total = sum(p.numel() * p.itemsize for p in sharded.model.parameters())
    sharded.release()
    return total, rise


def test_exporting_takes_less_than_a_quarter_of_the_model(world, tmp_path):
    for total, rise in world(2).run(_peak, str(tmp_path)):
        assert total > 130e6
        assert rise < total / 4, f"{rise / total:.2f} of the model"
    expected = _large().state_dict()
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, expected[name])


def _save_and_load(ranks: Any, folder: str) -> dict[str, int]:
    """Bytes that the resident set rose by in a save and in a load, and those of what was saved."""
    from shardwise import Accelerator, DeepSpeedPlugin
    from shardwise.run.process import forget_run

    forget_run()
    model = _large()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(2, 640)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    rises = {}
    for verb in ("save", "load"):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        accelerator.save_state(folder) if verb == "save" else accelerator.load_state(folder)
        rises[verb] = _status("VmHWM") - before
    rises["total"] = sum(3 * p.numel() * 4 for p in model.parameters()) // ranks.world_size
    accelerator.end_training()
    accelerator.free_memory()
    return rises


def test_saving_and_loading_take_the_largest_tensor_and_little_more(world, tmp_path):
    for rises in world(2).run(_save_and_load, str(tmp_path / "state")):
        assert rises["total"] > 190e6
        assert rises["save"] < 16e6, rises
        assert rises["load"] < 16e6, rises


# From a checkpoint.


def _checkpoint(ranks: Any, case: Case, folder: str) -> None:
    script = build(case, dropout=0.0)
    for _ in steps(script, 3):
        pass
    script.accelerator.save_state(f"{folder}/state")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for the base model's configuration on the hub
        script.model.save_pretrained(f"{folder}/saved")
    script.accelerator.save_model(script.model, f"{folder}/half", dtype=torch.bfloat16)
    script.accelerator.end_training()
    script.accelerator.free_memory()


@pytest.mark.parametrize("tuning", ["full", "lora", "lora+save"])
def test_a_checkpoint_is_exported_as_the_run_itself_would_have_saved_it(world, tmp_path, tuning):
    world(2).run(_checkpoint, Case(3, "cpu", tuning), str(tmp_path))
    export(tmp_path / "state", tmp_path / "exported")
    name = "model.safetensors" if tuning == "full" else "adapter_model.safetensors"
    expected, found = load_file(tmp_path / "saved" / name), load_file(tmp_path / "exported" / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}

    model = tiny_llama()
    if tuning == "full":
        again = type(model).from_pretrained(tmp_path / "exported", attn_implementation="eager")
        model.load_state_dict(expected)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, tmp_path / "saved")
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, again.eval()(IDS).logits)


# Merging.


def _adapted(kind: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(31)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6}
    if kind == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        settings.update(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    else:
        base = tiny_llama(tied=kind == "tied head")
    if kind == "rslora":
        settings.update(use_rslora=True)
    elif kind == "patterns":
        settings.update(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 11})
    elif kind == "dora":
        settings.update(use_dora=True)
    elif kind == "embedding":
        settings.update(target_modules=["embed_tokens", "q_proj"])
    elif kind in ("saved", "tied head"):
        settings.update(modules_to_save=["lm_head"])
    elif kind == "bf16":
        base = base.bfloat16()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.numel(), name
    return model


@pytest.mark.parametrize(
    "kind", ["plain", "rslora", "patterns", "dora", "embedding", "saved", "tied head", "gpt2", "bf16"]
)
def test_a_merged_model_equals_pefts_to_the_last_bit(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _adapted(kind)
        base = tmp_path / "base"
        unadapted = _adapted(kind).unload()  # the base as it was
        if kind in ("saved", "tied head"):
            unadapted = tiny_llama(tied=kind == "tied head")
            torch.manual_seed(31)
        unadapted.save_pretrained(base, max_shard_size="30KB")
        model.save_pretrained(tmp_path / "adapter")
        expected = model.merge_and_unload()
    merge(base, tmp_path / "adapter", tmp_path / "merged", max_shard_size="30KB")
    again = type(expected).from_pretrained(tmp_path / "merged", dtype=expected.dtype)
    wanted = expected.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_a_model_merged_into_a_wider_dtype_is_not_rounded_to_the_bases(tmp_path):
    weight, low_a, low_b = torch.randn(6, 4).bfloat16(), torch.randn(2, 4), torch.randn(6, 2)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    adapter.mkdir()
    base.mkdir()
    save_weights({"a.weight": weight}, base)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    parts = {"base_model.model.a.lora_A.weight": low_a, "base_model.model.a.lora_B.weight": low_b}
    save_file(parts, adapter / "adapter_model.safetensors")
    merge(base, adapter, tmp_path / "merged", dtype=torch.float32)
    merged = load_file(tmp_path / "merged" / "model.safetensors")["a.weight"]
    assert torch.equal(merged, weight.float() + low_b @ low_a)


def test_what_cannot_be_merged_is_refused(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(CheckpointError, match="not an adapter of PEFT"):
        merge(base, adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="type LOHA"):
        merge(base, adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
    base.mkdir()
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        merge(base, adapter, tmp_path / "out")
    save_weights({"a.weight": torch.ones(4, 3)}, base)
    with pytest.raises(CheckpointError, match="incomplete"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_elements_is_never_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"layer\.lora_A has no elements"):
        TensorFile(tmp_path / "a.safetensors", [Spec("layer.lora_A", torch.float32, (0,))])
    for safe in (True, False):
        with pytest.raises(CheckpointError, match="has no elements"):
            save_weights({"a": torch.ones(3), "b": torch.empty(0)}, tmp_path, safe_serialization=safe)
    assert not list(tmp_path.iterdir())


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from shardwise.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_the_commands_say_what_they_wrote_and_what_is_wrong(world, tmp_path):
    world(1).run(_checkpoint, Case(0, "none", "lora", world=1), str(tmp_path))
    done = _command("export", str(tmp_path / "state"), str(tmp_path / "exported"))
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
    tiny_llama().save_pretrained(tmp_path / "base")
    done = _command("merge", str(tmp_path / "base"), str(tmp_path / "exported"), str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "config.json").exists()
    done = _command("export", str(tmp_path), str(tmp_path / "other"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "not a checkpoint" in done.stderr
    assert issubclass(CheckpointError, ShardwiseError)
