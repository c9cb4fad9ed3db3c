"""TRL's trainers, as their users write them: the case is a configuration, a trainer, and what is trained ("z3-dpo-lora")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer import CASES, SIZES, forget
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(60)]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tokenizer() -> Any:
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = CHAT
    return found


def text(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + place * (seed % 5 + 1)) % 60] for place in range(length))


def make_model(large: bool, kind: type = LlamaForCausalLM) -> Any:
    set_seed(7)
    # A vocabulary of 66,000 makes the head a unit of its own.
    sizes = {**SIZES, "vocab_size": 66000} if large else SIZES
    more = {"num_labels": 1} if kind is LlamaForSequenceClassification else {}
    return kind(LlamaConfig(**sizes, **more))


def arguments(kind: type, case: str, out: str, **more: Any) -> Any:
    zero = {} if CASES[case] is None else {"deepspeed": CASES[case]}
    return kind(
        output_dir=out,
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=case == "ddp",
        bf16=False,
        seed=5,
        gradient_checkpointing=False,
        **zero,
        **more,
    )


def sft(case: str, out: str, large: bool, peft: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": text(number, 12)} for number in range(48)])
    made = arguments(SFTConfig, case, out, max_length=32)
    return SFTTrainer(
        model=make_model(large), args=made, train_dataset=rows, processing_class=tokenizer(), peft_config=peft
    )


def pairs() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": text(n, 5), "chosen": " " + text(n + 100, 6), "rejected": " " + text(n + 200, 6)}
            for n in range(48)
        ]
    )


def dpo(case: str, out: str, large: bool, peft: Any, rows: Any = None, **more: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    made = arguments(DPOConfig, case, out, max_length=32, **more)
    reference = None if peft is not None else make_model(large)
    return DPOTrainer(
        model=make_model(large), ref_model=reference, args=made, train_dataset=rows or pairs(), processing_class=tokenizer(),
        peft_config=peft,
    )  # fmt: skip


def dpopre(case: str, out: str, large: bool, peft: Any) -> Any:
    # Precomputing needs rows that all processes read from one file.
    rows = load_dataset("json", data_files=f"{Path(out).parent}/pairs.jsonl", split="train", cache_dir=f"{out}-cache")
    return dpo(case, out, large, peft, rows, precompute_ref_log_probs=True)


def reward(case: str, out: str, large: bool, peft: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_list([{"chosen": text(n, 8), "rejected": text(n + 100, 8)} for n in range(48)])
    made = arguments(RewardConfig, case, out, max_length=32)
    model = make_model(large, LlamaForSequenceClassification)
    return RewardTrainer(model=model, args=made, train_dataset=rows, processing_class=tokenizer(), peft_config=peft)


def kto(case: str, out: str, large: bool, peft: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = Dataset.from_list(
        [{"prompt": text(n, 5), "completion": " " + text(n + 100, 6), "label": n % 3 > 0} for n in range(48)]
    )
    made = arguments(KTOConfig, case, out, max_length=32, train_sampling_strategy="sequential")
    reference = None if peft is not None else make_model(large)
    return KTOTrainer(
        model=make_model(large), ref_model=reference, args=made, train_dataset=rows, processing_class=tokenizer(),
        peft_config=peft,
    )  # fmt: skip


def _online(trainer: type, config: type, case: str, out: str, peft: Any, **more: Any) -> Any:
    """A trainer that generates what it learns from, and rewards many different words."""

    def length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(completion.split()))) for completion in completions]

    rows = Dataset.from_list([{"prompt": text(number, 5)} for number in range(48)])
    made = arguments(config, case, out, max_completion_length=8, num_generations=4, beta=0.1, **more)
    base = f"{Path(out).parent}/base"  # the reference model comes from where the model does
    return trainer(
        model=base, reward_funcs=length, args=made, train_dataset=rows, processing_class=tokenizer(),
        peft_config=peft,
    )  # fmt: skip


def grpo(case: str, out: str, large: bool, peft: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return _online(GRPOTrainer, GRPOConfig, case, out, peft)


def rloo(case: str, out: str, large: bool, peft: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    # In the first iteration over what was generated the loss is a sum that cancels.
    return _online(RLOOTrainer, RLOOConfig, case, out, peft, num_iterations=2)


def train(name: str, folder: str) -> dict[str, Any]:
    case, kind, *more = name.split("-")
    peft = None
    if "lora" in more:
        peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if kind == "reward":
            peft.task_type = "SEQ_CLS"
    makers = {"sft": sft, "dpo": dpo, "dpopre": dpopre, "reward": reward, "kto": kto, "grpo": grpo, "rloo": rloo}
    trainer = makers[kind](case, f"{folder}/{name}", "large" in more, peft)
    trainer.train()
    found = {"log": [row for row in trainer.state.log_history if "loss" in row]}
    trainer.save_model(f"{folder}/{name}/final")
    forget(trainer)
    return found
