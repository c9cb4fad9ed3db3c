"""`DeepSpeedPlugin`: the ZeRO settings of a script, by its fields and by a DeepSpeed configuration that stays open to it.

    fields, a JSON, what a script writes into `deepspeed_config`   ->   merged_into(Config) when an Accelerator is made
    what a script writes later                                     ->   taken(Config) in `prepare`

The configuration file of the launcher lies below both. Of several plugins one is in force: `deepspeed_plugins.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..building.loading import build_without_memory, built_without_memory
from ..config.accelerate_variables import below_a_plugin, configuration
from ..config.check import checked, merged
from ..config.deepspeed_json import LOSS_SCALE_WINDOW
from ..config.schema import Config, value_of
from ..errors import ConfigError, PrepareError, ShardwiseError
from .deepspeed_open import OpenConfiguration, check_precision, keywords_of, tell, words_of
from .deepspeed_words import AUTO, HfDeepSpeedConfig, fill_match, keys_of

# Fields of the plugin that the schema has under another name, and those that it has not.
_KEYS = {
    "hf_ds_config": "deepspeed_config_file",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "transformer_moe_cls_names": "deepspeed_moe_layer_cls_names",
}
_UNSAID = {  # keys of a JSON that a script may take away again -> ours
    "gradient_clipping": ("deepspeed_config", "gradient_clipping"),
    "train_batch_size": ("shardwise_config", "train_batch_size"),
    "train_micro_batch_size_per_gpu": ("shardwise_config", "micro_batch_size"),
    "optimizer": ("shardwise_config", "optimizer"),
    "scheduler": ("shardwise_config", "scheduler"),
}
_NO_SETTING = ("hf_ds_config", "is_train_batch_min", "enable_msamp", "msamp_opt_level")


@dataclass
class DeepSpeedPlugin:
    """The ZeRO settings of a script, over those of the configuration file; None means: not said here.

    hf_ds_config:       a DeepSpeed configuration: a path, a dictionary, or an object with a `.config`. What it says holds; the
                        fields fill in its "auto" values.
    is_train_batch_min: of loaders that are prepared together, the smallest batch size is the one that is compared with the
                        configuration's; False takes the largest.
    zero3_init_flag:    from_pretrained and from_config build without memory, at stage 3.
    transformer_moe_cls_names: classes of experts, with commas. They have no effect: ranks agree on the order of gathers.
    enable_msamp, msamp_opt_level: fp8, which is refused.
    shard_group:        which ranks hold one copy of a model together: "world", "machine", or so many.
    optimizer_shard_group: which divide gradients and states at stage 3: those of the "shard_group", or the "world".
    deepspeed_config:   the configuration in DeepSpeed's words. It stays open: what a script writes before an Accelerator is
                        made counts for it, what it writes later in the next `prepare`; what cannot count is an error there.
    The Accelerator's `deepspeed_plugin` is the very object, and has the settings in force.
    """

    hf_ds_config: Any = field(default=None, compare=False)
    gradient_accumulation_steps: Any = None
    gradient_clipping: Any = None
    zero_stage: int | None = None
    is_train_batch_min: bool = True
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    zero3_init_flag: bool | None = None
    zero3_save_16bit_model: bool | None = None
    transformer_moe_cls_names: str | None = None
    enable_msamp: bool | None = None
    msamp_opt_level: str | None = None
    train_micro_batch_size_per_gpu: int | None = None
    train_batch_size: int | None = None
    mixed_precision: str | None = field(default=None, repr=False)
    shard_group: str | int | None = None
    optimizer_shard_group: str | None = None

    def __post_init__(self) -> None:
        self._selected = False
        self._problem: ConfigError | None = None  # told where all ranks hear of it
        self._filled: dict[str, Any] = {}
        self.config: Config | None = None  # in force, once an Accelerator has taken the plugin
        given = self.hf_ds_config
        described = given not in (None, "none")
        try:
            self.hf_ds_config = HfDeepSpeedConfig(given if described else {})
        except ConfigError as error:
            self._problem = error
            self.hf_ds_config = HfDeepSpeedConfig({})
        path = given if isinstance(given, (str, os.PathLike)) else None
        self.open = OpenConfiguration(self.hf_ds_config, path, described=described)
        try:
            config = self.merged_into(configuration()[0], say=False)
        except ShardwiseError:
            return  # an Accelerator tells it, on every rank
        for item in fields(self):
            if item.name not in (*_NO_SETTING, "mixed_precision") and getattr(self, item.name) is None:
                self._filled[item.name] = _field_of(config, item.name)
                setattr(self, item.name, self._filled[item.name])
        if not described:
            words = words_of(config)
            del words["bf16"], words["fp16"]  # the Accelerator's to say
            self.open.write({**words, "gradient_accumulation_steps": config.zero.gradient_accumulation_steps or AUTO})

    @classmethod
    def in_force(cls, config: Config) -> DeepSpeedPlugin | None:
        """The settings of a configuration, or None if it has no ZeRO section."""
        if config.deepspeed_config is None and config.distributed_type != "DEEPSPEED":
            return None
        plugin = cls(mixed_precision=config.mixed_precision)
        plugin.adopt(config)
        return plugin

    # A configuration of it.

    def merged_into(self, config: Config, *, say: bool = True) -> Config:
        """`config` with what this plugin says over it. say: log notes, on rank 0. Raises ConfigError."""
        if self._problem is not None:
            raise self._problem
        if self.enable_msamp:
            raise ConfigError("DeepSpeedPlugin: enable_msamp: fp8 is not supported. Take mixed_precision bf16.")
        below = below_a_plugin()
        if below is not None and config.distributed_type != "DEEPSPEED":
            config = merged(config, **_zero_keywords(below))
        said = self._said()
        written = self.open.changed()
        told: dict[str, Any] = {}
        if self.open.described or written:
            read = self.open.read(None if self.open.described else written)
            if "mixed_precision" in said and read.values.get("mixed_precision") == "no":
                read.values.pop("mixed_precision")
            told = keywords_of(read)
            if self.open.described and "zero_stage" in said and self.get_value("zero_optimization.stage") is None:
                told.pop("zero_stage", None)
            check_precision(told, said.get("mixed_precision") or config.mixed_precision)
            precision = told.get("mixed_precision") or said.get("mixed_precision") or config.mixed_precision
            if precision == "fp16" and self.open.described:
                told["loss_scale"] = {"growth_interval": LOSS_SCALE_WINDOW, **read.loss_scale}
            if say:
                clips = said.get("gradient_clipping") is not None
                tell(note for note in read.notes if not (clips and "gradient_clipping" in note))
                tell(
                    f"DeepSpeedPlugin: {name} is {said[name]}, and the DeepSpeed configuration says {told[name]}, which holds."
                    for name in said
                    if name in told and str(said[name]) != str(told[name])
                )
        if "zero_stage" not in {**said, **told}:
            said["zero_stage"] = config.zero.zero_stage if config.deepspeed_config is not None else 2
        return merged(config, **{**said, **told})

    def taken(self, config: Config) -> Config:
        """`config` with what the script has written into `deepspeed_config` since it was last looked at.

        Raises ConfigError for what cannot change once an Accelerator is made, and for what is wrong.
        """
        written = self.open.changed()
        if not written:
            return config
        read = self.open.read(written)
        told = keywords_of(read)
        precision = told.pop("mixed_precision", config.mixed_precision)
        if precision != config.mixed_precision or read.loss_scale:
            raise ConfigError(
                "deepspeed_config: bf16 and fp16 were changed after Accelerator(), which computes in "
                f"{config.mixed_precision}. Write them into the plugin before the Accelerator is made."
            )
        tell(note for note in read.notes if "gradient_clipping" not in note)
        steps = told.pop("gradient_accumulation_steps", None)
        values = merged(config, **told).to_values()
        for key, (section, name) in _UNSAID.items():
            if key in written and written[key] in (None, AUTO):
                values.get(section, {}).pop(name, None)
        if steps is not None:  # over the configuration's too, which the script has read there
            values.setdefault("deepspeed_config", {})["gradient_accumulation_steps"] = steps
        changed = checked(values, lambda key: f"deepspeed_config: {key[-1]}")
        self.open.look()
        return changed

    def adopt(self, config: Config, steps: int | None = None) -> None:
        """Show these settings, which are in force, in the fields and in `deepspeed_config`. steps: of accumulation."""
        self._filled = {}
        for item in fields(self):
            if item.name not in (*_NO_SETTING, "mixed_precision"):
                setattr(self, item.name, _field_of(config, item.name))
        self.gradient_accumulation_steps = steps or config.gradient_accumulation_steps
        self.open.write({**words_of(config), "gradient_accumulation_steps": self.gradient_accumulation_steps})
        self.config = config

    def _said(self) -> dict[str, Any]:
        """Our key -> value, of the fields that say something."""
        found = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _NO_SETTING or value in (None, AUTO) or value == self._filled.get(item.name):
                continue
            found[_KEYS.get(item.name, item.name)] = value
        return found

    def fill(self, given: Mapping[str, Any]) -> None:
        """Put what `prepare` has found out, by dotted key, where `deepspeed_config` says "auto"."""
        self.open.fill(given)

    # The configuration, as accelerate's plugin shows it.

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """The configuration in DeepSpeed's words; writing into it counts."""
        if self._problem is not None:
            raise self._problem
        return self.open.words.config

    @deepspeed_config.setter
    def deepspeed_config(self, values: dict[str, Any]) -> None:
        self.open.words.config = values

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """What the configuration says under a dotted key."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether a dotted key is still "auto"."""
        return bool(self.get_value(ds_key_long) == AUTO)

    def fill_match(
        self, ds_key_long: str, mismatches: list[str] | None = None, must_match: bool = True, **kwargs: Any
    ) -> None:
        """Put `kwargs[ds_key_long]` where the key is "auto"; else note in `mismatches`, if it must match, that it differs."""
        fill_match(
            self.hf_ds_config, ds_key_long, [] if mismatches is None else mismatches, kwargs, must_match=must_match
        )

    def deepspeed_config_process(
        self,
        prefix: str = "",
        mismatches: list[str] | None = None,
        config: dict[str, Any] | None = None,
        must_match: bool = True,
        **kwargs: Any,
    ) -> None:
        """`fill_match` for every key. Raises ConfigError for an "auto" that nobody gives, and for values that differ."""
        found = [] if mismatches is None else mismatches
        for key in keys_of(self.deepspeed_config if config is None else config, prefix):
            self.fill_match(key, found, must_match=must_match, **kwargs)
        if found and not prefix:
            raise ConfigError(
                f"{'; '.join(found)}. Make them the same, or write 'auto' in the DeepSpeed configuration."
            )

    def set_mixed_precision(self, mixed_precision: str) -> None:
        """Write a precision into the configuration, where it says nothing or "auto". Raises ConfigError if it says another."""
        config = self.deepspeed_config
        if mixed_precision not in ("no", "fp16", "bf16"):
            raise ConfigError(f"set_mixed_precision: {mixed_precision!r} is not one of no, fp16, bf16.")
        for name in ("fp16", "bf16"):
            section = config.setdefault(name, {"enabled": mixed_precision == name})
            if section.get("enabled") == AUTO:
                section["enabled"] = mixed_precision == name
            if section.get("enabled") is True and mixed_precision not in ("no", name):
                check_precision({"mixed_precision": name}, mixed_precision)

    # Models that are built while it is in force.

    def is_zero3_init_enabled(self) -> bool:
        """Whether from_pretrained and from_config build without memory."""
        return bool(self.zero3_init_flag)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Inside, models are built without memory (at stage 3), or with enable=False whole, whatever `zero3_init_flag` says."""
        before = self.zero3_init_flag
        self.zero3_init_flag = enable
        try:
            with built_without_memory(enable and self.zero_stage == 3):
                yield
        finally:
            self.zero3_init_flag = before

    def set_deepspeed_weakref(self) -> None:
        """Let from_pretrained and from_config build as this plugin says, from now on."""
        build_without_memory(bool(self.zero3_init_flag) and self.zero_stage == 3)

    def set_moe_leaf_modules(self, model: nn.Module) -> None:
        """Nothing is to be done for experts; PrepareError if the model has no module of a class that is named."""
        names = [name.strip() for name in (self.transformer_moe_cls_names or "").split(",") if name.strip()]
        known = {type(module).__name__ for module in model.modules()}
        missing = [name for name in names if name not in known]
        if missing:
            raise PrepareError(
                f"transformer_moe_cls_names: {', '.join(missing)}: this {type(model).__name__} has no module of this class."
            )

    # One of several.

    def select(self, _from_accelerator_state: bool = False) -> None:
        """Make this the plugin in force: for `AcceleratorState.select_deepspeed_plugin`. Raises ConfigError elsewhere."""
        if not _from_accelerator_state:
            raise ConfigError(
                "DeepSpeedPlugin.select: call AcceleratorState().select_deepspeed_plugin(name), which knows the others."
            )
        self._selected = True
        self.set_deepspeed_weakref()

    def _unselect(self) -> None:
        self._selected = False

    @property
    def selected(self) -> bool:
        """Whether this plugin is the one in force."""
        return self._selected

    @selected.setter
    def selected(self, value: bool) -> None:
        raise NotImplementedError("DeepSpeedPlugin.selected: call AcceleratorState().select_deepspeed_plugin(name).")


def _field_of(config: Config, name: str) -> Any:
    if name == "gradient_accumulation_steps":
        return config.gradient_accumulation_steps
    value = value_of(config, _KEYS.get(name, name))
    return ",".join(value) if name == "transformer_moe_cls_names" and value else value


def _zero_keywords(config: Config) -> dict[str, Any]:
    """What a configuration says of ZeRO beside the defaults, as keywords of `merged`."""
    values = config.to_values()
    precision = {"mixed_precision": config.mixed_precision} if config.mixed_precision != "no" else {}
    return {**values.get("deepspeed_config", {}), **values.get("shardwise_config", {}), **precision}
