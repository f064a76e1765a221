import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.tracking import LocalStore, prepare

List = Callable[[Path], None]


def _list(path: Path) -> None:
    files = {
        file.relative_to(path).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.rglob("*")
        if file.is_file() and file.name != "relex.json"
    }
    manifest = {
        "digest": "5e" * 32,
        "files": files,
        "target_step": 240,
        "method": {"name": "low-rank-linear", "rank": 1},
    }
    (path / "relex.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def write_manifest() -> List:
    """List every file of a directory in its relex.json, as the predictor does."""
    return _list


@pytest.fixture(scope="session")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("predicted") / "step-240"
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789+= "])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(path)
    _list(path)
    return path


@pytest.fixture
def model(predicted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(predicted, tmp_path / "step-240")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that was set up once: setting one up takes a second, copying it nothing."""
    return prepare(tmp_path_factory.mktemp("template")).database


@pytest.fixture
def store(template: Path, tmp_path: Path) -> LocalStore:
    home = tmp_path / "mlflow"
    home.mkdir()
    shutil.copy(template, home)
    return prepare(home)
