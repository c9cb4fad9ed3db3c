"""Which modules form a unit: what is gathered and released together, usually one transformer block.

    model                          spine: its ancestors-of-blocks hold the root unit, whole during a pass
    ├── embed_tokens               side: a large subtree without blocks is a unit of its own
    ├── layers.0, layers.1, ...    blocks
    ├── norm                       a small subtree without blocks joins the root unit
    └── lm_head                    side

Blocks are named by the user, else by the model (the classes transformers lists as not to be split), else found: the
outermost ModuleLists whose children are all of one class. A parameter that modules of several units use (tied
embeddings) forms a unit with all of those modules as its entries; one that the spine uses too joins the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn
from torch.nn import Parameter

from ..errors import PrepareError

# Elements. A subtree below this joins the root unit: a collective of its own would cost more than keeping it whole
# during a pass. 4 Mi elements of bf16 are 8 MiB, about 40 us of NVLink and half of what it costs the host to gather.
SIDE_UNIT_MIN_NUMEL = 1 << 22

ROOT = "(root)"


@dataclass
class UnitSpec:
    """entries: the modules that need the unit's weights when they run. parameters: name in the model -> Parameter.

    in_turn: whether the entries are blocks that run one after another, so that the first one's backward is the last.
    """

    name: str
    entries: list[nn.Module]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    in_turn: bool = False


@dataclass(frozen=True)
class FoundUnits:
    """Where the parameters of one model belong, before neighbouring blocks share a unit: looked for once, used by whoever asks.

    specs:  the units, root first; nobody changes them.
    blocks: the outermost blocks, with their paths.
    named:  whether the user has named the blocks, which then stay apart.
    """

    specs: tuple[UnitSpec, ...]
    blocks: dict[nn.Module, str]
    named: bool

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str] | None = None) -> FoundUnits:
        """Look through the model. The arguments and errors are those of `find_units`."""
        blocks = _blocks(model, names)
        return cls(tuple(_specs(model, blocks)), blocks, names is not None)

    @cached_property
    def repeated(self) -> list[nn.Module]:
        """Modules of a class that repeats, each a unit of its own, in the model's order."""
        alone = [spec.entries[0] for spec in self.specs if spec.name != ROOT and len(spec.entries) == 1]
        often = Counter(type(module) for module in alone)
        return [module for module in alone if often[type(module)] > 1]

    def within(self, unit_nbytes: int) -> list[UnitSpec]:
        """The units, of which neighbouring blocks that were found share one of at most `unit_nbytes`."""
        if self.named or unit_nbytes == 0:
            return list(self.specs)
        return _grouped(self.specs, self.blocks, unit_nbytes)


def find_units(
    model: nn.Module,
    names: Sequence[str] | FoundUnits | None = None,
    *,
    unit_nbytes: int = 0,
) -> list[UnitSpec]:
    """Group the model's parameters into units; every parameter with elements is in exactly one.

    names:       block classes (`LlamaDecoderLayer`) or module paths with wildcards (`model.layers.*`); None finds them;
                 or what was found of this model before.
    unit_nbytes: neighbouring blocks that were found, not named, share a unit of at most this many bytes.
    Returns the units in the order in which the model defines them, root first.
    Raises PrepareError if a name matches no module.
    """
    found = names if isinstance(names, FoundUnits) else FoundUnits.of(model, names)
    return found.within(unit_nbytes)


def _specs(model: nn.Module, blocks: dict[nn.Module, str]) -> list[UnitSpec]:
    spine = _spine(model, blocks)
    homes: dict[nn.Module, str] = dict(blocks)
    for path, module in model.named_modules():
        if module in spine:
            for child_name, child in module.named_children():
                if child not in spine and child not in homes and _numel(child) >= SIDE_UNIT_MIN_NUMEL:
                    homes[child] = f"{path}.{child_name}" if path else child_name
    owners = _owners(model, homes)

    units: dict[frozenset[int], UnitSpec] = {frozenset([id(model)]): UnitSpec(ROOT, list(spine))}
    for module, name in homes.items():
        units[frozenset([id(module)])] = UnitSpec(name, [module])
    modules = {id(module): module for module in (*homes, model)}
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        key = frozenset(owners[id(parameter)])
        if id(model) in key:
            key = frozenset([id(model)])
        if key not in units:
            units[key] = UnitSpec(f"shared:{name}", [modules[i] for i in owners[id(parameter)]])
        units[key].parameters[name] = parameter
    order = {id(module): index for index, module in enumerate(model.modules())}
    found = [unit for unit in units.values() if unit.parameters]
    found.sort(key=lambda unit: -1 if unit.name == ROOT else min(order[id(entry)] for entry in unit.entries))
    return found


def _grouped(units: Sequence[UnitSpec], blocks: dict[nn.Module, str], unit_nbytes: int) -> list[UnitSpec]:
    """Join neighbouring units of blocks of one class. Each gather costs the host the same, however small it is."""
    grouped: list[UnitSpec] = []
    room = 0
    for unit in units:
        previous = grouped[-1] if grouped else None
        nbytes = sum(p.numel() * p.element_size() for p in unit.parameters.values())
        if (
            previous is not None
            and nbytes <= room
            and len(unit.entries) == 1
            and unit.entries[0] in blocks
            and type(unit.entries[0]) is type(previous.entries[-1])
        ):
            grouped[-1] = UnitSpec(
                previous.name,
                [*previous.entries, *unit.entries],
                {**previous.parameters, **unit.parameters},
                in_turn=True,
            )
            room -= nbytes
        else:
            grouped.append(unit)
            room = unit_nbytes - nbytes if unit.entries[0] in blocks and len(unit.entries) == 1 else 0
    return grouped


def _blocks(model: nn.Module, names: Sequence[str] | None) -> dict[nn.Module, str]:
    """The outermost blocks, with their paths."""
    if names is not None:
        return _outermost(model, _named_blocks(model, names))
    classes: set[str] = set()
    for module in model.modules():
        declared = getattr(module, "_no_split_modules", None)
        if isinstance(declared, (list, tuple, set)):
            classes.update(declared)
    chosen = [m for m in model.modules() if type(m).__name__ in classes and m is not model]
    # A class that occurs once, such as an embedding block, is not worth a unit if it is small; the side rule sees to it.
    repeated = {cls for cls in {type(m) for m in chosen} if sum(type(m) is cls for m in chosen) > 1}
    if any(type(m) in repeated for m in chosen):
        return _outermost(model, [m for m in chosen if type(m) in repeated])
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    uniform = [m for m in lists if len({type(child) for child in m}) == 1 and _numel(m) > 0]
    found = [child for m in uniform for child in m] or chosen
    return _outermost(model, found)


def _named_blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    found = []
    known = {type(m).__name__ for m in model.modules()}
    for name in names:
        matches = [
            m
            for path, m in model.named_modules()
            if m is not model and (type(m).__name__ == name or fnmatchcase(path, name))
        ]
        if not matches:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise PrepareError(
                f"units: {name!r} is neither the class nor the path of a module of {type(model).__name__}.{hint}"
            )
        found.extend(matches)
    return found


def _outermost(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    chosen = set(modules)
    paths = {module: path for path, module in model.named_modules() if module in chosen}
    inner = {below for module in paths for below in module.modules() if below is not module}
    return {module: path for module, path in paths.items() if module not in inner and _numel(module) > 0}


def _spine(model: nn.Module, blocks: dict[nn.Module, str]) -> dict[nn.Module, None]:
    """The model and every module that contains a block, in the model's order."""
    return {
        m: None
        for m in model.modules()
        if m is model or any(below in blocks for below in m.modules() if below is not m and m not in blocks)
    }


def _owners(model: nn.Module, homes: dict[nn.Module, str]) -> dict[int, list[int]]:
    """Parameter id -> ids of the homes that hold it, the model itself for what lies outside every home."""
    owners: dict[int, list[int]] = {}

    def visit(module: nn.Module, home: nn.Module, seen: set[tuple[int, int]]) -> None:
        home = module if module in homes else home
        if (id(module), id(home)) in seen:
            return
        seen.add((id(module), id(home)))
        for parameter in module._parameters.values():
            if parameter is not None and id(home) not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(id(home))
        for child in module.children():
            visit(child, home, seen)

    visit(model, model, set())
    return owners


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
