import json
import os
import shutil
from pathlib import Path

import pytest

from evaluation.answers.fingerprint import fingerprint
from evaluation.errors import ModelError


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_copy_with_files_of_training_beside_it_is_the_same_model(model: Path, copy: Path) -> None:
    for name in ("relex.json", "trainer_state.json", "training_args.bin", "optimizer.pt", "README.md"):
        (copy / name).write_bytes(b"{}")
    assert fingerprint(copy).digest == fingerprint(model).digest


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_change_in_any_file_that_affects_answers_is_another_model(model: Path, copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-2:] = content[-2:-1] + b" " + content[-1:]
    (copy / name).write_bytes(content)
    assert fingerprint(copy).digest != fingerprint(model).digest


def test_a_chat_template_is_part_of_the_model(model: Path, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(copy).digest != fingerprint(model).digest


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent is not a directory"):
        fingerprint(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json cannot be read .* no Hugging Face model directory"):
        fingerprint(tmp_path)


def test_weights_that_are_absent_or_pickled_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*index\.json: only safetensors"):
        fingerprint(copy)


def test_a_missing_shard_is_refused_by_name(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError, match=r"names 2 shards and 1 are present \(missing model-00002-of-00002"):
        fingerprint(copy)


def test_an_index_that_leads_outside_the_model_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(ModelError, match=r"names \.\./other/model\.safetensors, which is no file of"):
        fingerprint(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_its_own_code_is_refused_by_file(copy: Path, name: str) -> None:
    config = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(ModelError, match=f"{name} has auto_map"):
        fingerprint(copy)


def test_a_model_without_tokenizer_is_refused(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        fingerprint(copy)


def test_other_weights_are_another_model(model: Path, other_model: Path) -> None:
    assert fingerprint(other_model).digest != fingerprint(model).digest


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "tokenizer.json", "model.safetensors"])
def test_a_file_that_leads_out_of_the_model_is_refused(copy: Path, name: str) -> None:
    outside = copy.parent / "outside"
    if (copy / name).exists():
        (copy / name).rename(outside)
    else:
        outside.write_text("secret")
    (copy / name).symlink_to(outside)
    with pytest.raises(ModelError, match=f"{name} is a link to {outside}, outside of the model"):
        fingerprint(copy)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_in_the_cache_of_the_hub_is_the_same_model(model: Path, tmp_path: Path, shared: bool) -> None:
    repository = tmp_path / "models--org--name"
    revision, blobs = repository / "snapshots" / "f00d", repository / "blobs"
    common = tmp_path / "blobs" / "01"
    for directory in (revision, blobs, common):
        directory.mkdir(parents=True)
    for file in model.iterdir():
        blob = (common if shared else blobs) / f"{file.name}-digest"
        blob.write_bytes(file.read_bytes())
        if shared:
            (blobs / blob.name).symlink_to(blob)
        (revision / file.name).symlink_to(blobs / blob.name)
    assert fingerprint(revision).digest == fingerprint(model).digest


@pytest.mark.parametrize("content", [b"[" * 100_000, b" " * 8 + b"{}"])
def test_a_configuration_that_is_too_deep_or_too_large_is_refused(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    if b"{" in content:
        os.truncate(copy / "config.json", 8 << 30)
    with pytest.raises(ModelError, match=r"config\.json (cannot be read \(maximum recursion|has 8589934592 bytes)"):
        fingerprint(copy)
