"""README.md beside a trained model: what the Hub shows of it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

# What is imported to load a model, and the class that does.
WHOLE = ("from transformers import AutoModelForCausalLM, AutoTokenizer", "AutoModelForCausalLM")
ADAPTER = (
    "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
    "AutoPeftModelForCausalLM",
)


def write_card(directory: Path, facts: dict[str, Any]) -> None:
    """Write the card of sft.py's model into its directory. What a machine alone knows, such as local paths, is left out.

    facts: "args" and "summary" of the training data, "steps", "processes" and, where there was an evaluation, "eval_loss".
    """
    args, summary = facts["args"], facts["summary"]
    on_hub = not Path(args.model).is_dir()
    base = args.model if on_hub else Path(args.model).name
    from_hub = not Path(args.data[0]).is_file()
    head: dict[str, Any] = {
        "library_name": "transformers" if args.method == "full" else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sft", args.method, "shardwise"],
    }
    if on_hub:
        head["base_model"] = base
        head["base_model_relation"] = "finetune" if args.method == "full" else "adapter"
    if from_hub:
        head["datasets"] = [args.data[0]]
    data = ", ".join(args.data) if from_hub else ", ".join(Path(source).name for source in args.data)
    rows = [
        ("base model", base),
        ("data", data),
        ("rows", f"{summary.kept}, {summary.tokens} tokens, {summary.answer_tokens} of them with a loss"),
        ("method", args.method if args.method == "full" else f"{args.method}, rank {args.lora_r}"),
        ("packing", "yes" if args.packing else "no"),
        ("optimizer", f"{args.optimizer}, rate {args.lr:g}, {args.schedule}, weight decay {args.weight_decay:g}"),
        ("optimizer steps", facts["steps"]),
        ("sequences per process and micro-batch", args.batch_size),
        ("processes", facts["processes"]),
        ("weights", args.dtype),
        ("seed", args.seed),
    ]
    if "eval_loss" in facts:
        rows.insert(0, ("evaluation loss per answer token", f"{facts['eval_loss']:.4f}"))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "peft", "torch", "datasets"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    name = args.push_to_hub or "this directory"
    imports, loader = WHOLE if args.method == "full" else ADAPTER
    text = f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---
# {base}, fine-tuned on {data}

```python
{imports}

model = {loader}.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| | |
|---|---|
{table}

Trained by `examples/sft.py` of shardwise, with {versions}.
"""
    (directory / "README.md").write_text(text, encoding="utf-8")


def merged_card(card: str) -> str:
    """An adapter's card as it is true of the base with the adapter in it."""
    changed = {"library_name: peft": "library_name: transformers", "relation: adapter": "relation: finetune"}
    for old, new in {**changed, **dict(zip(ADAPTER, WHOLE, strict=True))}.items():
        card = card.replace(old, new)
    return card
