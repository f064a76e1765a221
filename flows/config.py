"""What the YAML files of relex have in common: how they are read, and the settings of whatever computes."""

import os
import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from evaluation.answers.backend import BATCH_SIZES, parse_backend
from evaluation.errors import EvaluationError
from evaluation.yaml_text import key_line, read_bounded_yaml
from flows.errors import ConfigError

# The branch of a value that is given where auto could be; no reader needs it in an error.
GIVEN = "given"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=60)]


class Config(BaseModel):
    """A mapping of keys; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Read = TypeVar("Read", bound=Config)


class Compute(Config):
    """What reading, combining and evaluating may use."""

    memory: ByteSize = Field(default=ByteSize(4 << 30), description="Memory for reading and combining, such as 4GiB.")
    threads: int = Field(default=os.cpu_count() or 1, gt=0, description="Threads for reading and combining.")
    device: str = Field(
        default="cpu", description="Device for evaluation: cpu, cuda, cuda:N, or several: cuda:0,cuda:1."
    )
    backend: str = Field(
        default="hf",
        description="What answers: hf, vllm, or vllm:tensor_parallel_size=2,max_model_len=8192,share_device=true.",
    )
    dtype: str = Field(
        default="auto", description="Precision of evaluation; auto: the model's own, equal for all models."
    )
    batch_size: int = Field(
        default_factory=lambda given: BATCH_SIZES[str(given.get("backend", "hf")).partition(":")[0]],
        gt=0,
        description="Problems evaluated at once; by default 64, with vllm 1024.",
    )
    evaluations: int | None = Field(
        default=None,
        gt=0,
        description="Evaluations at once: on each GPU (by default one), or on a machine's CPU (by default any number)."
        " One waits for a free place among its own number, so of several numbers the largest bounds a device. Several"
        " vLLM engines on a GPU share its memory: give gpu_memory_utilization.",
    )

    @field_validator("backend")
    @classmethod
    def _answering(cls, spec: str) -> str:
        try:
            parse_backend(spec)
        except EvaluationError as error:
            raise ValueError(str(error)) from error
        return spec


def read_config(path: Path, model: type[Read], *, context: Mapping[str, object] | None = None) -> Read:
    """Read a YAML file of keys and values as `model`; raises ConfigError with every wrong key in one line.

    `context` is what its validators are told.
    """
    try:
        content = read_bounded_yaml(path)
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}. Give the path of a relex.yaml.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} holds a {type(content).__name__}, not keys and values.")
    try:
        return model.model_validate(content, context=context)
    except ValidationError as error:
        # What follows from another key that is wrong is right with that one.
        problems = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        wrong = [_sentence(problem, path, model) for problem in problems]
        raise ConfigError(f"config {path}: {' '.join(wrong)}", wrong) from error


def _sentence(problem: ErrorDetails, path: Path, model: type[Config]) -> str:
    """Return what is wrong with one key: its name, its line in the file, what is asked for, and what was given."""
    place = [part for part in problem["loc"] if part != GIVEN]
    name, line = ".".join(map(str, place)) or "file", key_line(path, place)
    where = name if line is None else f"{name} (line {line})"
    if problem["type"] == "missing":
        return f"{name} is missing: {_description(model, name)}."
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(name, model.model_fields, n=1)
        return f"{where} is no key. " + (
            f"Did you mean {near[0]}?" if near else f"The keys are {', '.join(model.model_fields)}."
        )
    said = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{where}: {said} (given {reprlib.repr(problem['input'])})."


def _description(model: type[Config], name: str) -> str:
    field = model.model_fields.get(name)
    return "give it" if field is None or field.description is None else field.description.rstrip(".")


def location(text: str, root: Path) -> str:
    """Return where a path or URL of a config in `root` is: a path is relative to it, a URL is not."""
    return text if "://" in text else str(root / text)


def benchmark_location(text: str, root: Path) -> str:
    """Return a benchmark of a config in `root`: one that looks like a file is relative to it, else it is a name."""
    return str(root / text) if text.endswith((".yaml", ".yml")) else text
