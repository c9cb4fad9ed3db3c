"""The questions of `shardwise config`, as a table: their order, and when each applies.

Each has a key of the schema, which has its words and checks its answer, or is a helper that decides which others apply. A
default and a condition look at the answers before it. What is checked and written is in `form.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config.fields import budget
from ..config.machine import visible_gpus
from ..config.offloads import DEVICES
from ..config.schema import every_setting
from ..config.setting import Wording, setting_of
from .model_flags import Asked

Answers = dict[str, Any]
USE_ZERO = "use_zero"  # it decides distributed_type
USE_JSON = "use_json"
CLIP = "clip"
# What is told of a model, for a plan to be recommended.
LORA_RANK = "16"  # where nobody says it
MODEL, TRAINED, LENGTH, ROWS = "model", "trained", "sequence_length", "rows"
HELPERS = (USE_ZERO, USE_JSON, CLIP, MODEL, TRAINED, LENGTH, ROWS)
WHOLE, LORA, QLORA = "all", "lora", "qlora"
# Keys whose default is what was recommended for the model.
OF_THE_PLAN = (
    *("zero_stage", "offload_optimizer_device", "offload_param_device", "gpu_memory_budget"),
    *("activation_checkpointing", "dynamo_backend"),
)


@dataclass(frozen=True)
class Typed:
    """What the flags of `config` say of the model, as it was typed."""

    model: str | None = None
    lora_r: str | None = None
    quantize: str | None = None
    sequence_length: str | None = None

    def answers(self) -> Answers:
        """The questions that they answer. One model is enough: of what is not said the defaults are taken."""
        if self.model is None:
            return {}
        trained = QLORA if self.quantize is not None else LORA if self.lora_r is not None else WHOLE
        given = {MODEL: self.model, TRAINED: trained}
        return given if self.sequence_length is None else {**given, LENGTH: self.sequence_length}

    def asked(self) -> Asked:
        """The same as flags of `estimate`, to be checked."""
        rank = LORA_RANK if self.lora_r is None and self.quantize is not None else self.lora_r
        return Asked(lora_r=rank, quantize=self.quantize, sequence_length=self.sequence_length)


@dataclass(frozen=True)
class Question:
    """One question of the dialogue.

    name:    the setting that it answers, whose words are the schema's (or one of `HELPERS`).
    default: from the answers so far.
    when:    does it apply to the answers so far?
    words:   text, help and choices; with choices it is answered with the arrow keys, else a bool default makes it yes or no,
             else a line is typed.
    needed:  whether a run without a terminal must be told it by a flag.
    """

    name: str
    default: Callable[[Answers], Any]
    when: Callable[[Answers], bool]
    words: Wording
    needed: bool = True

    @property
    def is_helper(self) -> bool:
        return self.name in HELPERS


def _several(answers: Answers) -> bool:
    return _whole(answers["num_machines"]) > 1


def _zero(answers: Answers) -> bool:
    return bool(answers[USE_ZERO])


def _without_json(answers: Answers) -> bool:
    return not (_zero(answers) and answers[USE_JSON])


def _by_hand(answers: Answers) -> bool:
    return _zero(answers) and not answers[USE_JSON]


def _with_model(answers: Answers) -> bool:
    return _by_hand(answers) and bool(answers[MODEL])


def _stage(answers: Answers) -> int:
    return _whole(answers["zero_stage"]) if _by_hand(answers) else -1


def _device(answers: Answers, name: str) -> str:
    return str(answers.get(name, "none"))


def _offloads(answers: Answers) -> bool:
    devices = (_device(answers, name) for name in ("offload_optimizer_device", "offload_param_device"))
    return any(device != "none" for device in devices)


def _on_disk(answers: Answers, name: str) -> bool:
    device = DEVICES.get(_device(answers, name))
    return device is not None and device.on_disk


def _visits(answers: Answers) -> bool:
    device = DEVICES.get(_device(answers, "offload_optimizer_device"))
    return device is not None and device.visits(cuda=not answers["use_cpu"])


def _budget_acts(answers: Answers) -> bool:
    return _without_json(answers) and (
        _offloads(answers) or _stage(answers) == 3 or answers["activation_checkpointing"] == "auto"
    )


def _whole(value: Any) -> int:
    """A number as the schema or a terminal gives it; 1 for what is none, which is told at its own question."""
    text = str(value).strip()
    return int(text) if text.isdigit() and len(text) < 9 else 1


def _one_for_each_gpu(answers: Answers) -> int:
    gpus = visible_gpus(answers.get("gpu_ids"))
    return _whole(answers["num_machines"]) * (1 if answers["use_cpu"] else gpus or 1)


def as_text(value: Any) -> str:
    """An answer as it is shown and as it could be typed: true, none, 24GB, a,b."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return "none" if value is None else str(value)


def size_text(value: Any) -> str:
    """A budget in the unit that gives it back: 24000000000 is 24GB."""
    if not isinstance(value, int) or isinstance(value, bool):
        return as_text(value)
    for unit in ("TB", "TiB", "GB", "GiB", "MB", "MiB"):
        one = int(str(budget(f"1{unit}")))
        if value and value % one == 0:
            return f"{value // one}{unit}"
    return str(value)


_WORDS = {key[-1]: said for key, info in every_setting() if (said := setting_of(info).asked) is not None}


def _question(
    name: str,
    default: Callable[[Answers], Any],
    when: Callable[[Answers], bool] = lambda answers: True,
    words: Wording | None = None,
    *,
    needed: bool = True,
) -> Question:
    return Question(name, default, when, words or _WORDS[name], needed)


_ABOUT_THE_RUN = (
    _question("use_cpu", lambda answers: visible_gpus() == 0),
    _question("num_machines", lambda answers: 1),
    _question("machine_rank", lambda answers: 0, _several),
    _question("main_process_ip", lambda answers: "", _several),
    _question("main_process_port", lambda answers: 29500, _several),
    _question("same_network", lambda answers: True, _several),
    _question("rdzv_backend", lambda answers: "static", _several),
    _question("debug", lambda answers: False),
    _question(
        USE_ZERO,
        lambda answers: True,
        words=Wording(
            "Shard the training state over the processes (ZeRO)?",
            "Needed for models that do not fit; written as DEEPSPEED, the name that this schema has for it.",
        ),
    ),
    _question(
        USE_JSON,
        lambda answers: False,
        _zero,
        Wording(
            "Take the ZeRO settings from a DeepSpeed JSON file?",
            "Yes only if you have one; the questions that it answers are skipped.",
        ),
    ),
    _question("deepspeed_config_file", lambda answers: "", lambda answers: _zero(answers) and answers[USE_JSON]),
)
_ABOUT_THE_MODEL = (
    _question(
        MODEL,
        lambda answers: "",
        _by_hand,
        Wording(
            "Which model will you train?",
            "A hub id or a directory: the fastest plan that fits this machine is then the default. Empty: none.",
        ),
    ),
    _question(
        TRAINED,
        lambda answers: WHOLE,
        _with_model,
        Wording(
            "What of it is trained?",
            "What is frozen has no gradient and no optimizer state; in 4 bits it takes a quarter of its memory.",
            {WHOLE: "all weights", LORA: "LoRA adapters", QLORA: "LoRA adapters over 4-bit weights"},
        ),
    ),
    _question(
        LENGTH,
        lambda answers: 2048,
        _with_model,
        Wording(
            "How many tokens has a sequence?", "Activations grow with it. For the estimate alone; it is not written."
        ),
    ),
    _question(
        ROWS,
        lambda answers: 1,
        _with_model,
        Wording(
            "How many sequences does a process take at a time?",
            "Its micro-batch. For the estimate alone; it is not written.",
        ),
    ),
)
_ABOUT_ZERO = (
    _question("zero_stage", lambda answers: 3, _by_hand),
    _question("shard_group", lambda answers: "world", lambda answers: _several(answers) and _stage(answers) >= 1),
    _question("offload_optimizer_device", lambda answers: "none", lambda answers: _stage(answers) >= 1),
    _question(
        "offload_optimizer_nvme_path",
        lambda answers: "/local_nvme",
        lambda answers: _stage(answers) >= 1 and _on_disk(answers, "offload_optimizer_device"),
    ),
    _question("offload_param_device", lambda answers: "none", lambda answers: _stage(answers) == 3),
    _question(
        "offload_param_nvme_path",
        lambda answers: as_text(answers.get("offload_optimizer_nvme_path") or "/local_nvme"),
        lambda answers: _stage(answers) == 3 and _on_disk(answers, "offload_param_device"),
    ),
    _question("optimizer_state_dtype", lambda answers: "fp32", lambda a: _stage(a) >= 1 and _visits(a), needed=False),
    _question("gradient_accumulation_steps", lambda answers: 1, _by_hand),
    _question(
        CLIP,
        lambda answers: False,
        _by_hand,
        Wording("Clip gradients?", "Scales all gradients down when their global norm is above a value."),
    ),
    _question("gradient_clipping", lambda answers: 1.0, lambda answers: _by_hand(answers) and answers[CLIP]),
    _question("zero3_save_16bit_model", lambda answers: True, lambda answers: _stage(answers) == 3),
    _question("zero3_init_flag", lambda answers: False, lambda answers: _stage(answers) == 3),
)
_ABOUT_SPEED = (
    _question("gpu_ids", lambda answers: "all", lambda answers: not answers["use_cpu"]),
    _question("num_processes", _one_for_each_gpu),
    _question("mixed_precision", lambda answers: "no" if answers["use_cpu"] else "bf16", _without_json),
    _question("dynamo_backend", lambda answers: "no", _without_json, needed=False),
    _question("activation_checkpointing", lambda answers: "none", _without_json, needed=False),
    _question("gpu_memory_budget", lambda answers: "none", _budget_acts, needed=False),
)
QUESTIONS: tuple[Question, ...] = (*_ABOUT_THE_RUN, *_ABOUT_THE_MODEL, *_ABOUT_ZERO, *_ABOUT_SPEED)
