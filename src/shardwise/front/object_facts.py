"""What the ranks must have in common of what they prepare, as plain JSON values by the name that an error gives them.

Two ranks whose models differ in a shape wait for each other; two whose learning rates or dropouts differ train on, and the
weights are nobody's. So everything that a rank can tell of an object without reading its numbers is compared: names, shapes,
dtypes and who is trained, a library module's own numbers, an optimizer's groups, a schedule's constants, a loader's lengths.
"""

from __future__ import annotations

import functools
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ..config.agreement import OBJECTS, Difference, disagreement
from ..data.prepare import DataLoaderConfiguration
from ..errors import PrepareError
from ..run.deepspeed_schedules import Schedule
from ..run.scheduler import SCHEDULERS, Scheduler
from ..step.comparing import plain
from .prepare_checks import batch_size_of

logger = logging.getLogger("shardwise")

# How the name of a fact begins that is worth a warning only: ranks may draw data of their own on purpose.
CONTENTS = "the contents of the data set of "
_MOST_NBYTES, _MOST_ITEMS = 1 << 20, 10_000


def facts_of(
    objects: Sequence[Any], prepared: Iterable[nn.Module], settings: DataLoaderConfiguration
) -> dict[str, Any]:
    """The facts of all objects of one call. prepared: models of earlier ones, whose parameters an optimizer may have."""
    kinds = [_kind(item) for item in objects]
    often = Counter(kinds)
    found: dict[str, Any] = {OBJECTS: kinds}
    models = [*prepared, *(item for item in objects if isinstance(item, nn.Module))]
    for place, (item, kind) in enumerate(zip(objects, kinds, strict=True)):
        label = kind if often[kind] == 1 else f"{kind} (argument {place})"
        if isinstance(item, nn.Module):
            found |= _of_model(item, label)
        elif isinstance(item, Optimizer):
            found |= _of_optimizer(item, label, models)
        elif isinstance(item, DataLoader):
            found |= _of_loader(item, label, settings)
        elif isinstance(item, SCHEDULERS):
            found |= {f"{name} of {label}": value for name, value in _of_scheduler(item).items()}
    return found


def refuse_or_warn(differing: Sequence[Difference], *, say: bool) -> None:
    """Raise PrepareError for what would let ranks wait or train apart; log, if this rank is to `say` it, what may be meant."""
    hard = [difference for difference in differing if not difference.key.startswith(CONTENTS)]
    if hard:
        remedy = "Build the same model in the same way on every rank, and the same optimizer; `prepare` divides them."
        raise PrepareError(disagreement("`prepare` got different objects on {ranks}", hard, remedy))
    if differing and say:
        logger.warning(
            "%s. `prepare` divides one data set: some of its samples will be read twice, others never. Draw and split data "
            "with the same seed on every rank.",
            "; ".join(map(str, differing)),
        )


def _kind(item: Any) -> str:
    """The class, of what `prepare` does something with; what passes through may be anything."""
    known = isinstance(item, (nn.Module, Optimizer, DataLoader, *SCHEDULERS))
    return type(item).__name__ if known else "another object"


def _of_model(model: nn.Module, label: str) -> dict[str, Any]:
    parameters = list(model.parameters())
    elements, trained = sum(p.numel() for p in parameters), sum(p.requires_grad for p in parameters)
    found: dict[str, Any] = {
        f"the number of parameters of {label}": f"{len(parameters)} with {elements} elements, {trained} of them trained"
    }
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same = first.setdefault(id(parameter), name)
        text = f"{_form(parameter)} {'trained' if parameter.requires_grad else 'frozen'}"
        found[f"{name} of {label}"] = text if same == name else f"tied to {same}"
    for name, buffer in model.named_buffers():
        found[f"buffer {name} of {label}"] = _form(buffer)
    for name, module in model.named_modules():
        kind = type(module)
        found[f"the class of {name or 'the root'} of {label}"] = kind.__qualname__
        package = sys.modules.get(kind.__module__.split(".")[0])
        version = getattr(package, "__version__", None)
        if package is None or not isinstance(version, str):
            continue  # a script's own module, which may keep its rank or a time
        found.setdefault(f"{package.__name__} version", version)
        for key, value in vars(module).items():
            numbers = {key: value} if isinstance(value, float) else _floats(key, value)
            found |= {f"{number} of {name or 'the root'} of {label}": value for number, value in numbers.items()}
    return found


def _form(tensor: Tensor) -> str:
    memory = " without memory" if tensor.is_meta else ""
    # A nested tensor has no shape; whether it can be prepared is for others to say.
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}{memory}"


def _floats(key: str, value: Any) -> dict[str, float]:
    """PEFT's numbers are in dictionaries, by adapter."""
    if not isinstance(value, dict):
        return {}
    return {f"{key}[{name!r}]": number for name, number in value.items() if isinstance(number, float)}


def _of_optimizer(optimizer: Optimizer, label: str, models: Iterable[nn.Module]) -> dict[str, Any]:
    names = {id(parameter): name for model in models for name, parameter in model.named_parameters()}
    found: dict[str, Any] = {f"the number of groups of {label}": len(optimizer.param_groups)}
    for number, group in enumerate(optimizer.param_groups):
        found[f"the number of parameters in group {number} of {label}"] = len(group["params"])
        for option, value in group.items():
            if option not in ("params", "param_names"):
                found[f"{option} of group {number} of {label}"] = plain(value)
        for parameter in group["params"]:
            if id(parameter) in names:
                found[f"the group of {names[id(parameter)]} in {label}"] = number
    return found


def _of_scheduler(scheduler: Scheduler) -> dict[str, Any]:
    """Its constants; of the functions of a LambdaLR what they were made with, which is where the number of steps is."""
    held = vars(scheduler) if isinstance(scheduler, Schedule) else scheduler.state_dict()
    found = {str(name): plain(value) for name, value in held.items() if name != "optimizer"}
    functions = getattr(scheduler, "lr_lambdas", None)
    if functions:
        found["lr_lambdas"] = [_made_with(function) for function in functions]
    return found


def _made_with(function: Any) -> Any:
    if isinstance(function, functools.partial):
        return [_made_with(function.func), plain(function.args), plain(function.keywords)]
    closed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    name = getattr(function, "__qualname__", type(function).__name__)
    return [name, plain(getattr(function, "__defaults__", None)), plain(closed)]


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _of_loader(loader: DataLoader[Any], label: str, settings: DataLoaderConfiguration) -> dict[str, Any]:
    if settings.dispatch_batches or isinstance(loader.dataset, IterableDataset):
        return {}  # only rank 0's is read
    try:
        length = f"{len(loader)} batches of a data set of {len(loader.dataset)}"  # type: ignore[arg-type]
    except TypeError:
        return {}
    found = {
        f"the length of {label}": length,
        f"the batch size of {label}": batch_size_of(loader),
        f"drop_last of {label}": loader.drop_last,
    }
    contents = _contents(loader.dataset)
    return found if contents is None else found | {f"{CONTENTS}{label}": f"{contents:08x}"}


def _contents(data: Any) -> int | None:
    """A checksum of data that lies in memory; None for any other, of which an item may be read from a disk, or drawn."""
    if isinstance(data, Tensor) and data.device.type == "cpu" and data.layout == torch.strided:
        start = data.detach().reshape(-1)[: _MOST_NBYTES // max(1, data.element_size())]
        # A copy: a storage that numpy has seen keeps its size for good.
        return zlib.crc32(start.clone().view(torch.uint8).numpy().tobytes())
    if isinstance(data, TensorDataset):
        return _together(_contents(tensor) for tensor in data.tensors)
    if isinstance(data, Subset):
        return _together((_contents(data.indices), _contents(data.dataset) or 0))
    if isinstance(data, (list, tuple, range)) and all(
        isinstance(item, (int, float, str)) for item in data[:_MOST_ITEMS]
    ):
        return zlib.crc32(repr(list(data[:_MOST_ITEMS])).encode())
    return None


def _together(sums: Iterable[int | None]) -> int | None:
    given = list(sums)
    return None if None in given else zlib.crc32(repr(given).encode())
