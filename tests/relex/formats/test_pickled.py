"""Pickles are read for what they hold; nothing in them is executed, and none can hang or kill the process."""

import argparse
import io
import os
import pickle
import random
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex.errors import CheckpointError, CheckpointIncompleteError, CheckpointMismatchError
from relex.formats import pickled
from relex.formats.pickled import Global, Made, load

WHERE = "run/data.pkl"

scalars = st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class Reduced:
    """An object whose pickle calls `function` on `arguments` when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@dataclass
class Settings:
    output_dir: str
    save_total_limit: int


@settings(max_examples=100, deadline=None)
@given(tree=trees, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_containers_come_back_as_they_were(tree: object, protocol: int) -> None:
    assert load(pickle.dumps(tree, protocol), where=WHERE) == tree


def test_what_torch_would_make_is_recorded_and_not_made() -> None:
    content = pickle.dumps({"dtype": torch.float32, "device": torch.device("cpu"), "size": torch.Size([2, 3])}, 2)
    loaded = load(content, where=WHERE)
    assert loaded["dtype"] == Global("torch.float32")
    assert isinstance(loaded["device"], Made)
    assert (loaded["device"].name, loaded["device"].arguments) == ("torch.device", ("cpu",))
    assert loaded["size"] == (2, 3)


def test_an_ordered_dict_is_a_dict() -> None:
    assert load(pickle.dumps(OrderedDict(b=1, a=2), 2), where=WHERE) == {"b": 1, "a": 2}


def test_a_builder_gets_the_arguments_and_its_result_takes_the_place() -> None:
    content = pickle.dumps([torch.device("cuda", 1)], 2)
    assert load(content, where=WHERE, builders={"torch.device": lambda *given: given}) == [("cuda", 1)]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, __import__, subprocess.check_call, open, io.FileIO, pickle.loads, torch.load],
)
def test_no_function_is_called(function: Callable[..., Any], protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    # Whatever calls any of them with this leaves the canary, or fails otherwise than in words.
    argument = f"touch {canary}" if function is os.system else f"__import__('os').system('touch {canary}')"
    content = pickle.dumps({"weights": [Reduced(function, argument)]}, protocol)
    with pytest.raises(CheckpointError):
        load(content, where=WHERE)
    # Protocol 0 has opcodes that no writer of checkpoints uses.
    with pytest.raises(CheckpointError) if protocol == 0 else nullcontext():
        load(content, where=WHERE, unknown="stub")
    assert not canary.exists()


def test_the_function_is_named() -> None:
    with pytest.raises(CheckpointMismatchError, match=rf"^{WHERE} names posix.system, .* executes nothing"):
        load(pickle.dumps(Reduced(os.system, "true"), 2), where=WHERE)


def test_a_call_inside_a_call_is_not_called() -> None:
    nested = Reduced(getattr, Reduced(__import__, "os"), "system")
    with pytest.raises(CheckpointMismatchError, match=r"names builtins\.getattr"):
        load(pickle.dumps(nested, 4), where=WHERE)
    # That name is known at protocol 2, where FSDP1 writes it, and as inert as any other.
    with pytest.raises(CheckpointMismatchError, match=r"names __builtin__\.__import__"):
        load(pickle.dumps(nested, 2), where=WHERE)
    loaded = load(pickle.dumps(nested, 2), where=WHERE, unknown="stub")
    assert isinstance(loaded, Made)
    assert loaded.name == "__builtin__.getattr"


def test_the_settings_of_any_class_are_read_when_asked_for() -> None:
    content = pickle.dumps([Settings("out", 2), argparse.Namespace(steps=5)], 2)
    with pytest.raises(CheckpointMismatchError, match="Settings"):
        load(content, where=WHERE)
    ours, theirs = load(content, where=WHERE, unknown="stub")
    assert ours.state == {"output_dir": "out", "save_total_limit": 2}
    assert theirs.state == {"steps": 5}


def test_a_persistent_id_without_a_place_is_refused() -> None:
    with pytest.raises(CheckpointIncompleteError, match="outside of it"):
        load(b"\x80\x02K\x01Q.", where=WHERE)


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_truncation_is_incomplete(protocol: int) -> None:
    content = pickle.dumps({"a": [torch.float32, (1, 2.5, None)], "b": {"c": torch.device("cpu")}}, protocol)
    for size in range(len(content)):
        with pytest.raises(CheckpointIncompleteError, match=WHERE):
            load(content[:size], where=WHERE)
    with pytest.raises(CheckpointIncompleteError, match=f"ends at byte {len(content)} of"):
        load(content + b"\0", where=WHERE)


def test_no_damage_comes_out_as_anything_else_than_a_refusal() -> None:
    chance = random.Random(0)
    content = pickle.dumps({"a": [torch.float32, (1, 2.5, None)], "b": {"c": torch.device("cpu")}}, 2)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            load(bytes(damaged), where=WHERE, unknown=chance.choice(["refuse", "stub"]))
        except CheckpointError:
            refused += 1
    assert refused > 1000


DEEP = 1 << 17
# Two references to the item before, 60 times: as a tree it has 2^60 leaves.
LAUGHS = b")" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(60))

HOSTILE = {
    "a string of 2^60 bytes": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "bytes of 2^60 bytes": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a string of 4 GB": b"\x80\x02X\xff\xff\xff\xffx.",
    "an integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "a frame of 2^60 bytes": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a place in the memo beyond all memory": b"\x80\x02]r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "a tuple as a key, laughing": b"\x80\x02}" + LAUGHS + b"Ns.",
    "a tuple as a key, deep": b"\x80\x02})" + b"\x85" * DEEP + b"Ns.",
    "a size made of laughter": b"\x80\x02ctorch\nSize\n" + LAUGHS + b"\x85R.",
    "an ordered dict with arguments": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "marks without an end": b"\x80\x02" + b"(" * DEEP + b".",
    "large integers as keys": b"\x80\x02}\x8a\x09" + (1 << 66).to_bytes(9, "little") + b"Ns.",
    "a long string as a key": b"\x80\x02}X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20) + b"Ns.",
    "a size of 65 dimensions": b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 65 + b"t\x85R.",
    "a pair of one": b"\x80\x02K\x01\x86.",
    "an empty stack": b"\x80\x02R.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "items of a number": b"\x80\x02K\x01K\x02a.",
    "an odd number of items": b"\x80\x02}(K\x01u.",
    "a global without a name": b"\x80\x04K\x01K\x02\x93.",
    "text that is no text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "nothing": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.timeout(20)
def test_hostile_content_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=WHERE):
        load(content, where=WHERE)


NESTED = {
    "tuples": b"\x80\x02)" + b"\x85" * (DEEP >> 3) + b".",
    "lists": b"\x80\x02" + b"]" * (DEEP >> 3) + b"a" * ((DEEP >> 3) - 1) + b".",
    "records": b"\x80\x02(ctorch\ndevice\nq\x00q\x01" + b"h\x00h\x01\x85Rq\x01" * (DEEP >> 3) + b"t.",
    "tuples that laugh": b"\x80\x02" + LAUGHS + b".",
    "lists that laugh": b"\x80\x02(]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60)) + b"t.",
}


@pytest.mark.parametrize("content", NESTED.values(), ids=NESTED.keys())
@pytest.mark.timeout(20)
def test_what_nobody_could_walk_through_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointMismatchError, match=f"^{WHERE} is nested more than 100 deep, or refers") as caught:
        load(content, where=WHERE)
    assert "\n" not in str(caught.value)


def test_nesting_that_a_checkpoint_may_have_is_only_nesting() -> None:
    loaded = load(b"\x80\x02)" + b"\x85" * 100 + b".", where=WHERE)
    for _ in range(100):
        (loaded,) = loaded
    assert loaded == ()


def test_what_contains_itself_is_read() -> None:
    loaded = load(b"\x80\x02]q\x00h\x00a.", where=WHERE)
    assert loaded[0] is loaded


def test_a_record_is_never_written_out_in_a_message() -> None:
    content = b"\x80\x02ctorch\ndevice\n" + LAUGHS[:61] + b"\x85R."
    assert repr(load(content, where=WHERE)) == "a torch.device"


def test_of_any_value_a_message_has_the_beginning() -> None:
    laughing: tuple[Any, ...] = ()
    for _ in range(60):
        laughing = (laughing, laughing)
    assert len(pickled.brief(laughing)) <= 200


def test_more_than_a_checkpoint_has_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointMismatchError, match=str(pickled.MOST_BYTES)):
        load(bytes(pickled.MOST_BYTES + 1), where=WHERE)
    monkeypatch.setattr(pickled, "_MOST_OPCODES", 1000)
    with pytest.raises(CheckpointMismatchError, match="more than 1000 opcodes"):
        load(b"\x80\x02" + b"]" * 2000 + b".", where=WHERE)


def test_a_message_stays_one_short_line() -> None:
    content = b"\x80\x04X" + (3000).to_bytes(4, "little") + b"ab\n" * 1000 + b"\x8c\x01x\x93."
    with pytest.raises(CheckpointMismatchError) as caught:
        load(content, where=WHERE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
