"""`save_pretrained` and `push_to_hub` of transformers' and peft's models, for those that are sharded.

Without a state dict a save is collective: every rank calls it, the weights are gathered unit by unit, rank 0 writes, and an
error there is every rank's. What is written is the libraries' business: they run as always, on whole tensors that stand in for
the parameters. A model of transformers that they would write as it is goes to the files unit by unit instead.

With a state dict there is nothing to gather, and a rank that is given one, be it empty, does nothing with the others: in

    state = accelerator.get_state_dict(model)                        # {} on every rank but the first
    model.save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=state)

and in the same below `if accelerator.is_main_process:`. A rank that is given None cannot know what the first rank was given, so
it asks (see `ranks/words.py`): where that was a state dict, there is nothing to do.

    rank 0   others      what happens
    given    given       rank 0 writes its own, nobody waits          also where the others do not come
    given    None        the same
    None     None        collective
    None     given       ConfigError on the ranks without: whose is the state?
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, RankError
from ..files.names import below
from ..ranks.agreeing import attempt_or_interrupt
from ..ranks.ranks import Ranks
from ..zero.sharded import ShardedModel
from .adapters import Contents, contents_of, is_saved_as_adapters, on_whole, readable_state, state_of, undisturbed
from .export import refuse_empty
from .stream import save_streamed

# Arguments of save_pretrained under which transformers writes the weights as they are; it ignores the last.
_PLAIN = {"save_directory", "is_main_process", "max_shard_size", "safe_serialization", "save_function"}

# id(model) -> how far rank 0 has come in the model's `push_to_hub`: "before" the save, in it ("saving"), behind it ("saved").
_pushing: dict[int, str] = {}


def save_pretrained(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `model.save_pretrained(*args, **kwargs)` does, `model` being the prepared one or a part of it."""
    named = _by_name(original, args, kwargs)
    said = "state_dict" in named
    state = named.pop("state_dict", None)
    if _pushing.get(id(model)) == "before":
        _pushing[id(model)] = "saving"
        sharded.ranks.agree(None)
        sharded.ranks.broadcast_object({key: value for key, value in named.items() if key != "save_directory"})
        result = _save_collectively(sharded, original, model, named)
        _pushing[id(model)] = "saved"
        return result
    folder = os.path.abspath(named["save_directory"])
    if isinstance(state, Mapping):
        sharded.ranks.words.say(sharded.ranks.words.place(_VERB), f"{_GIVEN}{folder}")
        if _writes_given(sharded, state, named):
            _save_given(sharded, original, model, state, named)
        return None
    if not _is_for_all(sharded.ranks, folder, said=said):
        return None
    return _save_collectively(sharded, original, model, named)


def push_to_hub(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `model.push_to_hub(*args, **kwargs)` does, on rank 0 alone: the others take part in the save inside of it.

    Gives what it gives on rank 0, None elsewhere. Collective; an error is every rank's.
    """
    ranks = sharded.ranks
    if ranks.rank != 0:
        ranks.agree(None)  # rank 0 has come to the save, or has failed before
        named = {**ranks.broadcast_object(None), "save_directory": os.devnull, "is_main_process": False}
        _save_collectively(sharded, original, model, named)
        ranks.agree(None)
        return None
    _pushing[id(model)] = "before"
    try:
        result, error = attempt_or_interrupt(lambda: original(*args, **kwargs))
    finally:
        reached = _pushing.pop(id(model))
    if error is not None and reached == "saving":
        raise error  # the save has let the others know
    ranks.agree(error)
    return result


def _by_name(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(original)
    named = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    if named.get("distributed_checkpoint"):
        raise ConfigError(
            "save_pretrained: distributed_checkpoint is for models that transformers has sharded itself. Leave it out, or save "
            "the run with accelerator.save_state."
        )
    return named


# With a state dict.

_VERB = "save_pretrained"
_GIVEN, _NOT_GIVEN = "given for ", "not given"
_ALONE = (
    "Without a state_dict every rank has to call it. To save on one alone, pass the state_dict that "
    "accelerator.get_state_dict gives, which every rank has to call."
)


def _is_for_all(ranks: Ranks, folder: str, *, said: bool) -> bool:
    """On a rank without a state dict: whether this is a save of all ranks. Else rank 0 has one, and there is nothing to do.

    said: the script passed state_dict, as None. One that did not means rank 0's next save without a state dict, unless rank 0
    was given one for this very directory.
    Raises ConfigError if another rank has one and rank 0 has not, RankError if a rank does not come.
    """
    if ranks.world_size == 1:
        return True
    try:
        verdict = _verdict(ranks, folder, said=said)
    except RankError as error:
        raise RankError(f"{error} {_ALONE}") from error
    if verdict is not None and verdict >= 0:
        raise ConfigError(
            f"save_pretrained: rank {verdict} was given a state_dict, and rank 0 none. Rank 0 writes: give it the one of "
            "accelerator.get_state_dict, or leave state_dict out on every rank."
        )
    return verdict is not None


def _verdict(ranks: Ranks, folder: str, *, said: bool) -> int | None:
    """None if rank 0 was given a state dict, else another rank that was, or -1."""
    words = ranks.words
    place = words.place(_VERB)
    if ranks.rank == 0:
        words.say(place, _NOT_GIVEN)
        others = words.heard(place, range(1, ranks.world_size), f"{_VERB}: {_ALONE}")
        verdict = str(next((rank for rank, word in enumerate(others, start=1) if word != _NOT_GIVEN), -1))
        words.say(f"{place}/verdict", verdict)
    else:
        word = words.heard(place, [0])[0]
        while not said and word not in (_NOT_GIVEN, f"{_GIVEN}{folder}"):
            place = words.place(_VERB)
            word = words.heard(place, [0])[0]
        if word != _NOT_GIVEN:
            return None
        words.say(place, _NOT_GIVEN)
        verdict = words.heard(f"{place}/verdict", [0])[0]
    return int(verdict)


def _writes_given(sharded: ShardedModel, state: Mapping[str, Any], named: Mapping[str, Any]) -> bool:
    """Rank 0, unless its script says otherwise; another one only if its script says so and there is something to write."""
    if sharded.ranks.rank == 0:
        return bool(named.get("is_main_process", True))
    return bool(state) and bool(named.get("is_main_process", False))


def _save_given(
    sharded: ShardedModel, original: Callable[..., Any], model: Any, state: Mapping[str, Any], named: dict[str, Any]
) -> None:
    """Write `state` on this rank, without communication."""
    state = _part(sharded, model, state)
    own = {id(member.parameter): member for member in sharded.whole.members()}
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        member = own.get(id(parameter))
        if member is not None and name in state and tuple(state[name].shape) == member.shape:
            values[member.name] = state[name]
    missing = "is needed to save this model, and is not in the state_dict that was given."

    if is_saved_as_adapters(model):
        contents = _ask(sharded, model, named)
        on_whole(sharded, values, lambda: _check_adapters(sharded, model, named, contents, state), missing)
    elif not state and not _is_placeholder():
        raise CheckpointError(f"save_pretrained: the state_dict for {named['save_directory']} is empty.")
    refuse_empty({name: value for name, value in state.items() if isinstance(value, Tensor)})
    on_whole(sharded, values, lambda: original(state_dict=state, **named), missing)


def _is_placeholder() -> bool:
    """Whether an empty state dict may be meant: transformers' Trainer writes a file of none under a DeepSpeed configuration of
    stage 3 without 16-bit saves, takes it away again, and has the engine save its checkpoint.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    return integration is not None and bool(integration.is_deepspeed_zero3_enabled())


def _check_adapters(
    sharded: ShardedModel,
    model: Any,
    named: Mapping[str, Any],
    contents: Mapping[str, Contents],
    state: Mapping[str, Any],
) -> None:
    """Raise CheckpointError unless `state` has every tensor that peft keeps of these adapters."""
    for adapter, expected in contents.items():
        try:
            with undisturbed(model):
                found = state_of(sharded, model, adapter, named.get("save_embedding_layers", "auto"), state)
        except KeyError as error:
            raise CheckpointError(
                f"save_pretrained: the state_dict has no {error}, which belongs to the adapter {adapter!r}."
            ) from error
        absent = sorted(expected.names - found.keys())
        if absent:
            raise CheckpointError(
                f"save_pretrained: the state_dict holds {len(expected.names) - len(absent)} of the {len(expected.names)} "
                f"tensors of the adapter {adapter!r}; {absent[0]} is missing. Leave state_dict out, or take "
                "accelerator.get_state_dict(model); name the adapters that it has in selected_adapters."
            )


# Without.


def _save_collectively(sharded: ShardedModel, original: Callable[..., Any], model: Any, named: dict[str, Any]) -> Any:
    if is_saved_as_adapters(model):
        return _save_adapters(sharded, original, model, named)
    if _is_plain(model, named):
        return _stream(sharded, model, **{key: value for key, value in named.items() if key != "save_function"})
    state = sharded.state_dict()
    return _on_first(sharded, named, lambda: original(state_dict=_part(sharded, model, state), **named))


def _on_first(sharded: ShardedModel, named: Mapping[str, Any], write: Callable[[], Any]) -> Any:
    """Run `write` on rank 0, if its script calls it a main process, and agree on how it went."""
    here = sharded.ranks.rank == 0 and named.get("is_main_process", True)
    return sharded.ranks.together(lambda: write() if here else None)


def _save_adapters(sharded: ShardedModel, original: Callable[..., Any], model: Any, named: dict[str, Any]) -> Any:
    asked = _on_first(sharded, named, lambda: _ask(sharded, model, named))
    contents: dict[str, Contents] = sharded.ranks.broadcast_object(asked) or {}
    needed = {name for found in contents.values() for name in (*found.weights.values(), *found.reads)}
    tensors = sharded.whole.on_first(needed.__contains__)

    def write() -> Any:
        refuse_empty(tensors)
        return on_whole(
            sharded, tensors, save, "was not gathered for this save: a fault of shardwise; please report it."
        )

    def save() -> Any:
        state = readable_state(sharded, model)
        return original(**named, **({} if state is None else {"state_dict": state}))

    return _on_first(sharded, named, write)


def _ask(sharded: ShardedModel, model: Any, named: Mapping[str, Any]) -> dict[str, Contents]:
    """What the adapters that are to be saved consist of, with nothing in the way of writing them."""
    if hasattr(model, "active_peft_config"):
        chosen = named.get("selected_adapters")
        adapters = [name for name in model.peft_config if chosen is None or name in chosen]
    else:
        adapters = model.active_adapters()
    for adapter in adapters:
        below(Path(named["save_directory"]), adapter, "the adapter")
    contents = contents_of(sharded, model, adapters, named.get("save_embedding_layers", "auto"))
    for adapter, found in contents.items():
        if not found.names:
            raise CheckpointError(
                f"the adapter {adapter!r} has no tensor that peft would save: an empty file is not written."
            )
    return contents


def _part(sharded: ShardedModel, model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` by the names of `model`, a part of the prepared model by whose names it may be."""
    prefix = _prefix(sharded, model)
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return own or dict(state)


def _prefix(sharded: ShardedModel, model: nn.Module) -> str:
    found = next(name for name, module in sharded.model.named_modules() if module is model)
    return f"{found}." if found else ""


def _is_plain(model: Any, named: Mapping[str, Any]) -> bool:
    """Whether transformers would write the weights as they are: nothing quantized, converted, renamed or uploaded."""
    if set(named) - _PLAIN or not named.get("safe_serialization", True):
        return False
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_auto_class", None) is not None:
        return False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # before transformers 5 there are none
            return True
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return not conversions


def _stream(
    sharded: ShardedModel,
    model: Any,
    *,
    save_directory: Any,
    is_main_process: bool = True,
    max_shard_size: int | str = "50GB",
    safe_serialization: bool = True,
) -> None:
    """What `PreTrainedModel.save_pretrained` writes, with the weights unit by unit."""
    main = sharded.ranks.rank == 0 and is_main_process

    def write_configurations() -> None:
        os.makedirs(save_directory, exist_ok=True)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(save_directory)
        if model.can_generate():
            model.generation_config.save_pretrained(save_directory)

    sharded.ranks.together(lambda: write_configurations() if main else None)
    prefix = _prefix(sharded, model)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())

    def rename(name: str) -> str | None:
        short = name.removeprefix(prefix)
        return short if name.startswith(prefix) and short not in ignored else None

    save_streamed(sharded, save_directory, max_shard_size=max_shard_size, rename=rename, here=main)
