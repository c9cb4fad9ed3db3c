"""Train the two base models of the examples: a BART of about a million weights and a Llama of the same size.

    python examples/base_model/train.py            # both; some minutes on one CPU core
    python examples/base_model/train.py --kind causal_lm --num-steps 500

Both read the corpus of corpus.py through one byte-level BPE tokenizer, trained on it first, which knows every byte and
so every text. The models answer questions about a message (its mood, topic, form, reader, a hidden word); the weights
are written in bfloat16 beside this file, in `seq2seq/` and `causal_lm/`, as any `from_pretrained` reads them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import draw_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # their ids are their places, as in BART
BOS, PAD, EOS = 0, 1, 2
VOCABULARY = 1536
POSITIONS = 512
HELD_OUT_SEED = 10**6  # the corpus of this seed is never trained on


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE over the corpus; every byte is in it, so no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    pairs = itertools.islice(draw_pairs(seed, mask=""), 20_000)
    tokenizer.train_from_iterator((f"{prompt} {answer}" for prompt, answer in pairs), trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it: `<s> text </s>` for seq2seq, `<s> text` for a causal model."""
    template = "<s> $A </s>" if kind == "seq2seq" else "<s> $A"
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(kind: str) -> PreTrainedModel:
    """A random model of the kind, about 1.2 million weights."""
    if kind == "seq2seq":
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=VOCABULARY,
                d_model=128,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=512,
                decoder_ffn_dim=512,
                max_position_embeddings=POSITIONS,
                dropout=0.0,
                init_std=0.05,
                bos_token_id=BOS,
                pad_token_id=PAD,
                eos_token_id=EOS,
                decoder_start_token_id=EOS,
                forced_eos_token_id=None,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )


def make_batch(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], kind: str) -> dict[str, Any]:
    """Token ids, mask and labels of the pairs; labels are -100 where nothing is asked.

    seq2seq: labels are the answer. causal_lm: the labels are the whole text, so that the model learns the language too.
    """
    prompts = [prompt for prompt, _ in pairs]
    answers = [answer for _, answer in pairs]
    if kind == "seq2seq":
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        labels = tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]
    else:
        batch = tokenizer([f"{p} {a}</s>" for p, a in pairs], padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
    labels[labels == PAD] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def batches(seed: int, batch_size: int) -> Iterator[list[tuple[str, str]]]:
    """An endless stream of batches; eight are drawn at a time and sorted by length, so that little is padding."""
    stream = draw_pairs(seed)
    while True:
        pool = sorted(itertools.islice(stream, 8 * batch_size), key=lambda pair: len(pair[0]))
        starts = list(range(0, len(pool), batch_size))
        for start in starts[::2] + starts[1::2]:
            yield pool[start : start + batch_size]


@torch.no_grad()
def answer_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: str, count: int = 256) -> float:
    """The share of answer tokens that the model puts first, on messages that it never saw."""
    model.eval()
    right = asked = 0
    pairs = list(itertools.islice(draw_pairs(HELD_OUT_SEED), count))
    for start in range(0, count, 64):
        part = pairs[start : start + 64]
        batch = make_batch(tokenizer, part, kind)
        labels, logits = batch["labels"], model(**batch).logits
        if kind == "seq2seq":
            guesses, wanted, kept = logits.argmax(-1), labels, (labels != -100) & (labels > EOS)
        else:
            guesses, wanted = logits.argmax(-1)[:, :-1], labels[:, 1:]
            kept = torch.zeros_like(wanted, dtype=torch.bool)
            for row, (prompt, _) in enumerate(part):
                kept[row, len(tokenizer(prompt)["input_ids"]) - 1 :] = True
            kept &= (wanted != -100) & (wanted != EOS)
        right += int((guesses == wanted)[kept].sum())
        asked += int(kept.sum())
    model.train()
    return right / asked


def train(kind: str, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Train one model and write it with its tokenizer into a directory named after its kind."""
    torch.manual_seed(args.seed)
    model, words = make_model(kind), wrap_tokenizer(tokenizer, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.num_steps, pct_start=0.05)
    start = time.monotonic()
    for step, pairs in enumerate(itertools.islice(batches(args.seed + 1, args.batch_size), args.num_steps), 1):
        loss = model(**make_batch(words, pairs, kind)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.log_every == 0 or step == args.num_steps:
            print(
                f"{kind} step={step} loss={loss.item():.3f} answers={answer_accuracy(model, words, kind):.3f} "
                f"seconds={time.monotonic() - start:.0f}",
                flush=True,
            )
    target = args.output_dir / kind
    model.to(torch.bfloat16).save_pretrained(target)
    words.save_pretrained(target)
    print(f"{kind}: {model.num_parameters():,} weights in {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kind", choices=["seq2seq", "causal_lm"], help="train only this one")
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--output-dir", type=Path, default=HERE)
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.seed)
    for kind in [args.kind] if args.kind else ["seq2seq", "causal_lm"]:
        train(kind, tokenizer, args)


if __name__ == "__main__":
    main()
