"""Safe YAML: bounded in depth and size, each key once, every problem with its place."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode

MOST_DEPTH = 64
MOST_VALUES = 1_000_000
"""An alias counts as many values as it stands for: nine lines of ten aliases each are a thousand million values."""

_MERGE = "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers in base 8 or 60: 010 is 8, and 1:30 is 90."""


class BoundedLoader(yaml.SafeLoader):
    """Raises only :class:`yaml.YAMLError`, whatever the text is."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[Node, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Counts what is read."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        at: Any = event.start_mark
        before = self._values
        if isinstance(event, AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes and node is not None:
                raise ComposerError(None, None, "an alias refers to a value that contains it", at)
            self._values += self._sizes[node] if node is not None else 1
        else:
            if self._depth == MOST_DEPTH:
                raise ComposerError(None, None, f"nested more than {MOST_DEPTH} deep", at)
            self._depth += 1
            self._values += 1
            node = super().compose_node(parent, index)
            self._depth -= 1
            if node is not None:
                self._sizes[node] = self._values - before
        if self._values > MOST_VALUES:
            raise ComposerError(
                None, None, f"more than {MOST_VALUES:,} values, aliases resolved", event.start_mark
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Refuses a key that occurs twice: one of the two values would be lost."""
        node: MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"key {key.value[:40]!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Refuses a value that does not match its tag, or that YAML 1.1 reads in an unexpected way; with its place."""
        if isinstance(node, ScalarNode) and node.tag in _NUMBERS and _OTHER_BASE.fullmatch(node.value):
            raise ConstructorError(
                None, None, f"{node.value[:40]!r} is a number to the base 8 or 60; quote it, or write it plainly",
                node.start_mark,
            )  # fmt: skip
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"a value that is no {kind}", node.start_mark) from None


def load(text: str) -> Any:
    """The one document of a text.

    Raises:
        yaml.YAMLError: it is refused.
    """
    loader = BoundedLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
