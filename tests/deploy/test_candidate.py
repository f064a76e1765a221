import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.candidate import verify
from deploy.errors import CandidateError

Edit = Callable[[Path], object]


def _edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_predicted_directory_is_a_candidate_with_every_file_read(model: Path) -> None:
    candidate = verify(model)
    assert candidate.target_step == 240
    assert set(candidate.files) == {file.name for file in model.iterdir()} - {"relex.json"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is not there"),
        (lambda path: (path / "extra.txt").write_text(""), "holds extra.txt, which relex.json does not list"),
        (lambda path: (path / "code.py").write_text(""), "holds code.py"),
        (lambda path: (path / "linked.json").symlink_to(path / "config.json"), "symbolic link"),
        (lambda path: (path / "generation_config.json").write_text("{}"), "has 2 bytes and relex.json lists"),
        (lambda path: (path / "relex.json").unlink(), "relex.json cannot be read"),
        (lambda path: (path / "relex.json").write_text("[]"), "holds a list, not an object"),
        (lambda path: (path / "relex.json").write_text("[" * 100_000), "relex.json cannot be read (maximum recursion"),
        (
            lambda path: os.truncate(path / "relex.json", 1 << 33),
            "it has 8589934592 bytes, and at most 67108864 are read",
        ),
        (lambda path: _edit_json(path / "relex.json", digest="x' or '1'='1"), "not 8 to 128 hex digits"),
        (lambda path: _edit_json(path / "relex.json", target_step=None), "target_step None"),
        (lambda path: _edit_json(path / "relex.json", files={}), "lists no files"),
        (lambda path: _edit_json(path / "relex.json", files={"a.json": 7}), "describes a.json as 7"),
        (lambda path: _edit_json(path / "relex.json", files={"../a.json": {"size": 1}}), "outside the directory"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(model: Path, damage: Edit, says: str) -> None:
    damage(model)
    with pytest.raises(CandidateError) as refusal:
        verify(model)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_flipped_byte_is_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CandidateError, match="has SHA-256"):
        verify(model)


def test_code_is_refused_even_when_the_manifest_lists_it(model: Path, write_manifest: Edit) -> None:
    (model / "modeling_tiny.py").write_text("")
    write_manifest(model)
    with pytest.raises(CandidateError, match=r"lists modeling_tiny\.py; a model is made of"):
        verify(model)


def test_the_vectors_a_prediction_was_made_with_are_part_of_it_and_other_arrays_are_not(
    model: Path, write_manifest: Edit
) -> None:
    (model / "relex-vectors.npz").write_bytes(b"vectors")
    write_manifest(model)
    assert "relex-vectors.npz" in verify(model).files
    (model / "other.npz").write_bytes(b"arrays")
    write_manifest(model)
    with pytest.raises(CandidateError, match=r"lists other\.npz; a model is made of"):
        verify(model)


def test_configuration_that_is_nested_without_end_is_refused(model: Path, write_manifest: Edit) -> None:
    (model / "config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    write_manifest(model)
    with pytest.raises(CandidateError, match=r"config\.json is not JSON \(maximum recursion"):
        verify(model)


@pytest.mark.parametrize("nest", [lambda code: code, lambda code: {"text_config": code}])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_configuration_that_names_code_is_refused(
    model: Path, write_manifest: Edit, name: str, nest: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    _edit_json(model / name, **nest({"auto_map": {"AutoModelForCausalLM": "someone/else--modeling.Model"}}))
    write_manifest(model)
    with pytest.raises(CandidateError, match=rf"{name} has auto_map"):
        verify(model)


def test_a_pipeline_that_brings_its_own_code_is_refused(model: Path, write_manifest: Edit) -> None:
    _edit_json(model / "config.json", custom_pipelines={"text-generation": {"impl": "pipeline.Own"}})
    write_manifest(model)
    with pytest.raises(CandidateError, match=r"config\.json has custom_pipelines"):
        verify(model)


def test_a_token_spelled_like_a_code_key_is_no_code(model: Path, write_manifest: Edit) -> None:
    (model / "added_tokens.json").write_text('{"auto_map": 15}')
    write_manifest(model)
    assert "added_tokens.json" in verify(model).files
