"""Writes a checkpoint of random weights, from which both engines begin: `weights.py CASE FOLDER [--tiny] [--use-cpu]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cases import pick_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("folder")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    told = parser.parse_args()
    case = pick_case(told.case, tiny=told.tiny, layers=None)
    torch.manual_seed(20240)
    with torch.device("cpu" if told.use_cpu else "cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**case.shape), dtype=torch.bfloat16)
    model.save_pretrained(told.folder)


if __name__ == "__main__":
    main()
