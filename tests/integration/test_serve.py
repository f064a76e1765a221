"""`relex serve` as people start it, with the engine that transformers brings, on real models of a few bytes."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from deploy import champions, registry
from deploy.champions import Clearance
from deploy.tracking import prepare

VOCABULARY = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789"])}


def write_model(path: Path, *, says: str) -> Path:
    """Write a Qwen2 that answers anything with one digit, again and again, and its manifest."""
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[VOCABULARY[says]].fill_(1)
    model.save_pretrained(path)
    digits = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    digits.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    digits.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=digits, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    digest = hashlib.sha256(says.encode()).hexdigest()
    manifest = {"digest": digest, "files": files, "target_step": 240, "method": {"name": "relex"}}
    (path / "relex.json").write_text(json.dumps(manifest))
    return path


def promote(home: Path, *, says: str) -> None:
    uri = prepare(home / "mlflow").tracking_uri
    made = registry.register(write_model(home / says, says=says), name="digits", tracking_uri=uri)
    passed = Clearance(passed=True, reason="", metrics={})
    champions.promote(
        "digits", made.version, tracking_uri=uri, by="ada", judge=lambda candidate, champion: passed, downloads=home
    )


def ask(client: httpx.Client) -> str:
    answer = client.post(
        "/chat/completions",
        json={"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": "12"}]},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "digits"
    return str(answer.json()["choices"][0]["message"]["content"])[-4:]


@pytest.mark.slow
def test_the_champion_answers_chats_also_while_it_changes_and_nothing_outlives_the_command(tmp_path: Path) -> None:
    promote(tmp_path, says="7")
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", "digits", "--port", "0", "--poll-seconds", "0.5", "--json"],
        # On shared cores the threads of a tiny model only fight each other.
        env={**os.environ, "RELEX_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["text"].rpartition(" ")[2]
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
            assert [model["id"] for model in client.get("/models").json()["data"]] == ["digits"]
            assert ask(client) == "7777"
            promoting = threading.Thread(target=promote, args=(tmp_path,), kwargs={"says": "3"})
            promoting.start()
            answers = [ask(client)]
            deadline = time.monotonic() + 300
            while answers[-1] != "3333":
                assert time.monotonic() < deadline
                time.sleep(0.02)
                answers.append(ask(client))
            promoting.join()
        assert answers == sorted(answers, reverse=True)
        assert json.loads(process.stdout.readline())["version"] == 2
        started = psutil.Process(process.pid).children(recursive=True)
        # A guard and an engine; of the replaced ones, what is not over yet.
        assert len(started) >= 2
        process.kill()
        _, left = psutil.wait_procs(started, timeout=60)
        assert left == []
    finally:
        process.kill()
        process.communicate()
