"""Files of torch.save: every tensor is where it is said to be, and nothing but a whole and plain archive is read."""

import io
import os
import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from relex.errors import CheckpointError, CheckpointIncompleteError, CheckpointMismatchError
from relex.files.local import LocalDirectory
from relex.formats.torch_file import LocalTensor, read_torch_file, require_contiguous

NAME = "weights.pt"
# Two references to the tuple before, 60 times: written out it has 2^60 leaves.
LAUGHS = b")" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(100, 160))


class Remote:
    """Leaves a canary where it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 5, generator=generator)
    marked = torch.randn(4, generator=generator)
    marked.label = "kept"  # type: ignore[attr-defined]
    tied = torch.randn(3, 2, generator=generator)
    parameter = nn.Parameter(torch.randn(6, generator=generator))
    parameter.label = "kept"  # type: ignore[attr-defined]
    return {
        "whole": whole,
        "view": whole[2:5],
        "parameter": nn.Parameter(torch.randn(2, 3, generator=generator)),
        "parameter with an attribute": parameter,
        "tensor with an attribute": marked,
        "tied": tied,
        "tied again": tied,
        "bf16": whole.to(torch.bfloat16),
        "half": whole.half(),
        "double": whole.double(),
        "int": torch.arange(5),
        "bool": torch.tensor([True, False, True]),
        "without a storage class": torch.arange(9).to(torch.uint16)[1:],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 5),
        "column of one": torch.randn(1, 5, generator=generator).t(),
    }


def save(path: Path, content: Any) -> bytes:
    torch.save(content, path / NAME)
    return (path / NAME).read_bytes()


def read(path: Path, *, start: int = 0, stop: int | None = None, unknown: Literal["refuse", "stub"] = "refuse") -> Any:
    directory = LocalDirectory(path)
    return read_torch_file(directory, directory.identity(NAME), start=start, stop=stop, unknown=unknown)


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_equal(result: Mapping[str, LocalTensor], expected: Mapping[str, Tensor], content: bytes) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        place = result[name]
        assert (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape)), name
        assert place.contiguous, name
        assert content[place.offset : place.offset + tensor.nbytes] == raw(tensor), name


def test_every_tensor_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    content = save(tmp_path, tensors())
    check_equal(read(tmp_path), tensors(), content)


def test_a_file_inside_a_file_is_read_by_its_range(tmp_path: Path) -> None:
    content = save(tmp_path, tensors())
    (tmp_path / NAME).write_bytes(b"x" * 1001 + content + b"y" * 77)
    check_equal(read(tmp_path, start=1001, stop=1001 + len(content)), tensors(), (tmp_path / NAME).read_bytes())
    for start, stop in ((1000, 1001 + len(content)), (1001, 1000 + len(content)), (1002, 1001 + len(content))):
        with pytest.raises(CheckpointIncompleteError, match=rf"{NAME} \(bytes {start} to {stop}\)"):
            read(tmp_path, start=start, stop=stop)
    with pytest.raises(CheckpointIncompleteError, match=f"the file has {1078 + len(content)} bytes"):
        read(tmp_path, start=1001, stop=10**6)


def test_what_is_no_tensor_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, {"epoch": 3, "rng": [1.5, None, ("a",)]})
    assert read(tmp_path) == {"epoch": 3, "rng": [1.5, None, ("a",)]}


def test_the_settings_of_a_trainer_are_read_when_asked_for(tmp_path: Path) -> None:
    save(tmp_path, TrainingArguments(output_dir=str(tmp_path), save_total_limit=2, save_strategy="steps"))
    with pytest.raises(CheckpointMismatchError, match="TrainingArguments"):
        read(tmp_path)
    loaded = read(tmp_path, unknown="stub")
    assert loaded.state["save_total_limit"] == 2
    assert loaded.state["save_strategy"].arguments == ("steps",)


def test_a_file_of_many_gigabytes_is_read_in_a_few_reads(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Counting(LocalDirectory):
        reads: list[int] = field(default_factory=list, hash=False, compare=False)

        def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
            content = super().read(name, start, stop)
            self.reads.append(len(content))
            return content

    # Space for tensors of 5 and 2.5 GiB, and no bytes: sizes and places need more than 32 bits.
    with torch.serialization.skip_data():
        large = {"a": torch.empty(5 << 28), "b": torch.empty(10), "c": torch.empty(2, 5 << 26), "d": torch.empty(3)}
        torch.save(large, tmp_path / NAME)
    directory = Counting(tmp_path)
    loaded = read_torch_file(directory, directory.identity(NAME))
    assert len(directory.reads) <= 6
    assert sum(directory.reads) < 1 << 19
    for number, place in enumerate(loaded.values()):
        with (tmp_path / NAME).open("r+b") as file:
            file.seek(place.offset)
            file.write(np.float32(number).tobytes())
    again = torch.load(tmp_path / NAME, mmap=True, weights_only=True)
    assert [tensor.flatten()[0].item() for tensor in again.values()] == [0, 1, 2, 3]


def test_columns_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, {"model.w": torch.ones(3, 4).t()})
    with pytest.raises(CheckpointMismatchError, match=r"model\.w of shape \[4, 3\] was saved with strides \[1, 4\]"):
        require_contiguous(read(tmp_path)["model.w"], "model.w", where=NAME)


def test_a_dtype_without_arithmetic_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(3).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointMismatchError, match=r"float8_e4m3fn, which cannot be extrapolated"):
        read(tmp_path)


def test_truncations_and_trailing_bytes_are_refused(tmp_path: Path) -> None:
    content = save(tmp_path, {"w": torch.randn(3), "b": torch.arange(2)})
    # The end, where the directory is, byte by byte.
    for size in (*range(0, len(content), 13), *range(len(content) - 100, len(content))):
        (tmp_path / NAME).write_bytes(content[:size])
        with pytest.raises(CheckpointIncompleteError, match=NAME):
            read(tmp_path)
    for tail in (b"\0", b"PK", bytes(100)):
        (tmp_path / NAME).write_bytes(content + tail)
        with pytest.raises(CheckpointIncompleteError, match="does not end as a zip archive"):
            read(tmp_path)
    (tmp_path / NAME).write_bytes(b"\0" + content)
    with pytest.raises(CheckpointIncompleteError, match="first record"):
        read(tmp_path)


def test_a_pickle_whose_checksum_is_another_one_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path, {"model.w": torch.randn(3)})
    (tmp_path / NAME).write_bytes(content.replace(b"model.w", b"model.v"))
    with pytest.raises(CheckpointIncompleteError, match=r"checksum of its record weights/data\.pkl"):
        read(tmp_path)


def test_no_damage_is_read_as_other_tensors(tmp_path: Path) -> None:
    chance = random.Random(0)
    expected = {"w": torch.randn(30), "b": torch.arange(20)}
    content = save(tmp_path, expected)
    places = read(tmp_path)
    refused = 0
    for _ in range(600):
        damaged = bytearray(content)
        start = chance.randrange(len(content))
        length = min(chance.choice([1, 2, 8, 64]), len(content) - start)
        damaged[start : start + length] = bytes(length) if chance.random() < 0.5 else chance.randbytes(length)
        (tmp_path / NAME).write_bytes(damaged)
        try:
            assert read(tmp_path) == places
        except CheckpointError:
            refused += 1
    assert refused > 120


def test_a_pickle_in_it_is_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    save(tmp_path, {"w": torch.ones(2), "payload": Remote(canary)})
    with pytest.raises(CheckpointMismatchError, match=r"posix\.system"):
        read(tmp_path)
    assert not canary.exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [LAUGHS, b"X\x01\x00\x00\x004", b"G@\x10\x00\x00\x00\x00\x00\x00"])
def test_a_count_that_is_no_number_is_refused(count: bytes, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / NAME)
    before, held = b"X\x03\x00\x00\x00cpuq\x06", b"K\x04"
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in records if name.endswith("data.pkl")]
    assert before + held in records[pickled]
    records[pickled] = records[pickled].replace(before + held, before + count)
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    directory = LocalDirectory(tmp_path)
    with pytest.raises(CheckpointIncompleteError, match="it refers to something that is no storage"):
        read_torch_file(directory, directory.identity(NAME))


def test_the_format_before_archives_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / NAME, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointIncompleteError, match="does not end as a zip archive"):
        read(tmp_path)


Change = Callable[[dict[str, bytes]], None]


def rewritten(content: bytes, change: Change, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Write the records of an archive again, changed, all sizes and checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return out.getvalue()


def grow(records: dict[str, bytes]) -> None:
    records["weights/data/0"] += bytes(4)


def drop(records: dict[str, bytes]) -> None:
    del records["weights/data/0"]


def turn(records: dict[str, bytes]) -> None:
    records["weights/byteorder"] = b"big"


def double(records: dict[str, bytes]) -> None:
    records["other/data.pkl"] = records["weights/data.pkl"]


def lengthen(records: dict[str, bytes]) -> None:
    """Say of the tensor of three elements that it has four."""
    head, tail = records["weights/data.pkl"].split(b"K\x00K\x03\x85", 1)
    records["weights/data.pkl"] = head + b"K\x00K\x04\x85" + tail


def turn_back(records: dict[str, bytes]) -> None:
    """Say of its first element that it is at place -1."""
    head, tail = records["weights/data.pkl"].split(b"K\x00K\x03\x85", 1)
    records["weights/data.pkl"] = head + b"J\xff\xff\xff\xffK\x03\x85" + tail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, "storage 0 of 3 elements has 16 bytes"),
        (drop, "'0'"),
        (turn, "little-endian"),
        (double, r"2 records data\.pkl"),
        (lengthen, r"shape \[4\] ends behind its storage of 12 bytes"),
        (turn_back, "no storage, place"),
    ],
)
def test_an_archive_that_contradicts_itself_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    content = save(tmp_path, {"w": torch.randn(3)})
    (tmp_path / NAME).write_bytes(rewritten(content, lambda _: None))
    check_equal(read(tmp_path), {"w": torch.load(tmp_path / NAME)["w"]}, (tmp_path / NAME).read_bytes())
    (tmp_path / NAME).write_bytes(rewritten(content, change))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path, {"w": torch.zeros(300)})
    (tmp_path / NAME).write_bytes(rewritten(content, lambda _: None, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointIncompleteError, match="compressed"):
        read(tmp_path)
