"""A frozen base in 8 and 4 bits: codes and scales are sharded as the library wrote them, and trained on as in one process."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from rig.engine import prepare, trained
from rig.tiny import batches, share, step_alone, tiny, with_lora
from shardwise.errors import PrepareError, RankError, ReleasedParameterError

pytestmark = pytest.mark.thinned(3)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes")

PLANS = ("2", "3", "3-all", "3-disk")
BITS = ("8", "4", "4 plain")  # plain: scales in fp32, not quantised themselves


def quantisable(bits: str, name: str = "llama"):
    """A tiny model whose blocks have layers of the library, not quantised yet, with LoRA on q and v."""
    import bitsandbytes as library

    model = tiny(name)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in path:
            bias = module.bias is not None
            if bits == "8":
                layer = library.nn.Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False)
                layer.weight = library.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                layer = library.nn.Linear4bit(
                    module.in_features, module.out_features, bias, torch.float32, bits == "4", "nf4"
                )
                layer.weight = library.nn.Params4bit(
                    module.weight.data,
                    requires_grad=False,
                    compress_statistics=bits == "4",
                    quant_type="nf4",
                    module=layer,
                )
            layer.bias = module.bias
            model.set_submodule(path, layer)
    setattr(model, "is_loaded_in_8bit" if bits == "8" else "is_loaded_in_4bit", True)
    return with_lora(model)


def quantised_weights(model):
    """Codes and scales by name, cloned."""
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            found[name] = weight.data.clone()
            if type(weight).__name__ == "Params4bit":
                state = weight.quant_state
                found[f"{name}.absmax"] = state.absmax.clone()
                if state.state2 is not None:
                    found[f"{name}.nested"] = state.state2.absmax.clone()
                    found[f"{name}.offset"] = state.offset.clone()
            else:
                rows = weight.SCB if weight.SCB is not None else module.state.SCB
                found[f"{name}.SCB"] = rows.clone()
    return found


def _train(ranks, bits, plan, before, precision="no"):
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    reference = quantisable(bits).to("cpu")
    expected = quantised_weights(reference)
    plain = torch.optim.AdamW(trained(reference), lr=3e-3, eps=1e-4)
    model = quantisable(bits)
    if before:
        model.to("cpu")
    sharded, _, stepping = prepare(ranks, model, plan, precision=precision)
    largest = 0.0
    for batch in batches("llama", 3, 12):
        losses = step_alone(reference, plain, batch, ranks.world_size)
        loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        largest = max(largest, abs(loss.item() - losses[ranks.rank]))
    with sharded.gathered():
        found = quantised_weights(model)
        adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    largest_adapter = max(
        (adapters[n] - p).abs().max().item() for n, p in reference.named_parameters() if n in adapters
    )
    return largest, largest_adapter, differing, len(expected)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_is_kept_to_the_bit_and_trains_as_in_one_process(world, bits, plan, n, before):
    for loss, adapter, differing, count in world(n).run(_train, bits, plan, before):
        assert count > 20
        assert not differing
        assert loss <= 1e-5
        assert adapter <= 1e-5


def _bytes(ranks, bits):
    model = quantisable(bits)
    sharded, _, _ = prepare(ranks, model, "3")
    ledger = sharded.ledger()["frozen", "gpu"]
    members = [m.name for u in sharded.units if u.frozen for m in u.frozen.members]
    layouts = sum(u.frozen.layout.shard_numel for u in sharded.units if u.frozen)
    return ledger, layouts, sharded._quantised.whole_nbytes, members


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_rest_in_shards_and_small_tables_whole(world, bits):
    for ledger, layouts, whole, members in world(2).run(_bytes, bits):
        assert ledger == layouts + whole
        assert any(name.endswith(".SCB" if bits == "8" else ".absmax") for name in members)
        # 21 layers, each with a table of 16 fp32, one of 256 and an offset: nothing where rows have their scales.
        per_layer = {"8": 0, "4": 16 * 4 + 256 * 4 + 4, "4 plain": 16 * 4}[bits]
        assert whole == 21 * per_layer


def _released(ranks):
    model = quantisable("4")
    sharded, _, _ = prepare(ranks, model, "3")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(ReleasedParameterError, match="up_proj"):
        layer.weight + 1
    with pytest.raises(ReleasedParameterError, match="absmax"):
        layer.weight.quant_state.absmax + 1
    assert type(layer.weight).__name__ == "ReleasedParams4bit"
    sharded.release()
    assert type(layer.weight) is bitsandbytes.nn.Params4bit
    expected = quantised_weights(quantisable("4").to("cpu"))
    found = quantised_weights(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_released_codes_and_scales_refuse_to_be_read(world):
    world(2).run(_released)


def _fails_on_one_rank(ranks):
    import bitsandbytes as library

    model, original = quantisable("4"), library.functional.quantize_4bit
    if ranks.rank == 1:
        library.functional.quantize_4bit = _missing
    try:
        with pytest.raises((PrepareError, RankError)) as caught:
            prepare(ranks, model, "3")
    finally:
        library.functional.quantize_4bit = original
    return type(caught.value).__name__, str(caught.value)


def _missing(*args, **kwargs):
    raise NotImplementedError("no such kernel")


def test_a_device_without_the_operation_is_one_clear_error_on_every_rank(world):
    (other, told), (own, text) = world(2).run(_fails_on_one_rank, timeout_s=20)
    assert (other, own) == ("RankError", "PrepareError")
    assert "q_proj" in text
    assert "no such kernel" in text
    assert text in told


def _saved(ranks, folder):
    from shardwise.weights.integrations import connect

    model = quantisable("4")
    sharded, _, _ = prepare(ranks, model, "3")
    connect(model)
    with pytest.raises(PrepareError, match="save_state"):
        sharded.state_dict()
    with pytest.raises(PrepareError, match="adapter"):
        model.base_model.model.save_pretrained(folder / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    ranks.barrier()
    return (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_the_adapter_is_saved_and_the_base_refused(world, tmp_path):
    assert all(world(2).run(_saved, tmp_path))


def _state(ranks, folder, include_frozen, save):
    """Train two steps and save, or load; then one more step: its loss, and the codes."""
    from shardwise import Accelerator, DeepSpeedPlugin
    from shardwise.run.process import forget_run
    from shardwise.zero.sharded import find_sharded

    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3, offload_param_device="cpu"))
    model = quantisable("4")
    optimizer = torch.optim.AdamW(trained(model), lr=3e-3, eps=1e-4)
    accelerator.prepare(model, optimizer)
    *first, last = batches("llama", 3, 12)
    for batch in first if save else ():
        accelerator.backward(model(**share(batch, ranks.rank, ranks.world_size)).loss)
        optimizer.step()
        optimizer.zero_grad()
    if save:
        accelerator.save_state(str(folder / "state"), include_frozen=include_frozen)
    else:
        accelerator.load_state(str(folder / "state"))
    loss = accelerator.reduce(model(**share(last, ranks.rank, ranks.world_size)).loss.detach(), "mean").item()
    sharded = find_sharded(model)
    with sharded.gathered():
        codes = quantised_weights(model)
    forget_run()
    return loss, codes


@pytest.mark.parametrize("include_frozen", [False, True])
def test_a_saved_run_goes_on_over_the_same_codes_on_other_ranks(world, tmp_path, include_frozen):
    loss, codes = world(2).run(_state, tmp_path, include_frozen, True)[0]
    again, found = world(3).run(_state, tmp_path, include_frozen, False)[0]
    assert abs(again - loss) <= 1e-5
    assert all(torch.equal(found[name], value) for name, value in codes.items())


def _estimated(ranks, folder, bits):
    from transformers import LlamaConfig

    from shardwise.estimate.meta_model import Adapters, build_meta_model
    from shardwise.plan.blueprint import at_rest, divide
    from shardwise.plan.plan import Plan
    from shardwise.plan.precision import Precision
    from shardwise.plan.units import find_units

    model = quantisable(bits)
    sharded, _, _ = prepare(ranks, model, "3", precision="bf16")
    config = model.base_model.model.config
    folder = folder / str(ranks.rank)  # of its own: a rank must not read what another one is writing
    LlamaConfig(**{**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters = Adapters(8, ("q_proj", "v_proj"))
        meta = build_meta_model(str(folder), dtype="bf16", adapters=adapters, quantize=f"{bits}bit")
    plan = Plan.from_stage(3, offload_optimizer="none", offload_param="none")
    blueprints = divide(find_units(meta), plan, Precision.named("bf16"), bucket_nbytes=1 << 20)
    whole = sharded._quantised.whole_nbytes
    return sharded.ledger()["frozen", "gpu"] - whole, at_rest(blueprints, ranks.world_size)["frozen", "gpu"]


@pytest.mark.parametrize("bits", ["8", "4"])
def test_the_estimate_tells_the_sharded_bytes(world, tmp_path, bits):
    for real, estimated in world(2).run(_estimated, tmp_path, bits):
        assert abs(estimated - real) <= 0.01 * real


def _built_in_shards(ranks, folder, bits):
    """From full-precision files, with transformers' own configuration of the library."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from shardwise.building import initialising
    from shardwise.building.deferred_tensors import sources_of
    from shardwise.building.loading import building

    initialising.SMALL_NUMEL = 1
    config = BitsAndBytesConfig(
        load_in_8bit=bits == "8",
        load_in_4bit=bits != "8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=bits == "4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        with building():
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        expected = quantised_weights(plain)
        layer = model.model.layers[0].mlp.up_proj.weight
        assert layer.is_meta
        plain = with_lora(prepare_model_for_kbit_training(plain, use_gradient_checkpointing=False))
        model = with_lora(model)
    sharded, _, _ = prepare(ranks, model, "3", sources=sources_of(model))
    with sharded.gathered():
        found = quantised_weights(model)
    found = {name.removeprefix("base_model.model.").replace(".base_layer", ""): v for name, v in found.items()}
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    plain.train()
    model.train()  # in eval the library packs 4-bit weights anew on some CPUs, and fails with these sizes
    batch = batches("llama", 1, 4)[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_checkpoint_is_quantised_unit_by_unit_while_it_is_loaded(world, tmp_path, n, bits):
    pytest.importorskip("accelerate", reason="transformers asks for it where bitsandbytes is used")
    tiny("llama").save_pretrained(tmp_path)
    world(n).run(_built_in_shards, str(tmp_path), bits)
