"""TRL's GRPOTrainer with a DeepSpeed file, as its users write it: 4 completions of each prompt, rewarded by their letters."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from seen import Seen, arguments, options
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer


def tokenizer(vocabulary: int) -> Any:
    """One word for each token of the model."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(vocabulary - 4))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def main() -> None:
    parser = options()
    parser.add_argument("--prompt", type=int, required=True, help="tokens of a prompt")
    told = parser.parse_args()
    args = GRPOConfig(
        **arguments(told),
        num_generations=4,
        max_completion_length=told.length,
        generation_kwargs={"min_new_tokens": told.length},
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32" if told.fp32 else "bfloat16"},
    )
    vocabulary = AutoConfig.from_pretrained(told.model).vocab_size
    prompts = [
        " ".join(f"w{(row * 31 + place * 7) % (vocabulary - 4)}" for place in range(told.prompt)) for row in range(512)
    ]
    seen = Seen(told.warmup)
    trainer = GRPOTrainer(
        model=told.model,
        reward_funcs=letters,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(vocabulary),
        callbacks=[seen],
    )
    trainer.train()
    seen.write(trainer, told.out)


if __name__ == "__main__":
    main()
