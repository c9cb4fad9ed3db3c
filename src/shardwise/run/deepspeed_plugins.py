"""Several DeepSpeedPlugins of one Accelerator, of which one is in force: the first, until the script selects another."""

from __future__ import annotations

from typing import Any

from ..config.schema import Config
from ..errors import ConfigError
from .deepspeed_plugin import DeepSpeedPlugin

# What they may differ in, because it counts in each `prepare`, for what is prepared there.
_OF_PREPARE = ("optimizer", "scheduler", "micro_batch_size", "train_batch_size")

Plugins = DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None


def plugins_of(one: Plugins, other: Plugins) -> Plugins:
    """What was given under either name of the argument. Raises ConfigError if both were."""
    if one is not None and other is not None:
        raise ConfigError("Accelerator: deepspeed_plugin and deepspeed_plugins are two names of one argument.")
    return one if other is None else other


def merge_plugins(given: Any, config: Config) -> dict[str, Config]:
    """What each plugin makes of `config`, by its name; {} without plugins. Nothing changes.

    Several plugins may differ in what counts for what is prepared under them: stage, devices, clipping, optimizer and schedule.
    Raises ConfigError for plugins that differ in anything else, and what a plugin raises.
    """
    if given is None:
        return {}
    each: dict[str, Any] = given if isinstance(given, dict) else {"": given}
    if not each:
        raise ConfigError(
            "deepspeed_plugins is an empty dictionary. Give a DeepSpeedPlugin, or leave the argument out."
        )
    for name, plugin in each.items():
        if not isinstance(plugin, DeepSpeedPlugin):
            which = f"deepspeed_plugins[{name!r}]" if isinstance(given, dict) else "deepspeed_plugin"
            raise ConfigError(f"{which} is a {type(plugin).__name__}, and no DeepSpeedPlugin.")
    configs = {name: plugin.merged_into(config) for name, plugin in each.items()}
    first, *others = configs
    for name in others:
        _check_alike(first, configs[first], name, configs[name])
    return configs


def adopted(given: Plugins, configs: dict[str, Config], config: Config, steps: int) -> Plugins:
    """The plugins, which show what is in force from now on; the first of several is selected. Without any, one of `config`."""
    if given is None:
        given = DeepSpeedPlugin.in_force(config)
        configs = {"": config}
    each = given if isinstance(given, dict) else {} if given is None else {"": given}
    for number, (name, plugin) in enumerate(each.items()):
        plugin.adopt(configs[name], steps)
        plugin._selected = number == 0
    return given


def _check_alike(first: str, one: Config, name: str, other: Config) -> None:
    """Raise ConfigError if two plugins of an Accelerator differ in what it has once: precision, accumulation, the engine."""

    def common(config: Config) -> dict[str, Any]:
        values = config.model_dump(mode="json", exclude={"deepspeed_config"})
        values["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        values["shard_group"] = config.zero.shard_group, config.zero.optimizer_shard_group
        for key in _OF_PREPARE:
            del values["shardwise_config"][key]
        return values

    a, b = common(one), common(other)
    differing = [key for key in a if a[key] != b[key]]
    if differing:
        raise ConfigError(
            f"deepspeed_plugins: {first!r} and {name!r} differ in {', '.join(differing)}, which an Accelerator has once. Give "
            "them the same; stage, devices, clipping, optimizer and scheduler may differ."
        )


def selected_plugin(plugins: Plugins) -> DeepSpeedPlugin | None:
    """The one of them that is in force."""
    if not isinstance(plugins, dict):
        return plugins
    return next(plugin for plugin in plugins.values() if plugin.selected)


def plugin_named(plugins: Plugins, name: str) -> DeepSpeedPlugin:
    """The plugin of this name. Raises ConfigError if there is none."""
    if not isinstance(plugins, dict) or name not in plugins:
        known = ", ".join(plugins) if isinstance(plugins, dict) else "none: one plugin was given, without a name"
        raise ConfigError(f"there is no DeepSpeedPlugin {name!r}; known are {known}.")
    return plugins[name]


def select_plugin(plugins: Plugins, name: str | None) -> None:
    """Put the plugin of this name in force, for what is built and prepared from now on. Raises ConfigError if there is none."""
    chosen = plugin_named(plugins, name or "")
    assert isinstance(plugins, dict)
    for plugin in plugins.values():
        plugin._unselect()
    chosen.select(_from_accelerator_state=True)


def get_active_deepspeed_plugin(state: Any) -> DeepSpeedPlugin:
    """The plugin in force of an AcceleratorState or Accelerator. Raises ConfigError in a run without ZeRO settings."""
    plugin: DeepSpeedPlugin | None = state.deepspeed_plugin
    if plugin is None:
        raise ConfigError(
            "this run has no ZeRO settings. Give Accelerator a deepspeed_plugin, or launch with --zero_stage."
        )
    return plugin
