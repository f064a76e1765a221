"""The base model is complete or absent."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flows.demo.errors import OutputExistsError
from flows.demo.model import build_model, build_tokenizer
from flows.demo.pretrain import publish

# The end-to-end tests train too: these are for what make test leaves out.
pytestmark = pytest.mark.slow

Demo = Callable[..., subprocess.CompletedProcess[str]]


def test_every_file_of_a_base_is_as_readable_as_its_config(base: Path) -> None:
    assert {file.stat().st_mode for file in base.iterdir()} == {(base / "config.json").stat().st_mode}
    assert not [entry.name for entry in base.parent.iterdir() if entry.name.startswith(".")]


def test_a_process_killed_while_it_writes_leaves_no_base_and_the_next_one_writes_it(tmp_path: Path) -> None:
    for attempt in range(10):
        parent = tmp_path / f"demo-{attempt}"
        parent.mkdir()
        out = parent / "base"
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.demo.pretrain", "--out", str(out), "--steps", "1"], stderr=subprocess.DEVNULL
        )
        try:
            while process.poll() is None and not any(parent.iterdir()):
                time.sleep(0.0005)  # the whole write takes a few milliseconds
        finally:
            process.kill()
            process.wait()
        if process.returncode == -9:
            break
    assert process.returncode == -9, "it had finished before it could be killed, each time"
    assert not (out.exists() and not _loads(out))
    if not out.exists():
        tokenizer = build_tokenizer()
        publish(build_model(tokenizer, seed=0), tokenizer, out)
    assert _loads(out)
    assert [entry.name for entry in parent.iterdir()] == ["base"]


def test_a_base_that_appears_meanwhile_is_left_as_it_is(base: Path) -> None:
    tokenizer = build_tokenizer()
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="appeared meanwhile"):
        publish(build_model(tokenizer, seed=1), tokenizer, base)
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option '--out'"),
        (("--out", "x", "--steps", "0"), 2, "Invalid value for '--steps': Input should be greater than or equal to 1"),
        (("--out", "x", "--seed", "one"), 2, "Invalid value for '--seed': Input should be a valid integer"),
        (("--out", "pyproject.toml"), 1, "OutputExistsError: pyproject.toml exists"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(
    demo: Demo, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = demo("pretrain", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def _loads(directory: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
    except (OSError, ValueError):
        return False
    return True
