"""The tables of docs/howto/plans.md: which plan `shardwise plan` takes for a model on a machine, without network and GPU.

    python tools/site/plan_table.py                              write them into the page; takes minutes
    python tools/site/plan_table.py lora Llama-3.1-8B            print the rows of one training of one model

Models are their public configurations, written down here. Everything else is the command's own code, so that a row is what it
prints first for the flags that the page names.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwise.cli.model_flags import Asked
from shardwise.cli.model_run import model_of, run_of
from shardwise.cli.plan_machine import Described, MachineAsked, described
from shardwise.cli.planning import planner_of, ways_of
from shardwise.config.offloads import DEVICES
from shardwise.config.resolve import resolve
from shardwise.estimate.bytes import CHOICES, size
from shardwise.estimate.plans import Planned, Planner
from shardwise.estimate.recommending import fastest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "plans.md"
SEQUENCES, LENGTH = 32, 2048  # of a step, whatever the number of GPUs; each computes one sequence at a time

_LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8},
    **{"max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16"},
}
_QWEN2 = {**_LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064}
_QWEN3 = {**_LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}


def _shape(family: Mapping[str, Any], hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**family, **sizes, "num_attention_heads": heads, **more}


# Configuration, and parameters in 10^9 as its publisher counts them.
MODELS: Mapping[str, tuple[dict[str, Any], float]] = {
    "Llama-3.2-1B": (_shape(_LLAMA, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True), 1.24),
    "Llama-3.1-8B": (_shape(_LLAMA, 4096, 14336, 32, 32), 8.03),
    "Qwen3-14B": (_shape(_QWEN3, 5120, 17408, 40, 40), 14.8),
    "Qwen2.5-32B": (_shape(_QWEN2, 5120, 27648, 64, 40), 32.8),
    "Llama-3.1-70B": (_shape(_LLAMA, 8192, 28672, 80, 64), 70.6),
}
# By the word after `plans:` in the page's marks.
TRAININGS: Mapping[str, Asked] = {
    "lora": Asked(lora_r="16"),
    "qlora": Asked(lora_r="16", quantize="4bit"),
    "full": Asked(),
}
_DRIVE = {"nvme": "4TB", "drive": "5GB/s"}
MACHINES: Mapping[str, MachineAsked] = {
    "RTX 4090": MachineAsked("1", "RTX 4090", host_memory="64GB", **_DRIVE),
    "L40S": MachineAsked("1", "L40S", host_memory="128GB", **_DRIVE),
    "A100": MachineAsked("1", "A100", host_memory="256GB", **_DRIVE),
    "H100": MachineAsked("1", "H100", host_memory="256GB", **_DRIVE),
    "2 x H200": MachineAsked("2", "H200", host_memory="512GB", **_DRIVE),
    "8 x A100": MachineAsked("8", "A100", host_memory="2TB", **_DRIVE),
    "8 x H100": MachineAsked("8", "H100", host_memory="2TB", **_DRIVE),
}
_MARKED = re.compile(r"<!-- plans: (\w+) -->\n(.*?)<!-- end of plans -->\n", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """best: the plan that is taken, None where none fits, not on a drive either. why: what is short. host: of the machine."""

    machine: str
    best: Planned | None
    host: int = 0
    tokens_per_s: float = 0.0
    why: str = ""

    @property
    def cells(self) -> list[str]:
        if self.best is None:
            return [self.machine, f"does not fit: {self.why}", "", "", ""]
        gpu = size(self.best.estimate.taken("GPU"))
        return [
            self.machine,
            words_of(self.best),
            gpu,
            size(self.host) if self.host else "-",
            rounded(self.tokens_per_s),
        ]


def settings_for(gpus: int) -> dict[str, str | bool]:
    """As flags of `shardwise plan`."""
    micro_batches = max(1, SEQUENCES // gpus)
    return {"mixed_precision": "bf16", "gradient_accumulation_steps": str(micro_batches)}


def rows(model: str, training: str, machines: Mapping[str, MachineAsked] = MACHINES) -> Iterator[Row]:
    """What the command would take on each machine. The model is traced once."""
    asked = replace(TRAININGS[training], sequence_length=str(LENGTH))
    planner: Planner | None = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and PEFT, about each other
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(MODELS[model][0]), encoding="utf-8")
        built = model_of(str(path), asked)
        for name, on in machines.items():
            place = described(on, None, None)
            settings = settings_for(place.gpus)
            config = resolve(settings, None).config.model_copy(update={"num_processes": place.gpus})
            run = run_of(config, asked, place.gpus)
            if planner is None:
                planner = planner_of(str(path), built, asked, config, run, place.terms)
                assert planner.arithmetic_alone is None, planner.arithmetic_alone
            planner = planner.of(run, place.terms, config.gradient_accumulation_steps)
            tokens = config.gradient_accumulation_steps * place.gpus * LENGTH
            yield _row(name, planner, place, tokens, ways_of(settings, asked, config))


def _row(name: str, planner: Planner, place: Described, tokens: int, ways: dict[str, Any]) -> Row:
    """A plan on a drive only where nothing else fits. tokens: of a step."""
    near = [choice for choice in CHOICES if not choice.on_disk]
    found: list[Planned] = []
    for choices in (near, [choice for choice in CHOICES if choice.on_disk]):
        found += planner.plans(place.machine(), choices, **ways)
        best = fastest(found)
        if best is not None:
            # A budget takes back what fits after the first steps. Until then everything that is offloaded is away.
            first = planner.plan(best.choice, replace(best.way, kept=0.0))
            return Row(name, best, place.gpus * first.estimate.taken("host"), tokens / best.time.total)

    def over(one: Planned) -> float:
        host = place.gpus * one.estimate.taken("host") / (place.host_nbytes or 1)
        return max(one.estimate.taken("GPU") / place.gpu_nbytes, host)

    return Row(name, None, why="; ".join(min(found, key=over).shortages))


def words_of(plan: Planned) -> str:
    """As the page's legend has them."""
    places: dict[str, list[str]] = {}
    for what, where in (("optimizer", plan.choice.optimizer), ("weights", plan.choice.param)):
        if where != "none":
            places.setdefault("drive" if DEVICES[where].on_disk else where, []).append(what)
    offloaded = [f"{' + '.join(of)} on {where}" for where, of in places.items()]
    return ", ".join([f"stage {plan.choice.stage}", *offloaded, *plan.way.words])


def rounded(number: float) -> str:
    """To three digits: the model is not better than that."""
    return f"{float(f'{number:.3g}'):,.0f}"


def table(found: Mapping[str, Sequence[Row]]) -> str:
    """found: rows by model. With empty lines around it, or the site takes it for a part of the mark."""
    lines = ["| model | machine | plan | a GPU | host | tokens/s |", "|---|---|---|--:|--:|--:|"]
    for model, of_model in found.items():
        for place, row in enumerate(of_model):
            lines.append("| " + " | ".join([model if place == 0 else "", *row.cells]) + " |")
    return "\n".join(["", *lines, "", ""])


def committed(text: str) -> dict[str, dict[str, list[list[str]]]]:
    """training -> model -> cells of its rows, as the page has them."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for match in _MARKED.finditer(text):
        of: dict[str, list[list[str]]] = {}
        model = ""
        for line in match[2].splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not line.startswith("|") or cells[0] == "model" or set(line) <= set("|-:"):
                continue
            model = cells[0] or model
            of.setdefault(model, []).append(cells[1:])
        found[match[1]] = of
    return found


def main(arguments: Sequence[str]) -> int:
    if arguments:
        training, model = arguments
        print(table({model: list(rows(model, training))}).strip())
        return 0
    text = PAGE.read_text(encoding="utf-8")
    for training in TRAININGS:
        made = table({model: list(rows(model, training)) for model in MODELS})
        begin = text.index(mark := f"<!-- plans: {training} -->\n") + len(mark)
        text = text[:begin] + made + text[text.index("<!-- end of plans -->\n", begin) :]
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
