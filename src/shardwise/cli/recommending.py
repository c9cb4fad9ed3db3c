"""The plan that is recommended for a model, as defaults of the questionnaire; torch is imported once one is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..config.schema import Config
from ..errors import ConfigError, ShardwiseError
from .model_flags import Asked
from .model_run import machine_of, model_of, run_of
from .planning import recommendation, settings_of
from .questions import LENGTH, LORA, LORA_RANK, MODEL, QLORA, ROWS, TRAINED, WHOLE, Answers


@dataclass(frozen=True)
class Plan:
    """defaults: of questions, by name. said: what the user is told of it, a line each."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    said: tuple[str, ...] = ()


class Recommender:
    """Recommends once for each model, way of training and run. lora_r: the rank that adapters are counted with.

    quantize: how the frozen weights rest where they are quantised.
    """

    def __init__(self, lora_r: str | None = None, quantize: str | None = None) -> None:
        self.lora_r = lora_r or LORA_RANK
        self.quantize = quantize or "4bit"
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._built = cache(model_of)

    def problem(self, model: str) -> str | None:
        """Why this model cannot be estimated; None if it can. Takes seconds: torch and transformers are imported."""
        try:
            self._built(model, Asked())
        except ShardwiseError as error:
            return str(error)
        return None

    def plan(self, answers: Answers, config: Config) -> Plan:
        """For the model of these answers, in a run of this Config. Where none can be found, the lines say why."""
        asked = self._asked(answers)
        key = (answers[MODEL], asked, answers.get(ROWS), config.model_dump_json())
        if key not in self._plans:
            try:
                self._plans[key] = self._found(str(answers[MODEL]), asked, answers, config)
            except ShardwiseError as error:
                self._plans[key] = Plan(said=(f"No plan can be recommended: {error}",))
        return self._plans[key]

    def _asked(self, answers: Answers) -> Asked:
        trained = answers.get(TRAINED, WHOLE)
        return Asked(
            lora_r=self.lora_r if trained in (LORA, QLORA) else None,
            quantize=self.quantize if trained == QLORA else None,
            sequence_length=str(answers.get(LENGTH) or 2048),
        )

    def _found(self, model: str, asked: Asked, answers: Answers, config: Config) -> Plan:
        from ..config.offloads import MEDIA
        from ..estimate.bytes import size

        asked.check()
        rows = str(answers.get(ROWS) or 1)
        if not rows.isdigit() or int(rows) < 1:
            raise ConfigError(f"{ROWS}: {rows!r} is not a whole number of 1 or more")
        engine = config.engine.model_copy(update={"micro_batch_size": int(rows)})
        config = config.model_copy(update={"shardwise_config": engine})
        machine = machine_of(config)
        run = run_of(config, asked, machine.gpus)
        best = recommendation(model, self._built(model, asked), asked, {}, config, run, machine)
        where = f"{model} on {run.world_size} process(es)"
        if best is None:
            return Plan(
                said=(f"For {where} no plan fits this machine; `shardwise estimate {model}` says what each lacks.",)
            )
        # What the settings leave open is asked for: a directory on a drive.
        defaults = settings_of(best, config, None)
        if best.choice.offloads and not best.time.total:
            defaults["gpu_memory_budget"] = "auto"  # nothing is known of what it keeps, and it does no harm
        # On a CPU the device is host memory.
        names = {"GPU": "GPU" if run.cuda else "host"}
        taken = [(names.get(medium, medium), best.estimate.taken(medium)) for medium in MEDIA]
        sizes = ", ".join(f"{size(count)} of {name}" for name, count in taken if count)
        step = f", a step of about {best.time.total:.3f} s" if best.time.total else ""
        said = [f"For {where} {best} is recommended: at its peak {sizes} for each{step}."]
        if run.cuda and machine.gpu_nbytes is None:
            said.append("How much memory a GPU has is not known here, so it is taken to be enough.")
        return Plan(defaults, tuple(said))
