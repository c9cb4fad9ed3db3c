"""The formula of activations against the tensors that autograd really keeps for a small Llama."""

from __future__ import annotations

import pytest
import torch

from shardwise.estimate.activations import (
    Batch,
    DecoderShape,
    block_nbytes,
    decoder_shape,
    kept_nbytes,
    loss_nbytes,
    peak_nbytes,
)


def llama(layers, attention, dtype, adapters):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=232,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype).train()
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
    return model


def saved_nbytes(model, rows, length):
    """Bytes of the storages that autograd saves in a forward, without those of the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT calling transformers by an old name
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_keeps_what_the_formula_says(attention, dtype, adapters):
    rows, length = 2, 40
    models = [llama(layers, attention, dtype, adapters) for layers in (2, 4)]
    small, large = (saved_nbytes(model, rows, length) for model in models)
    shape = decoder_shape(models[0])
    assert shape is not None
    expected = block_nbytes(shape, Batch(rows, length, attention=attention), dtype.itemsize)
    assert (large - small) / 2 == pytest.approx(expected, rel=0.01)


def test_checkpointing_keeps_the_inputs_and_one_block():
    shape = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
    plain, lean = Batch(2, 2048), Batch(2, 2048, checkpointing=True)
    assert kept_nbytes(shape, lean, 2) == 32 * 4096 * 4096 * 2
    assert kept_nbytes(shape, plain, 2) == 32 * block_nbytes(shape, plain, 2)
    assert peak_nbytes(shape, lean, 2) < peak_nbytes(shape, plain, 2) / 3


def test_a_loss_in_chunks_takes_one_chunk_of_logits():
    shape = DecoderShape(2, 64, 128, 4, 4, 16, 1000)
    assert loss_nbytes(shape, Batch(4, 256), 2) == 1024 * 1000 * 12
    assert loss_nbytes(shape, Batch(4, 256, loss_chunk=128), 2) == 128 * 1000 * 12 + 1024 * 64 * 2


def test_other_models_have_no_formula():
    assert decoder_shape(torch.nn.Linear(2, 2)) is None
