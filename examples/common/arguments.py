"""The arguments of the example scripts. Every flag acts or is refused with a reason; none is taken in silence."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded"
METHODS = ["lora", "dora", "loha", "lokr", "ia3", "prefix", "prompt", "p-tuning", "none"]
LOW_RANK = {"lora", "dora", "loha", "lokr"}
VIRTUAL_TOKENS = {"prefix", "prompt", "p-tuning"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A flag's default in its help, where it has one: `default: None` and `default: False` say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


def parse_arguments(
    description: str, *, name: str, base_model: str, num_epochs: int, argv: list[str] | None = None
) -> argparse.Namespace:
    """The script's arguments, checked against each other.

    name:       of the script; its results go to runs/<name> unless --output-dir says otherwise.
    base_model: directory below examples/base_model that is trained when no --model is given.
    num_epochs: default of --num-epochs; enough for that base model to learn 50 messages, on one process or two.
    Exits with status 2 and one sentence if flags contradict each other or name files that do not exist.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    model = parser.add_argument_group("model and data")
    model.add_argument("--model", default=str(EXAMPLES / "base_model" / base_model), help="hub id or local directory")
    model.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        default="float32",
        help="dtype in which the weights are loaded; auto is the checkpoint's own",
    )
    model.add_argument(
        "--dataset",
        default=EMBEDDED,
        help=f"{EMBEDDED!r} (messages of this repository) or a task of ought/raft on the hub, such as "
        "twitter_complaints",
    )
    model.add_argument(
        "--data-file",
        type=Path,
        help="labelled messages to train on, instead of --dataset: CSV, TSV, JSON, JSON lines or Parquet",
    )
    model.add_argument(
        "--test-file", type=Path, help="messages for --do-test, of any of these kinds; labels only score"
    )
    model.add_argument("--text-column", default="Tweet text", help="of the messages")
    model.add_argument("--label-column", default="Label", help="of the messages")
    model.add_argument("--max-length", type=int, default=128, help="tokens of a prompt; longer messages are cut")
    model.add_argument("--max-train-samples", type=int, help="train on the first so many messages only")

    peft = parser.add_argument_group("what is trained")
    peft.add_argument("--peft", choices=METHODS, default="lora", help="none trains every weight")
    peft.add_argument("--lora-r", type=int, help="rank of lora, dora, loha and lokr (8)")
    peft.add_argument("--lora-alpha", type=int, help="scale of lora, dora, loha and lokr (32)")
    peft.add_argument("--lora-dropout", type=float, help="dropout of lora, dora, loha and lokr (0.1)")
    peft.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="linear layers that get an adapter; 'all-linear' for every one, 'default' for peft's choice "
        "for the architecture (all-linear)",
    )
    peft.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="modules trained whole beside the adapter")
    peft.add_argument("--num-virtual-tokens", type=int, help="of prefix, prompt and p-tuning (20)")

    training = parser.add_argument_group("training")
    training.add_argument("--num-epochs", type=int, default=num_epochs, help="passes over the messages")
    training.add_argument("--batch-size", type=int, default=8, help="per process")
    training.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    training.add_argument("--seed", type=int, default=42, help="of new weights, dropout and the order of messages")
    training.add_argument("--gradient-accumulation-steps", type=int, help="instead of the configuration's")
    training.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations again in the backward"
    )
    training.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS", help="the last epoch always counts")
    training.add_argument("--max-new-tokens", type=int, default=10, help="longest generated label")
    training.add_argument(
        "--stop-at-accuracy", type=float, metavar="PERCENT", help="stop after an evaluation that reaches it"
    )

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="go on from the newest checkpoint of --output-dir (begin anew if there is none), or from this one",
    )
    checkpoints.add_argument(
        "--save-every", type=int, metavar="STEPS", help="save the run every so many optimizer steps"
    )
    checkpoints.add_argument("--keep-checkpoints", type=int, default=2, metavar="N", help="the newest so many")

    results = parser.add_argument_group("results")
    results.add_argument("--do-test", action="store_true", help="predict the labels of the test messages")
    results.add_argument("--predictions-file", type=Path, help="CSV of --do-test (<output-dir>/predictions.csv)")
    results.add_argument("--output-dir", type=Path, default=Path("runs") / name, help="of the adapter")
    results.add_argument(
        "--log-with",
        nargs="+",
        metavar="TRACKER",
        help="give the run's numbers to tensorboard, wandb, ... (all: every one)",
    )
    results.add_argument(
        "--save-logits",
        type=Path,
        metavar="FILE",
        help="safetensors file of the trained model's logits, for check_adapter.py",
    )
    results.add_argument("--push-to-hub", metavar="ID", help="repository to upload the output directory to")

    args = parser.parse_args(argv)
    reason = contradiction(args)
    if reason:
        parser.error(reason)
    return args


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with these arguments together, in a sentence; None if nothing is. Fills defaults that depend."""
    counts = (
        "num_epochs",
        "batch_size",
        "max_length",
        "max_new_tokens",
        "eval_every",
        "lora_r",
        "num_virtual_tokens",
        "max_train_samples",
        "gradient_accumulation_steps",
        "save_every",
        "keep_checkpoints",
    )
    if reason := below_one(args, counts) or no_checkpoint(args):
        return reason
    if args.lr <= 0:
        return f"--lr must be positive, not {args.lr}."
    given = [f for f in ("lora_r", "lora_alpha", "lora_dropout") if getattr(args, f) is not None]
    if given and args.peft not in LOW_RANK:
        return (
            f"--{given[0].replace('_', '-')} has no effect with --peft {args.peft}; it belongs to {sorted(LOW_RANK)}."
        )
    if args.lora_target_modules and args.peft not in LOW_RANK | {"ia3"}:
        return f"--lora-target-modules has no effect with --peft {args.peft}."
    if args.modules_to_save and args.peft not in LOW_RANK | {"ia3"}:
        return f"--modules-to-save cannot be combined with --peft {args.peft}, which adds no adapter to a module."
    if args.num_virtual_tokens is not None and args.peft not in VIRTUAL_TOKENS:
        return f"--num-virtual-tokens has no effect with --peft {args.peft}; it belongs to {sorted(VIRTUAL_TOKENS)}."
    if args.peft == "prefix" and args.gradient_checkpointing:
        return (
            "--peft prefix puts its weights into the key-value cache, which checkpointing does without; choose one of "
            "--peft prompt and no --gradient-checkpointing."
        )
    for flag in ("data_file", "test_file"):
        path = getattr(args, flag)
        if path is not None and not path.is_file():
            return f"--{flag.replace('_', '-')}: there is no file {path}."
    if args.data_file is not None and args.dataset != EMBEDDED:
        return f"--data-file and --dataset {args.dataset} both name the messages; give one of them."
    if args.do_test and args.data_file is not None and args.test_file is None:
        return "--do-test with --data-file needs --test-file, the messages to predict."
    if not args.do_test and (args.test_file is not None or args.predictions_file is not None):
        return "--test-file and --predictions-file are for --do-test, which is not given."
    if reason := no_token(args):
        return reason
    args.predictions_file = args.predictions_file or args.output_dir / "predictions.csv"
    return None


# What scripts with other arguments check too.


def below_one(args: argparse.Namespace, names: Sequence[str]) -> str | None:
    """Which of these counts is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')} must be at least 1, not {value}."
    return None


def no_checkpoint(args: argparse.Namespace) -> str | None:
    """That --resume names no directory."""
    if args.resume not in (None, "latest") and not Path(args.resume).is_dir():
        return f"--resume: there is no directory {args.resume}; 'latest' finds the newest checkpoint by itself."
    return None


def no_token(args: argparse.Namespace) -> str | None:
    """That --push-to-hub has no token."""
    if args.push_to_hub is not None:
        from huggingface_hub import get_token

        if get_token() is None:
            return "--push-to-hub needs a token: run `hf auth login` first, or set HF_TOKEN."
    return None
