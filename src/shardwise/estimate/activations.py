"""What a training step of a decoder transformer keeps for its backward, in bytes, from shapes alone. An estimate.

Per token of one block, with h the hidden size, f the width of the MLP, a heads of size d, k key-value heads, e bytes per
element of the compute dtype, r the ranks of all adapters in the block together, n tokens of a sequence:

    8 h                  fp32 copies of both norms' inputs and 8 for their statistics; none for a LayerNorm
    e (4 h)              the norms' results, once before and once after their weight; 2 h where that weight is frozen
    e (2 a d + 2 k d)    queries, keys, values and the attention's result
    e (4 f)              a gated MLP: gate, its activation, up, and their product; 2 f for one without a gate
    e r                  what the adapters' A matrices give
    4 a                  the attention's log-sums; with attention "eager" (4 + e) a n for the weights (4 a n in fp32)
                         and e 2 (a - k) d for repeated keys and values

With checkpointing a block keeps only its input, e h, and one block at a time has all of the above. The loss is the peak at
the end of the forward: per token and word of the vocabulary, the logits, their logarithms in fp32, the gradient in fp32
and in the compute dtype: 8 + 2 e bytes (12 in fp32). A loss in chunks has that for one chunk, beside one hidden state a token.

The terms were read off the tensors that autograd saves for a small Llama (torch 2.13, transformers 5.23); a test holds the
sum against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Batch:
    """What one rank computes at a time.

    checkpointing: every block is recomputed in the backward. attention: "sdpa" (no n x n matrix is kept) or "eager".
    loss_chunk:    tokens per chunk of the loss; None for torch's own, which takes all at once.
    keeps_logits:  the chunks are of logits that are there as a whole.
    """

    rows: int
    length: int
    checkpointing: bool = False
    attention: str = "sdpa"
    loss_chunk: int | None = None
    keeps_logits: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class DecoderShape:
    """What the formula reads of a model. gated, rms: as the MLP and the norms are. adapter_rank: of one block's together."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    gated: bool = True
    rms: bool = True
    frozen: bool = False
    adapter_rank: int = 0


def decoder_shape(model: nn.Module) -> DecoderShape | None:
    """The shape of a decoder transformer of transformers, also inside a PEFT model; None for any other model."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, layers = _first(config, "hidden_size", "n_embd"), _first(config, "num_hidden_layers", "n_layer")
    heads, words = _first(config, "num_attention_heads", "n_head"), _first(config, "vocab_size")
    if not (hidden and layers and heads and words):
        return None
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    if chosen := _first(config, "num_experts_per_tok"):  # a token meets that many experts
        inner = chosen * (_first(config, "moe_intermediate_size") or inner)
    names = [name for name, _ in model.named_modules()]
    ranks = [p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name]
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm") and list(m.parameters(recurse=False))]
    return DecoderShape(
        layers=layers,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads,
        head_size=_first(config, "head_dim") or hidden // heads,
        vocabulary=words,
        gated=any("gate_proj" in name or "gate_up_proj" in name for name in names),
        rms=any("RMS" in type(m).__name__ for m in norms),
        frozen=not any(p.requires_grad for m in norms for p in m.parameters(recurse=False)),
        adapter_rank=sum(ranks) // layers,
    )


def block_nbytes(shape: DecoderShape, batch: Batch, itemsize: int) -> int:
    """What one block keeps without checkpointing."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = (2 if shape.frozen and shape.rms else 4) * shape.hidden
    numbers = norms + 2 * queries + 2 * keys + (4 if shape.gated else 2) * shape.inner + shape.adapter_rank
    per_token = itemsize * numbers + (8 * shape.hidden if shape.rms else 0) + 8
    if batch.attention == "eager":
        per_weight = 4 if itemsize == 4 else 4 + itemsize
        per_token += per_weight * shape.heads * batch.length + itemsize * 2 * (queries - keys)
    else:
        per_token += 4 * shape.heads
    return batch.tokens * per_token


def kept_nbytes(shape: DecoderShape, batch: Batch, itemsize: int) -> int:
    """What all blocks keep from the forward to the backward."""
    if batch.checkpointing:
        return shape.layers * batch.tokens * itemsize * shape.hidden
    return shape.layers * block_nbytes(shape, batch, itemsize)


def loss_nbytes(shape: DecoderShape, batch: Batch, itemsize: int) -> int:
    """What the head and the loss take at their peak."""
    per_word = 12 if itemsize == 4 else 8 + 2 * itemsize
    if batch.loss_chunk is None:
        return batch.tokens * shape.vocabulary * per_word
    in_chunk = min(batch.loss_chunk, batch.tokens) * shape.vocabulary
    if batch.keeps_logits:  # the logits and their gradient, and the shares of one chunk in fp32
        return 2 * batch.tokens * shape.vocabulary * itemsize + 4 * in_chunk
    return in_chunk * per_word + batch.tokens * shape.hidden * itemsize


def peak_nbytes(shape: DecoderShape, batch: Batch, itemsize: int) -> int:
    """The most at one time: what is kept, and the loss or, with checkpointing, one block in recomputation on top of it."""
    kept, loss = kept_nbytes(shape, batch, itemsize), loss_nbytes(shape, batch, itemsize)
    return kept + (max(loss, block_nbytes(shape, batch, itemsize)) if batch.checkpointing else loss)


def _first(config: Any, *names: str) -> int:
    """The first of `names` that the configuration has as a number, or 0."""
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), 0)
