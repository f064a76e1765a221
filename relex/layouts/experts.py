"""Experts that are stored fused, all of a layer in one tensor: which of its elements are which expert's matrix.

transformers keeps the experts of a layer as `experts.gate_up_proj` and `experts.down_proj` of three dimensions, the
expert first, and so do its trainers' shards; on the Hub the same model may have a tensor for each matrix of each one. A
matrix found here has the name of that storage, and is a contiguous range of the fused tensor.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relex.layouts.weights import Piece, TensorEntry, Weights

# Stored as (expert, in, out), where the shape does not tell; of gpt-oss the columns of gate and up alternate.
_TURNED_MODELS = {"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text"}
# What two matrices are, one after the other, where the outputs are rows.
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}
# GraniteMoe's and JetMoe's names of the same tensors, by transformers' own conversion of the former.
_OTHER_NAMES = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
# What reads the model's hidden state and what adds to it: parameters of one module, where storage by the expert has
# modules with a weight and a bias each.
_READERS = {"gate_up_proj", "gate_proj", "up_proj", "w1", "w3"}
_WRITERS = {"down_proj", "w2"}
_BIAS = re.compile(r"(.+_proj)_bias$")


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix, or bias, of one expert: `shape` from element `start` of the fused tensor on, named as if unfused.

    `turned` when the matrix is stored as (in, out).
    """

    name: str
    expert: int
    rows: tuple[int, int]
    start: int
    shape: tuple[int, ...]
    turned: bool


def matrices(entry: TensorEntry, config: Mapping[str, Any]) -> tuple[ExpertMatrix, ...]:
    """Return the matrices of a tensor of fused experts in the order of its elements, () when it is none.

    Its name says experts, and where the model's config.json says how many there are it has as many.
    """
    placed = _placed(entry.name)
    if placed is None or math.prod(entry.shape) == 0:
        return ()
    before, last = placed
    bias = _BIAS.match(last)
    if len(entry.shape) != (2 if bias else 3):
        return ()
    settings = list(_settings(config))
    stated = [each for each in settings if _counts(each)]
    alike = [each for each in stated if entry.shape[0] in _counts(each)]
    if stated and not alike:
        return ()
    turned_by_width = None if bias else _is_turned(last, entry.shape, alike or settings)
    usual = not any(each.get("model_type") in _TURNED_MODELS for each in settings)
    turned = not bias and (turned_by_width if turned_by_width is not None else not usual)
    halved = last in _HALVES and turned_by_width is False and usual and entry.shape[1] % 2 == 0
    names = _HALVES[last] if halved else (last,)
    rows = entry.shape[1] // len(names)
    inner = (rows, *entry.shape[2:])
    return tuple(
        ExpertMatrix(
            f"{before}.{expert}.{_as_unfused(name)}",
            expert,
            (half * rows, (half + 1) * rows),
            (expert * len(names) + half) * math.prod(inner),
            inner,
            turned,
        )
        for expert in range(entry.shape[0])
        for half, name in enumerate(names)
    )


def parts(entry: TensorEntry, cut: Sequence[ExpertMatrix]) -> tuple[TensorEntry, ...]:
    """Return where each matrix of a tensor lies, in whatever boxes the tensor itself does."""
    number = {(matrix.expert, matrix.rows): place for place, matrix in enumerate(cut)}
    halves = sorted({matrix.rows for matrix in cut})
    pieces_of: list[list[Piece]] = [[] for _ in cut]
    for piece in entry.pieces:
        if math.prod(piece.shape) == 0:
            continue
        first, last = piece.origin[1], piece.origin[1] + piece.shape[1]
        row = math.prod(piece.shape[2:]) * entry.dtype.itemsize
        for half in halves:
            begin, end = max(first, half[0]), min(last, half[1])
            if begin >= end:
                continue
            origin = (begin - half[0], *piece.origin[2:])
            shape = (end - begin, *piece.shape[2:])
            offset = piece.offset + (begin - first) * row
            for place in range(piece.shape[0]):
                pieces_of[number[piece.origin[0] + place, half]].append(
                    Piece(piece.file, offset + place * piece.shape[1] * row, origin, shape)
                )
    return tuple(
        TensorEntry(matrix.name, entry.dtype, matrix.shape, tuple(pieces))
        for matrix, pieces in zip(cut, pieces_of, strict=True)
    )


def stored_as(weights: Weights, base: Weights) -> Weights:
    """Return a checkpoint's weights with fused experts apart where the base has a tensor for each matrix of each one.

    transformers keeps fused what it read by the expert, and a trainer's shards are what it keeps.
    """
    others = [entry for name, entry in weights.tensors.items() if name not in base.tensors]
    cuts = {entry.name: matrices(entry, base.config) for entry in others if type(entry) is TensorEntry}
    apart = {name: cut for name, cut in cuts.items() if cut and all(matrix.name in base.tensors for matrix in cut)}
    if not apart:
        return weights
    tensors: dict[str, TensorEntry] = {}
    for name, entry in weights.tensors.items():
        tensors |= {part.name: part for part in parts(entry, apart[name])} if name in apart else {name: entry}
    return replace(weights, tensors=tensors)


def _placed(name: str) -> tuple[str, str] | None:
    """Return what of the name stands before the expert's number and what after it, None when it is no experts'."""
    words = name.split(".")
    if not any(word.endswith("experts") for word in words):
        before, last = ".".join(words[:-2]), ".".join(words[-2:])
        if last not in _OTHER_NAMES:
            return None
        words = [*before.split("."), *_OTHER_NAMES[last].split(".")] if before else _OTHER_NAMES[last].split(".")
    place = next(i for i, word in enumerate(words) if word.endswith("experts"))
    after = words[place + 1 :]
    # Stored by the expert already, or a parameter of all of them together.
    if not after or any(word.isdecimal() for word in after):
        return None
    return ".".join(words[: place + 1]), ".".join(after)


def _as_unfused(name: str) -> str:
    if bias := _BIAS.match(name):
        return f"{bias[1]}.bias"
    return f"{name}.weight" if name in _READERS | _WRITERS else name


def _settings(config: Mapping[str, Any], *, levels: int = 3) -> Iterator[Mapping[str, Any]]:
    """Yield a config and the configs in it, as of a multimodal model's text model."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and levels > 1:
            yield from _settings(value, levels=levels - 1)


def _counts(settings: Mapping[str, Any]) -> set[int]:
    """Return the numbers of experts that a config states: of each layer, or of each kind."""
    stated = [value for key, value in settings.items() if key.endswith("experts")]
    each = [one for value in stated for one in (value if isinstance(value, list) else [value])]
    return {count for count in each if type(count) is int and count > 0}


def _is_turned(name: str, shape: Sequence[int], settings: Sequence[Mapping[str, Any]]) -> bool | None:
    """Tell from the model's width whether matrices are (in, out); None where it does not tell."""
    widths = {each.get("hidden_size") for each in settings}
    wide = [size in widths for size in shape[1:]]
    if name not in _READERS | _WRITERS or wide[0] is wide[1]:
        return None
    return wide[0] is (name in _READERS)
