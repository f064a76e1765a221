"""One rank's part of a tensor, from the object that torch saved for it: DTensor, ShardedTensor or a plain tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relex.formats.pickled import Made
from relex.formats.torch_file import LocalTensor

_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Part:
    """One rank's part of a tensor of `shape`: the box at `origin`, or what its coordinates in the mesh make of it.

    `axes` has for every axis of the mesh the dimension it splits (None: every place has it whole) and the coordinate.
    """

    shape: tuple[int, ...]
    local: LocalTensor
    origin: tuple[int, ...] = ()
    axes: tuple[tuple[int | None, int], ...] = ()


def part_of(value: Any) -> Part | None:
    """Return the part that a saved object is, None when this rank has none of it.

    Raises ValueError, TypeError, LookupError or AttributeError when it is not what torch saves, or is split in a way
    that is not known here.
    """
    if isinstance(value, LocalTensor):
        return Part(value.shape, value, origin=(0,) * len(value.shape))
    if not isinstance(value, Made):
        raise TypeError(f"it is a {type(value).__name__}")
    shape = _integers(value.arguments[2])
    kind = value.name.rpartition(".")[2]
    if kind == "DTensor":
        attributes = _attributes(value.state)
        local, spec = attributes["_local_tensor"], _attributes(attributes["_spec"].state)
        coordinates = _integers(_attributes(spec["mesh"].state)["_coordinate_on_dim"])
        if len(spec["placements"]) != len(coordinates):
            raise ValueError(f"its mesh has {len(coordinates)} axes and it {len(spec['placements'])} placements")
        split = [_split(placement) for placement in spec["placements"]]
        part = Part(shape, local, axes=tuple(zip(split, coordinates, strict=True)))
        # The order of two splits of one dimension is another matter, and rows in the wrong order would still tile it.
        dimensions = [dimension for dimension in split if dimension is not None]
        if len(set(dimensions)) < len(dimensions) or any(dimension >= len(shape) for dimension in dimensions):
            raise ValueError(f"its dimensions {dimensions} are split")
    elif kind == "ShardedTensor":
        shards = value.state[0]
        if not shards:
            return None
        if len(shards) > 1:
            raise ValueError(f"one rank has {len(shards)} parts of it")
        attributes = _attributes(shards[0].state)
        local = attributes["tensor"]
        part = Part(shape, local, origin=_integers(_attributes(attributes["metadata"].state)["shard_offsets"]))
    else:
        raise TypeError(f"it is a {kind}")
    if not isinstance(local, LocalTensor) or len(local.shape) != len(shape):
        raise ValueError("its part is no tensor of as many dimensions")
    return part


def _split(placement: Any) -> int | None:
    """Return the dimension that a placement splits over its axis of the mesh, None when it splits none."""
    kind = placement.name.rpartition(".")[2]
    if kind == "Replicate":
        return None
    if kind != "Shard":
        raise ValueError(f"its placement is {kind}")
    (dimension,) = _integers([_attributes(placement.state)["dim"]])
    return dimension


def _attributes(state: Any) -> dict[str, Any]:
    """Return the attributes of an object from its pickled state; with slots it is a pair, the slots second."""
    content = state[1] if isinstance(state, tuple) else state
    if not isinstance(content, dict):
        raise TypeError("it has no attributes")
    return content


def _integers(values: Any) -> tuple[int, ...]:
    if len(values) > _MOST_DIMENSIONS or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("its shape or place is not made of integers")
    return tuple(values)


def box_of(part: Part, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return origin and shape of a part: torch splits into chunks of equal size, the last ones shorter or empty."""
    origin, box = [0] * len(part.shape), list(part.shape)
    for (dimension, coordinate), places in zip(part.axes, sizes, strict=True):
        if dimension is not None:
            whole = part.shape[dimension]
            chunk = -(-whole // places)
            origin[dimension] = min(chunk * coordinate, whole)
            box[dimension] = min(chunk, whole - origin[dimension])
    return tuple(origin), tuple(box)
