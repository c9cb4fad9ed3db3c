"""YAML as settings need it: plain values, of bounded size however the text refers to itself.

A few hundred bytes of YAML can stand for a billion values (each anchor a list of ten times the anchor before), name themselves,
or nest until the parser fails. Such a text is an error at its line before any value is made of it.
"""

from __future__ import annotations

from typing import Any

import yaml

_NODES = 10_000  # a full file of settings has some two hundred
_DEPTH = 50
_NUMBER_LENGTH = 64


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits. Raises yaml.MarkedYAMLError."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > _NODES or self._depth > _DEPTH:
            what = f"more than {_NODES} values" if self._nodes > _NODES else f"more than {_DEPTH} levels"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"a file of settings has not {what}", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _NUMBER_LENGTH:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {_NUMBER_LENGTH} digits", node.start_mark
            )
        found: int = super().construct_yaml_int(node)
        return found


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def check_expansion(root: yaml.Node) -> None:
    """Raise yaml.MarkedYAMLError if `root`, each alias written out, has too many values, or is part of itself."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise yaml.composer.ComposerError(None, None, "an alias that is part of itself", node.start_mark)
        open_nodes.add(id(node))
        inner: list[Any] = (
            [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        )
        total = 1 + sum(size(child) for child in inner)
        if total > _NODES:
            raise yaml.composer.ComposerError(
                None, None, f"its aliases, written out, are more than {_NODES} values", node.start_mark
            )
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root)
