"""The Python blocks of the pages for users run: a page's in one namespace, in a process of its own, on tiny objects.

What a page takes as given (`model`, `loader`, `optimizer`, `accelerator`, `name`, ...) is made here as a reader would have made
it. Models and tokenizers of the hub are the repository's small ones. A block with `<!-- not run: why -->` above it is left out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rig import fresh_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "site"))

import pages

ROOT = pages.ROOT
SMALL = ROOT / "examples" / "base_model" / "causal_lm"
ZERO3 = '{"distributed_type": "DEEPSPEED", "use_cpu": true, "deepspeed_config": {"zero_stage": 3}}'
# Of pages, these are run by name: those of design/ describe the engine's insides, machines.md a cluster (test_ray.py runs it).
PAGES = [
    "README.md",
    *sorted(
        str(p.relative_to(ROOT)) for folder in ("", "from/", "howto/") for p in (ROOT / "docs").glob(f"{folder}*.md")
    ),
]


def blocks(page: str) -> list[pages.Fence]:
    found = pages.fences((ROOT / page).read_text(encoding="utf-8"))
    return [one for one in found if one.language == "python" and not one.before.startswith("<!-- not run: ")]


WITH_BLOCKS = [page for page in PAGES if page != "docs/machines.md" and blocks(page)]


def given() -> dict[str, Any]:
    """The names that a page may use without making them."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader

    from shardwise import Accelerator

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        original = auto.from_pretrained
        auto.from_pretrained = lambda name, *args, _original=original, **keywords: _original(SMALL, *args, **keywords)
    rows = [{"input_ids": torch.arange(8) + start, "labels": torch.arange(8) + start} for start in range(4)]
    accelerator = Accelerator()
    model = transformers.AutoModelForCausalLM.from_pretrained("small")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return {
        "accelerator": accelerator,
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "loader": DataLoader(rows, batch_size=2),
        "eval_loader": DataLoader(rows, batch_size=2),
        "name": "small",
        "epochs": 1,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "LoraConfig": LoraConfig,
        "get_peft_model": get_peft_model,
        "torch": torch,
    }


def run_page(page: str, folder: str) -> list[str]:
    """Run the page's blocks in order; what they leave in `folder`. An error names the page's line."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.chdir(folder)
    sys.argv = ["train.py"]
    names = {"__name__": "__page__", **given()}
    # A page that prepares nothing by itself takes what is prepared as given.
    if not any("prepare(" in one.text for one in blocks(page)):
        those = ("model", "optimizer", "scheduler", "loader", "eval_loader")
        names.update(zip(those, names["accelerator"].prepare(*(names[name] for name in those)), strict=True))
    for number, one in enumerate(blocks(page)):
        known = {"__name__": "__page__"} if page in WHOLE and number == 0 else names
        exec(compile("\n" * (one.line - 1) + one.text, str(ROOT / page), "exec"), known)
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# Pages whose first block is a whole script: it is given nothing.
WHOLE = ("README.md", "docs/first_run.md")
# Pages whose blocks write files, and one of these.
LEFT = {
    "README.md": "adapter/adapter_model.safetensors",
    "docs/first_run.md": "adapter/adapter_model.safetensors",
    "docs/howto/checkpoints.md": "runs/a/checkpoints/checkpoint_0/manifest.json",
    "docs/howto/export.md": "whole/model.safetensors",
    "docs/howto/rl.md": "adapters/2/adapter_config.json",
}


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    environment = {"SHARDWISE_CONFIG": ZERO3, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (found,) = fresh_ranks(run_page, [environment], page, str(tmp_path), timeout_s=120)
    assert (found.error, found.code) == (None, 0)
    assert page not in LEFT or LEFT[page] in found.value, found.value


def test_pages_that_leave_files_have_blocks() -> None:
    assert LEFT.keys() <= set(WITH_BLOCKS)
