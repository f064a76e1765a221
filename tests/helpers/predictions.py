"""Model directories as predictions leave them, of a few bytes: what the registry does does not hang on size."""

import hashlib
import json
from pathlib import Path


def write_prediction(path: Path, *, number: int = 0, step: int = 240) -> Path:
    """Write a candidate whose digest and weights are told by `number`."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    (path / "tokenizer_config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(f"weights {number}".encode() * 8)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    manifest = {
        "digest": hashlib.sha256(f"prediction {number}".encode()).hexdigest(),
        "files": files,
        "target_step": step,
        "method": {"name": "relex"},
    }
    (path / "relex.json").write_text(json.dumps(manifest))
    return path
