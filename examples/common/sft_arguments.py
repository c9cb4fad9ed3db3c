"""The arguments of sft.py. As in arguments.py, every flag acts or is refused with a reason."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

from .arguments import EXAMPLES, Help, below_one, no_checkpoint, no_token

BASE_MODEL = EXAMPLES / "base_model" / "causal_lm"
CHAT, CHAT_EVAL, CHAT_TEMPLATE = (
    EXAMPLES / "data" / name for name in ("chat.jsonl", "chat_eval.jsonl", "chat_template.jinja")
)
ATTENTIONS = ["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"]


def parse_arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The script's arguments, checked against each other and with the defaults that depend on others filled in.

    Exits with status 2 and one sentence if flags contradict each other, or name files, packages or devices that are not there.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="hub id or directory (the small model of this repository)")
    model.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="in which weights are loaded (bfloat16 on a GPU, float32 on a CPU)",
    )
    model.add_argument("--attention", choices=ATTENTIONS, help="instead of transformers' choice")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+", metavar="FILE|ID", help="files (JSON lines, JSON, CSV, Parquet) or one data set of the hub"
    )
    data.add_argument("--split", default="train", help="of a data set of the hub")
    data.add_argument("--eval-data", nargs="+", metavar="FILE", type=Path, help="files of rows to evaluate on")
    data.add_argument("--eval-fraction", type=float, help="of the rows, held back where there is no --eval-data (0.05)")
    data.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME=COLUMN",
        default=[],
        help="which columns are messages, prompt, completion, text",
    )
    data.add_argument("--chat-template", type=Path, metavar="FILE", help="instead of the tokenizer's own")
    data.add_argument(
        "--max-length", type=int, help="tokens of a row, and of a packed sequence (1024 or what the model has)"
    )
    data.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="several rows in one sequence, which do not see each other",
    )
    data.add_argument("--max-train-samples", type=int, help="train on the first so many rows only")

    trained = parser.add_argument_group("what is trained")
    trained.add_argument("--method", choices=["lora", "qlora", "full"], default="lora", help="full: every weight")
    trained.add_argument("--lora-r", type=int, help="rank (16)")
    trained.add_argument("--lora-alpha", type=int, help="scale (32)")
    trained.add_argument("--lora-dropout", type=float, help="dropout (0)")
    trained.add_argument(
        "--lora-target-modules", nargs="+", metavar="NAME", help="linear layers that get an adapter (all-linear)"
    )
    trained.add_argument(
        "--modules-to-save", nargs="+", metavar="NAME", help="modules trained whole beside the adapter"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--num-epochs", type=int, default=3, help="passes over the data")
    training.add_argument("--batch-size", type=int, default=2, help="sequences per process and micro-batch")
    training.add_argument("--gradient-accumulation-steps", type=int, help="instead of the configuration's")
    training.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="8bit: of bitsandbytes")
    training.add_argument(
        "--lr", type=float, help="learning rate (2e-4, 1e-5 for full; 2e-3 for the model of this repository)"
    )
    training.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    training.add_argument("--schedule", choices=["linear", "cosine", "constant"], default="cosine", help="of the rate")
    training.add_argument("--warmup", type=float, default=0.03, help="part of all steps in which the rate rises")
    training.add_argument("--max-grad-norm", type=float, help="instead of the configuration's gradient_clipping")
    training.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations again in the backward"
    )
    training.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="also within an epoch; each epoch's end counts"
    )
    training.add_argument("--log-every", type=int, metavar="STEPS", default=10, help="loss and rate")
    training.add_argument("--log-with", metavar="NAME", help="tracker: tensorboard, wandb, mlflow, ...")
    training.add_argument("--seed", type=int, default=42, help="of new weights, dropout and the order of rows")

    results = parser.add_argument_group("checkpoints and results")
    results.add_argument("--output-dir", type=Path, default=Path("runs") / "sft", help="of model, checkpoints, record")
    results.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="go on from the newest checkpoint of --output-dir (begin anew if there is none), or from this one",
    )
    results.add_argument("--save-every", type=int, metavar="STEPS", help="save the run every so many optimizer steps")
    results.add_argument("--keep-checkpoints", type=int, default=2, metavar="N", help="the newest so many")
    results.add_argument("--merge", action="store_true", help="also write the base with the adapter in it, to merged/")
    results.add_argument(
        "--save-logits", type=Path, metavar="FILE", help="logits of the saved model, for check_adapter.py"
    )
    results.add_argument("--push-to-hub", metavar="ID", help="repository for the model (the merged one with --merge)")

    args = parser.parse_args(argv)
    reason = _contradiction(args) or _missing(args)
    if reason:
        parser.error(reason)
    _fill(args)
    return args


def _contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with these arguments together, in a sentence; None if nothing is."""
    counts = (
        "num_epochs",
        "batch_size",
        "max_length",
        "max_train_samples",
        "gradient_accumulation_steps",
        "eval_every",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "lora_r",
    )
    if reason := below_one(args, counts):
        return reason
    for flag in ("lr", "max_grad_norm"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            return f"--{flag.replace('_', '-')} must be positive, not {value}."
    if not 0 <= args.warmup < 1:
        return f"--warmup is a part of all steps, from 0 to less than 1, not {args.warmup}."
    if args.eval_fraction is not None and not 0 <= args.eval_fraction < 1:
        return f"--eval-fraction is from 0 (no evaluation) to less than 1, not {args.eval_fraction}."
    if args.eval_fraction is not None and args.eval_data is not None:
        return "--eval-fraction holds rows of --data back, and --eval-data names others; give one of them."
    given = [flag for flag in vars(args) if flag.startswith(("lora_", "modules_")) and getattr(args, flag) is not None]
    if args.method == "full" and given:
        return f"--{given[0].replace('_', '-')} has no effect with --method full, which adds no adapter."
    if args.method == "full" and args.merge:
        return "--merge puts an adapter into its base; --method full has none and saves whole weights."
    if args.method == "qlora" and args.dtype == "float16" and not torch.cuda.is_available():
        return "--method qlora computes in --dtype, and a CPU does not in float16; take bfloat16 or float32."
    if (args.attention or "").startswith("flash") and args.dtype == "float32":
        return f"--attention {args.attention} computes in 16 bits; take --dtype bfloat16."
    names = [pair.partition("=")[0] for pair in args.columns]
    if any("=" not in pair for pair in args.columns) or not set(names) <= {"messages", "prompt", "completion", "text"}:
        return "--columns takes pairs such as prompt=instruction, of messages, prompt, completion and text."
    if len(set(names)) < len(names):
        return "--columns names one of them twice."
    return None


def _missing(args: argparse.Namespace) -> str | None:
    """Which file, package or device an argument needs that is not there, in a sentence; None if all are."""
    if reason := no_checkpoint(args):
        return reason
    for flag, paths in (("--eval-data", args.eval_data), ("--chat-template", [args.chat_template])):
        for path in paths or []:
            if path is not None and not path.is_file():
                return f"{flag}: there is no file {path}."
    files = [source for source in args.data or [] if Path(source).is_file()]
    others = [source for source in args.data or [] if source not in files]
    looks_like_file = [source for source in others if Path(source).suffix or source.startswith((".", "/"))]
    if looks_like_file:
        return f"--data: there is no file {looks_like_file[0]}."
    if others and len(args.data) > 1:
        return f"--data: there is no file {others[0]}, and a data set of the hub is named alone."
    if args.method == "qlora" or args.optimizer == "adamw8bit":
        flag = "--method qlora" if args.method == "qlora" else "--optimizer adamw8bit"
        if importlib.util.find_spec("bitsandbytes") is None:
            return f"{flag} needs bitsandbytes: pip install 'shardwise[quantised]'."
    if args.method == "qlora" and importlib.util.find_spec("accelerate") is None:
        return "--method qlora: transformers loads weights in 4 bits only if accelerate is installed: pip install accelerate."
    if (args.attention or "").startswith("flash"):
        if not torch.cuda.is_available():
            return f"--attention {args.attention} needs a GPU, and there is none; sdpa packs rows on every device."
        package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[args.attention]
        if importlib.util.find_spec(package) is None and importlib.util.find_spec("kernels") is None:
            return f"--attention {args.attention} needs the package {package} or kernels; sdpa packs rows too."
    return no_token(args)


def _fill(args: argparse.Namespace) -> None:
    """Defaults that depend on other arguments and on the machine."""
    embedded = args.model is None
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.lr = args.lr or (2e-3 if embedded else 1e-5 if args.method == "full" else 2e-4)
    args.model = args.model or str(BASE_MODEL)
    if args.data is None:
        args.data = [str(CHAT)]
        if args.eval_data is None and args.eval_fraction is None:
            args.eval_data = [CHAT_EVAL]
    if args.eval_data is None and args.eval_fraction is None:
        args.eval_fraction = 0.05
    if embedded and args.chat_template is None:
        args.chat_template = CHAT_TEMPLATE
    # What common.adapters reads, of the other examples' arguments.
    args.peft = "none" if args.method == "full" else "lora"
    args.lora_r = args.lora_r or 16
    args.lora_dropout = args.lora_dropout or 0.0
