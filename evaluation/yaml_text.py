"""YAML from somebody else's file, within bounds.

Aliases make a small text a large value: of twelve levels of ten aliases each nobody sees the end. So it is counted how
much a text is when it is written out, before anything is made of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_MOST_CHARACTERS = 1 << 20
# Nodes and characters, counted as often as they are referred to.
_MOST_WRITTEN_OUT = 1 << 22
_MOST_DEPTH = 100
_MOST_DIGITS = 1000


def read_bounded_yaml(path: Path, *, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return what a YAML file holds, its constructors those of `loader`.

    Raises OSError, and YAMLError for what is no YAML or is larger than such files are.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_CHARACTERS + 1)
    if len(content) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {_MOST_CHARACTERS} bytes")
    try:
        reader = loader(content.decode())
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _written_out(node, {}, 0)
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except RecursionError as error:
        raise yaml.YAMLError(f"it is nested more than {_MOST_DEPTH} deep") from error
    # What constructors make of a date that is none, a number of no digits, a key that is a list.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise yaml.YAMLError(str(error)) from error


def key_line(path: Path, place: Sequence[str | int]) -> int | None:
    """Return the line, from 1, at which a YAML file that was read before has the key or item at `place`.

    Of a place that it does not have, that of the last part it has; None where it has none of them.
    """
    node = yaml.compose(path.read_bytes(), yaml.SafeLoader)
    line = None
    for part in place:
        entry = None
        if isinstance(node, yaml.MappingNode):
            entry = next((pair for pair in node.value if pair[0].value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            entry = (node.value[part], node.value[part])
        if entry is None:
            break
        line, node = entry[0].start_mark.line + 1, entry[1]
    return line


def _written_out(node: yaml.Node, seen: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """Return how many levels are below a node, and how much it is when it is written out."""
    levels, size = seen.get(id(node), (0, 0))
    if id(node) in seen and size == 0:
        raise yaml.YAMLError(f"it contains itself{node.start_mark}")
    if id(node) not in seen:
        seen[id(node)] = 0, 0
        size = 1
        if isinstance(node, yaml.ScalarNode):
            size += len(node.value)
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
                raise yaml.YAMLError(f"a number has {len(node.value)} digits{node.start_mark}")
        elif level < _MOST_DEPTH:
            inside = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
            for inner in inside:
                below, more = _written_out(inner, seen, level + 1)
                levels, size = max(levels, 1 + below), size + more
        seen[id(node)] = levels, size
    if level + levels >= _MOST_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {_MOST_DEPTH} deep")
    if size > _MOST_WRITTEN_OUT:
        raise yaml.YAMLError(
            f"its aliases, written out, make more than {_MOST_WRITTEN_OUT} characters{node.start_mark}"
        )
    return levels, size
