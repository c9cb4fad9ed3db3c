"""Load a saved adapter with stock PEFT, in one process and without shardwise, and compare its logits with the run's.

    python examples/check_adapter.py runs/conditional_generation runs/conditional_generation/logits.safetensors

The second file is what the training script wrote with --save-logits: a batch and the trained model's logits on it.
Prints the largest difference; exits with 1 if it exceeds --tolerance, or if a tensor of the adapter is empty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from common import quiet  # noqa: F401 - for what importing it does


def load_model(directory: Path, *, in_4bit: bool = False) -> torch.nn.Module:
    """The base model with the adapter of `directory`, or the model if it was saved whole; float32, in eval mode.

    in_4bit: the base as sft.py --method qlora has it.
    """
    adapted = (directory / "adapter_config.json").is_file()
    source = str(PeftConfig.from_pretrained(directory).base_model_name_or_path) if adapted else str(directory)
    encoder_decoder = AutoConfig.from_pretrained(source).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    quantised = {}
    if in_4bit:
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = kind.from_pretrained(source, dtype=torch.float32, **quantised)
    model = (PeftModel.from_pretrained(model, directory) if adapted else model).eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()  # in eval mode, on a CPU, bitsandbytes computes in bfloat16 by another kernel
    return model


def empty_tensors(directory: Path) -> list[str]:
    """The names of tensors without an element in the directory's safetensors files."""
    files = directory.glob("*.safetensors")
    return [name for file in files for name, tensor in load_file(file).items() if tensor.numel() == 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where the training script saved the adapter")
    parser.add_argument("logits", type=Path, help="file written with --save-logits")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference allowed")
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="the base in 4 bits, as sft.py --method qlora has it"
    )
    args = parser.parse_args()
    if empty := empty_tensors(args.directory):
        print(f"FAILED: {len(empty)} tensors of {args.directory} are empty, the first is {empty[0]}")
        return 1
    batch = load_file(args.logits)
    expected = batch.pop("logits")
    with torch.no_grad():
        logits = load_model(args.directory, in_4bit=args.load_in_4bit)(**batch).logits
    difference = (logits - expected).abs().max().item()
    print(
        f"adapter in stock peft: max |logit difference| = {difference:.3g} over {tuple(logits.shape)} "
        f"(logits up to {expected.abs().max().item():.3g})"
    )
    if not difference <= args.tolerance:
        print(f"FAILED: more than {args.tolerance:g}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
