import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from relex.errors import OutputError
from relex.files.local import LocalDirectory
from relex.formats.safetensors_header import DTYPES
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE
from relex.output.manifest import FILE_NAME, FileRecord
from relex.output.writer import ModelWriter, OutputTensor, open_writer
from tests.helpers.trajectories import Run, load, predict, tree, write


def _opened(out: Path, state: dict[str, Tensor], shards: dict[str, str], *, digest: str = "d" * 64) -> ModelWriter:
    tensors = [
        OutputTensor(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, shards[name])
        for name, tensor in state.items()
    ]
    writer = open_writer(out, digest, tensors)
    assert writer is not None
    return writer


def _written(out: Path, state: dict[str, Tensor], shards: dict[str, str]) -> Path:
    writer = _opened(out, state, shards)
    for name, tensor in state.items():
        writer.begin(name)
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        # In two pieces and the later one first: a file is filled by position.
        writer.write(name, tensor.nbytes // 2, raw[tensor.nbytes // 2 :])
        writer.write(name, 0, raw[: tensor.nbytes // 2])
    for shard in sorted(set(shards.values())):
        writer.close(shard)
    writer.publish({}, lambda records: {"files": sorted(records)})
    return out


def _of_every_dtype() -> dict[str, Tensor]:
    state = {}
    for number, dtype in enumerate(DTYPES.values()):
        for shape in ((3, 5), (), (0, 2), (7,)):
            state[f'z{number % 3}.{dtype}.{len(shape)}{shape[:1]}é"\\'] = (
                torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
            )
    return state


def test_the_bytes_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    state = _of_every_dtype()
    out = _written(tmp_path / "out", state, dict.fromkeys(state, SINGLE_FILE))
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (out / SINGLE_FILE).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert not (out / INDEX_FILE).exists()


def test_shards_are_those_of_safetensors_itself_and_the_index_names_them(tmp_path: Path) -> None:
    state = _of_every_dtype()
    shards = {name: f"model-{place % 3}.safetensors" for place, name in enumerate(state)}
    out = _written(tmp_path / "out", state, shards)
    for shard in set(shards.values()):
        save_file(
            {name: state[name] for name in state if shards[name] == shard}, tmp_path / shard, metadata={"format": "pt"}
        )
        assert (out / shard).read_bytes() == (tmp_path / shard).read_bytes()
    index = json.loads((out / INDEX_FILE).read_text())
    assert index["weight_map"] == shards
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())


def test_a_name_is_given_to_what_is_on_the_disk_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))  # noqa: PTH115
        fsync(descriptor)

    def renamed(how: Callable[[Path, Path], None], source: Path, target: Path) -> None:
        done.append(("name", Path(target).name))
        how(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", partial(renamed, replace))
    monkeypatch.setattr(os, "rename", partial(renamed, rename))
    state = {"a": torch.ones(3), "b": torch.ones(5)}
    _written(tmp_path / "out", state, {"a": "one", "b": "two"})
    for shard in ("one", "two"):
        assert done.index(("sync", f"{shard}.tmp")) < done.index(("name", shard))
    hidden, published = next(name for what, name in done if name.endswith(".partial")), done.index(("name", "out"))
    before = {name for what, name in done[:published] if what == "sync"}
    assert before == {"one.tmp", "two.tmp", INDEX_FILE, FILE_NAME, hidden}
    assert done[published + 1 :] == [("sync", tmp_path.name)]


def test_shards_are_read_for_their_records_while_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, bool]] = []
    of = FileRecord.of

    def noted(path: Path) -> FileRecord:
        made.append((path.name, threading.current_thread() is threading.main_thread()))
        return of(path)

    monkeypatch.setattr(FileRecord, "of", noted)
    state = {"a": torch.ones(3), "b": torch.ones(5)}
    writer = _opened(tmp_path / "out", state, {"a": "one", "b": "two"})
    # Shard one is written again, and its record is that of the second time.
    for name in ("a", "a", "b"):
        writer.remove(name)
        writer.begin(name)
        writer.write(name, 0, memoryview(state[name].view(torch.uint8).numpy().data))
        writer.close(writer.tensors[name].shard)
        state[name] += 1
    records: dict[str, FileRecord] = {}
    writer.publish({}, lambda files: records.update(files) or {})
    assert sorted(made) == [(INDEX_FILE, True), ("one", False), ("one", False), ("two", False)]
    for name, record in records.items():
        assert record.sha256 == sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("relex-record")]


def test_what_the_system_writes_or_reads_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: pwrite(file, data[:5], position))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, position: preadv(file, [buffers[0][:7]], position))
    tensor = torch.arange(24, dtype=torch.uint8)
    out = _written(tmp_path / "out", {"w": tensor}, {"w": SINGLE_FILE})
    content = save({"w": tensor}, metadata={"format": "pt"})
    assert (out / SINGLE_FILE).read_bytes() == content
    buffer = bytearray(len(content))
    assert LocalDirectory(out).read_into(SINGLE_FILE, 0, memoryview(buffer)) == len(content)
    assert buffer == content


def test_another_output_of_that_name_that_is_being_written_stays(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    first = _opened(tmp_path / "out", state, {"w": SINGLE_FILE})
    other = _opened(tmp_path / "out", state, {"w": SINGLE_FILE}, digest="e" * 64)
    assert first.partial.is_dir()
    other.discard()
    with pytest.raises(OutputError, match="is being written by another process"):
        _opened(tmp_path / "out", state, {"w": SINGLE_FILE})
    first.release()


def test_shards_of_another_cut_are_not_taken_for_those_that_are_wanted(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.ones(5)}
    killed = _opened(tmp_path / "out", state, {"a": "one", "b": "two"})
    killed.begin("a")
    killed.write("a", 0, memoryview(bytes(12)))
    killed.close("one")
    killed.release()
    assert _opened(tmp_path / "out", state, {"a": "two", "b": "one"}).missing == ["one", "two"]


def test_what_others_left_unfinished_and_links_to_nothing_are_no_part_of_an_output(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    writer = _opened(tmp_path / "out", state, {"w": SINGLE_FILE})
    writer.begin("w")
    writer.close(SINGLE_FILE)
    (writer.partial / f"{SINGLE_FILE}.elsewhere-1.tmp").write_bytes(b"half")
    writer.publish({}, lambda records: {"files": sorted(records)})
    assert {file.name for file in (tmp_path / "out").iterdir()} == {SINGLE_FILE, FILE_NAME}
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputError, match="link exists and holds something relex did not write"):
        _opened(tmp_path / "link", state, {"w": SINGLE_FILE})


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    mask: int = request.param
    before = os.umask(mask)
    yield mask
    os.umask(before)


def test_modes_follow_the_umask(run: Run, tmp_path: Path, umask: int) -> None:
    trajectory = run.open()
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~umask}
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_another_prediction_of_that_name_left_behind_goes(run: Run, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.0123456789abcdef.partial"
    leftover.mkdir()
    (leftover / "model.safetensors.tmp").write_bytes(b"half")
    trajectory = run.open()
    before = tree(tmp_path)
    write(trajectory, predict(trajectory), tmp_path / "out")
    assert not leftover.exists()
    assert tree(tmp_path) - before == {"out", "out/config.json", "out/model.safetensors", "out/relex.json"}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_prediction_loads_with_transformers_and_holds_what_the_file_holds(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    model.bfloat16()
    run = Run(tmp_path / "base", tmp_path / "run")
    model.save_pretrained(run.base)
    for step in (10, 25, 40):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(run.run / f"checkpoint-{step}")
        (run.run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    trajectory = run.open()
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    both: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    loaded, info = both
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert loaded.dtype is torch.bfloat16
    state, stored = loaded.state_dict(), load(out)
    assert ("lm_head.weight" in stored) is not tied
    assert state.keys() - stored.keys() == ({"lm_head.weight"} if tied else set())
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor), name
    if tied:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
