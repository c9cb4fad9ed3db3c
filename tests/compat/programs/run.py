"""Runs programs one after another in one run: `run.py OUT loop:z2 trainer:z3-lora ...`, each into OUT/PROGRAM-CASE.json."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

folder, *named = sys.argv[1:]
for name in named:
    program, case = name.split(":")
    out = Path(folder) / program
    out.mkdir(exist_ok=True)
    found = importlib.import_module(program).train(case, str(out))
    if torch.distributed.get_rank() == 0:
        Path(folder, f"{program}-{case}.json").write_text(json.dumps(found))
