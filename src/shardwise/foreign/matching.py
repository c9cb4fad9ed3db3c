"""Which weight each of an optimizer's states belongs to, where a file numbers them and does not name them.

The numbers count through the parameter groups in the order in which a script made them. A file that keeps the model's own order
(a pickled state dict) has each group as a subsequence of its tensors; one that sorts them (safetensors) tells shapes alone.

    file     embed (61, 8)  q (8, 8)  k (8, 8)  norm (8,)         states of group 0: (61, 8) (8, 8) (8, 8)    embed, q, k
                                                                 states of group 0: (61, 8) (8, 8)           q or k: refused
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import CheckpointError
from ..files.documents import printed

# None: of a parameter that has taken no step, which fits any weight.
Shape = tuple[int, ...] | None
_SAY = (
    "Say which it is: --names FILE, one name a line, from the script as `names = {p: n for n, p in model.named_parameters()}` "
    "and `[names[p] for group in optimizer.param_groups for p in group['params']]`."
)


def match_named(
    groups: Sequence[Sequence[Shape]], weights: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> list[list[str]]:
    """The names of each group, from `names` through all groups. Raises CheckpointError if they do not fit the shapes."""
    count = sum(len(group) for group in groups)
    if len(names) != count or len(set(names)) != count:
        raise CheckpointError(
            f"{len(names)} name(s) are given, {len(set(names))} of them different, and the optimizer has {count} parameters."
        )
    left = iter(names)
    found = [[(next(left), shape) for shape in group] for group in groups]
    for name, shape in (pair for group in found for pair in group):
        if name not in weights:
            raise CheckpointError(
                f"the model has no weight {printed(name)}, which was given as one that the optimizer trains."
            )
        if shape is not None and shape != weights[name]:
            raise CheckpointError(
                f"{printed(name)} has the shape {weights[name]}, and the optimizer's states at its place have {shape}: the "
                "names are in another order than the optimizer's parameters."
            )
    return [[name for name, _ in group] for group in found]


def match_shapes(
    groups: Sequence[Sequence[Shape]], weights: Mapping[str, tuple[int, ...]], *, in_order: bool
) -> list[list[str]]:
    """The names of each group by shapes alone. in_order: `weights` come as the model has them, else in any order.

    Raises CheckpointError if there is no such assignment, or more than one.
    """
    found = [_by_order(group, weights) if in_order else _by_shape(group, groups, weights) for group in groups]
    taken = [name for group in found for name in group]
    if len(set(taken)) < len(taken):
        twice = next(name for name in taken if taken.count(name) > 1)
        raise CheckpointError(f"two of the optimizer's states fit {printed(twice)}. {_SAY}")
    return found


def _by_shape(
    group: Sequence[Shape], groups: Sequence[Sequence[Shape]], weights: Mapping[str, tuple[int, ...]]
) -> list[str]:
    every = [shape for other in groups for shape in other]
    found = []
    for number, shape in enumerate(group):
        fits = [name for name, own in weights.items() if shape in (own, None)]
        if not fits:
            raise CheckpointError(f"the model has no weight of the shape {shape}, which the optimizer's states have.")
        if len(fits) > 1 or None in every:
            what = "has taken no step" if shape is None else f"has the shape {shape}"
            raise CheckpointError(
                f"parameter {number} of the optimizer {what}, which fits {printed(fits[0])} and {len(fits) - 1} more: the file "
                f"of weights does not keep the model's order. {_SAY}"
            )
        found.append(fits[0])
    return found


def _by_order(group: Sequence[Shape], weights: Mapping[str, tuple[int, ...]]) -> list[str]:
    rows = list(weights.items())
    first = _subsequence(group, rows)
    last = _subsequence(group[::-1], rows[::-1])[::-1]
    odd = next(((a, b) for a, b in zip(first, last, strict=True) if a != b), None)
    if odd is not None:
        raise CheckpointError(f"a state of the optimizer fits {printed(odd[0])} as well as {printed(odd[1])}. {_SAY}")
    return first


def _subsequence(group: Sequence[Shape], rows: Sequence[tuple[str, tuple[int, ...]]]) -> list[str]:
    """The first names whose shapes are those of `group`, in order."""
    found: list[str] = []
    left = iter(rows)
    for shape in group:
        name = next((name for name, own in left if shape in (own, None)), None)
        if name is None:
            raise CheckpointError(
                f"the optimizer's states do not follow the order of the model's weights: after {len(found)} of {len(group)}, "
                f"none is left of the shape {shape}. {_SAY}"
            )
        found.append(name)
    return found
