"""What a rank sends: every call of a process group and every word left in a store, as lines of text.

Recording sits below the library, at the methods of torch's own ProcessGroup and Store, so it does not know which class or file
makes a call. A line is `group collective dtype numel`, such as

    data all_gather float32 536 (blocks.0)
    world reduce_scatter avg float32 536 (blocks.0)
    control all_reduce max uint8 2
    store set shardwise/save_pretrained/#.#/#

and between them what a model says of its own computation, "forward blocks.0" and "backward blocks.0", so that it is pinned
too how far ahead of its use a unit is gathered.

group:  "world" is torch's default group, which reduces gradients; "control" and "data" are those that `wait_for_everyone` and
        `gather` use; "new 1" is the first other one, and so on.
numel:  of the whole, which all_gather makes and reduce_scatter takes.
unit:   in brackets, where the number of elements is that of one part of the model, padded for the ranks: see `parts_of`.

What depends on time, on the machine or on what the process did before is not there: how often a store is asked and what is
tidied up in it, counters in its keys, and how long objects are when they are pickled: an exchange of objects is one line
without a number. Lines of threads beside the main one stand apart, by group, since nothing orders them among the main thread's.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# By the name of ProcessGroup's method; torch renames some from version to version.
COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce_coalesced",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather_list",
    "allgather_coalesced": "all_gather_coalesced",
    "all_gather_single": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single_coalesced": "all_gather_coalesced",
    "allgather_into_tensor_coalesced": "all_gather_coalesced",
    "reduce_scatter": "reduce_scatter_list",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter_coalesced",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_coalesced",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all_list",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
}
STORED = ("set", "add", "append", "compare_set", "multi_set", "queue_push")
# What torch makes of an exchange of objects: their lengths, then their bytes.
OBJECTS = (
    ("all_gather_list int64", "all_gather_list uint8", "all_gather_object"),
    ("broadcast 0 int64", "broadcast 0 uint8", "broadcast_object_list"),
    ("broadcast 1 int64", "broadcast 1 uint8", "broadcast_object_list from 1"),
)
NEIGHBOURS = 4
# Elements: more than the ranks' padding of a part, less than any two parts of a model whose units are named differ by.
PADDING = 384

Phases = dict[str, list[str]]  # what one rank sent in each part of a scenario, in order


class Recorder:
    """Writes down what this process sends while `recording` runs."""

    def __init__(self) -> None:
        self._groups: dict[str, str] = {}
        self._lines: dict[str, list[list[str]]] = {}
        self._phase = ""
        self._lock = threading.Lock()
        self._parts: dict[str, int] = {}
        self._main = threading.get_ident()

    def names(self, group: dist.ProcessGroup, name: str) -> None:
        """Lines of that group carry `name` from now on."""
        self._groups[group.group_name] = name

    def divided(self, model: nn.Module) -> None:
        """Elements of this model's parts are named from now on."""
        self._parts = parts_of(model)

    def begin(self, phase: str) -> None:
        """What is sent from now on belongs to that part of the scenario."""
        self._phase = phase

    def phases(self) -> Phases:
        """All lines by phase; those of other threads under "phase, beside it, group"."""
        return {phase: _objects_in_one(calls) for phase, calls in self._lines.items() if calls}

    def note(self, *words: str) -> None:
        """Write a line down, of one or several words; the first is a group."""
        with self._lock:
            phase = self._phase if threading.get_ident() == self._main else f"{self._phase}, beside it, {words[0]}"
            self._lines.setdefault(phase, []).append(list(words))

    def sent(self, group: dist.ProcessGroup, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Write a call of a ProcessGroup's method down."""
        given = [list(_tensors(arg)) for arg in args[:2]]
        options = next((arg for arg in (*args, *kwargs.values()) if type(arg).__name__.endswith("Options")), None)
        how = COLLECTIVES[method]
        if hasattr(options, "reduceOp"):
            how += f" {str(options.reduceOp.op).rpartition('.')[2].lower()}"
        if hasattr(options, "rootRank"):
            how += f" {options.rootRank}"
        numel = max((sum(t.numel() for t in tensors) for tensors in given), default=0)
        dtype = next((str(t.dtype).removeprefix("torch.") for tensors in given for t in tensors), "")
        name = self._groups.setdefault(
            group.group_name, f"new {1 + sum(n.startswith('new') for n in self._groups.values())}"
        )
        if not dtype:
            self.note(name, how)
            return
        self.note(name, f"{how} {dtype}", f"{numel}{self._unit(numel, dtype)}")

    def _unit(self, numel: int, dtype: str) -> str:
        """In brackets, the part of the model that has so many elements, padded: the largest that is not larger."""
        if dtype not in ("float32", "bfloat16", "float16"):
            return ""
        fits = [(own, part) for part, own in self._parts.items() if own <= numel < own + PADDING]
        return f" ({max(fits)[1]})" if fits else ""


def parts_of(model: nn.Module) -> dict[str, int]:
    """How many elements lie in each block of the model, and outside of blocks; a block is what a list of modules holds.

    Parts that have as many elements as another one are left out.
    """
    blocks = [
        f"{name}.{number}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for number in range(len(module))
    ]
    found: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), "outside")
        found[block] += parameter.numel()
    return {part: own for part, own in found.items() if list(found.values()).count(own) == 1}


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, everything that this process sends is written down."""
    undo: list[tuple[type, str, Any]] = []

    def replace(owner: type, name: str, write: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            write(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, call)

    def sends(method: str) -> Callable[..., None]:
        return lambda group, *args, **kwargs: recorder.sent(group, method, args, kwargs)

    def stores(method: str) -> Callable[..., None]:
        return lambda store, key, *_, **__: recorder.note("store", method, re.sub(r"\d+", "#", str(key)))

    for method in COLLECTIVES:
        if hasattr(dist.ProcessGroup, method):
            replace(dist.ProcessGroup, method, sends(method))
    for method in STORED:
        if hasattr(dist.Store, method):
            replace(dist.Store, method, stores(method))
    try:
        yield
    finally:
        for owner, name, original in undo:
            setattr(owner, name, original)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _objects_in_one(calls: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text; the two calls of an exchange of objects are one, without numbers."""
    lines: list[str] = []
    waiting = list(reversed(calls))
    while waiting:
        call = waiting.pop()
        following = waiting[-1] if waiting else ()
        for first, second, name in OBJECTS:
            if list(call[:1]) == list(following[:1]) and [*call[1:2], *following[1:2]] == [first, second]:
                waiting.pop()
                call = (call[0], name)
                break
        lines.append(" ".join(call))
    return lines


# As data.


def packed(scenarios: Mapping[str, Sequence[Phases]]) -> dict[str, Any]:
    """The transcripts of a file as JSON, by scenario and rank: runs of equal lines counted, equal ranks once.

    A phase that was sent before, in this scenario or an earlier one, is a text: "as step 2 | 2 ranks | stage 3".
    """
    known: dict[tuple[str, ...], str] = {}
    found: dict[str, Any] = {}
    for scenario, ranks in scenarios.items():
        alike = all(own == ranks[0] for own in ranks)
        named = (
            {f"{len(ranks)} ranks": ranks[0]}
            if alike
            else {f"rank {n} of {len(ranks)}": p for n, p in enumerate(ranks)}
        )
        found[scenario] = {}
        for rank, phases in named.items():
            written = found[scenario][rank] = {}
            for phase, lines in phases.items():
                place = f"as {phase} | {rank} | {scenario}"
                earlier = known.setdefault(tuple(lines), place) if len(lines) > 1 else place
                runs = [(line, len(list(group))) for line, group in itertools.groupby(lines)]
                counted = [f"{n} x {line}" if n > 1 else line for line, n in runs]
                written[phase] = counted if earlier == place else earlier
    return found


def unpacked(data: Mapping[str, Any]) -> dict[str, list[Phases]]:
    """What `packed` was given."""
    found: dict[str, list[Phases]] = {}
    for scenario, named in data.items():
        found[scenario] = []
        for rank, written in named.items():
            phases = {phase: _lines(data, lines) for phase, lines in written.items()}
            found[scenario] += [phases] * (int(rank.split()[0]) if rank.endswith(" ranks") else 1)
    return found


def _lines(data: Mapping[str, Any], written: str | list[str]) -> list[str]:
    if isinstance(written, str):
        phase, rank, scenario = written.removeprefix("as ").split(" | ")
        return _lines(data, data[scenario][rank][phase])
    lines: list[str] = []
    for line in written:
        count = re.match(r"(\d+) x ", line)
        lines += [line[count.end() :]] * int(count[1]) if count else [line]
    return lines


def difference(found: Sequence[Phases], wanted: Sequence[Phases]) -> str | None:
    """The first line in which each rank's transcript is another one, with its neighbours; None if they are equal."""
    if len(found) != len(wanted):
        return f"{len(found)} ranks instead of {len(wanted)}"
    texts = []
    for rank, (own, expected) in enumerate(zip(found, wanted, strict=True)):
        for phase in [*expected, *(phase for phase in own if phase not in expected)]:
            text = _first_difference(own.get(phase, []), expected.get(phase, []))
            if text:
                texts.append(f"rank {rank}, in {phase!r}, {text}")
                break
    return "\n".join(texts) or None


def _first_difference(own: Sequence[str], expected: Sequence[str]) -> str | None:
    if own == expected:
        return None
    pairs = enumerate(itertools.zip_longest(own, expected))
    at = next(number for number, (one, other) in pairs if one != other)
    lines = [f"line {at + 1} (of {len(own)}, of {len(expected)} expected):"]
    lines += [f"            {line}" for line in own[max(0, at - NEIGHBOURS) : at]]
    for sign, side in (("found   ", own), ("expected", expected)):
        rest = side[at : at + NEIGHBOURS] or ["(nothing more)"]
        lines += [f"  {sign}  {line}" for line in rest]
    return "\n".join(lines)
