"""Patterns of module names are looked up as peft does it, and those that would never end are refused."""

import re
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex.errors import CheckpointMismatchError
from relex.layouts.module_patterns import read_patterns

MODULES = [
    f"model.layers.{layer}.{module}" for layer in range(28) for module in ("self_attn.q_proj", "mlp.down_proj")
] + ["a" * 60]
PARTS = ("a", "b", ".", "*", "+", "?", "(", ")", "|", "(?:", r"\.", "[ab]", "{2,5}", "a+", ".*", "(a|b)")


def read(patterns: Any, modules: list[str] = MODULES) -> list[float]:
    result = read_patterns(patterns, "rank_pattern", modules, otherwise=8, where="run/config")
    return [result.of(module) for module in modules]


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 2, "layers.1.mlp.down_proj": 3},
        {r"layers\.[0-5]\..*": 4, r"^model\.layers\.(7|8)\.": 5},
        {r".*layers\.\d+\.self_attn\.(q|k|v|o)_proj": 16, "(?:mlp|self_attn).(up|down)_proj": 4},
        {r"layers\.1?2\.mlp\..*_proj": 3, "layers.2[0-7].*.q_proj": 1},
        {name: number for number, name in enumerate(MODULES, 1)},
    ],
)
def test_the_first_pattern_that_fits_the_end_counts(patterns: dict[str, int]) -> None:
    expected = [
        next((rank for pattern, rank in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), 8)
        for module in MODULES
    ]
    assert read(patterns) == expected


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+$b",
        "(.*)*b",
        "(a?){60}b",
        "a?" * 60 + "b",
        "(a|aa)" * 30 + "b",
        ".*" * 12 + "b",
        "(){4000000000}",
        "(?=(a+)+b)a",
        "(?:(?:a|a)(?:a|a)){20}b",
        "(?>(a+)+b)",
        "a" * 5000,
    ],
)
def test_a_pattern_that_never_ends_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"^run/config: rank_pattern has .* in too many ways to try"):
        read({pattern: 2})


@pytest.mark.timeout(20)
def test_many_patterns_over_many_modules_are_refused() -> None:
    with pytest.raises(CheckpointMismatchError, match="too many ways"):
        read({f"x{number}.*": 2 for number in range(10_000)}, [f"model.layers.{number}" for number in range(10_000)])


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"(a": 2}, r"has \(a, which is no regular expression"),
        ({"(" * 900 + ")" * 900: 2}, "too many ways|no regular expression"),
    ],
)
def test_what_is_no_pattern_is_refused(patterns: Any, said: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=said) as caught:
        read(patterns)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=14))
def test_whatever_is_not_refused_ends(parts: list[str]) -> None:
    started = time.process_time()
    with suppress(CheckpointMismatchError):
        read({"".join(parts): 2}, ["a" * 40, "model." + "ab" * 15])
    assert time.process_time() - started < 10
