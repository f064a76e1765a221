"""What a user says about one re-grounding: real steps by their own trainer, jumps by a method, in a YAML of its own."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator

from evaluation.yaml_text import read_bounded_yaml
from flows.config import Compute, Config, Name, benchmark_location, location, read_config
from flows.errors import ConfigError
from flows.reground.trainer import PLACEHOLDERS, TEMPLATES, Trainer
from flows.settings import StepOrAuto
from relex.errors import RelexError


class Reference(Config):
    """What plain RL took to the target accuracy."""

    steps: int = Field(gt=0, description="Training steps.")
    seconds: float | None = Field(default=None, gt=0, description="Seconds of training.")


class RegroundSettings(Compute):
    """One re-grounding. Relative paths are relative to the file; unknown keys are refused."""

    training_run: Name = Field(description="Name of the training run: lower-case letters, digits and dashes.")
    base: str = Field(description="Directory or URL of the model to start from.")
    command: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1,
        description="How a training run is started, as one line or as a list of words; {base}, {out}, {steps} and"
        " {cycle} stand for the model to start from, the new directory for its checkpoints, the steps to train and the"
        " number of the cycle. Give {cycle} as the seed, or every cycle trains on the same prompts.",
    )
    trainer: Trainer = Field(
        default="own",
        description="Whose options for base, out and steps are added to the command: trl, verl, or own (none: the"
        " command names all three itself).",
    )
    directory: Path = Field(default=Path(), description="Directory the command is run in.")
    real_steps: int = Field(gt=1, description="Training steps of one cycle.")
    jump_steps: StepOrAuto = Field(
        default="auto",
        description="Steps predicted after them; auto: a ladder of jumps, climbed while scores last, and the best one.",
    )
    method: str = Field(default="secant", description="Method of the jump, as NAME or NAME:parameter=value.")
    selection: str = Field(description="Benchmark that chooses and judges every jump: a name or a YAML file.")
    margin: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="How far below the checkpoint it started from a jump may score and be kept, in accuracy.",
    )
    total_steps: int = Field(gt=0, description="Stop at this step, real and jumped ones counted.")
    target_accuracy: float | None = Field(
        default=None, gt=0.0, le=1.0, description="Stop when the selection benchmark shows this accuracy."
    )
    reference: Reference | None = Field(
        default=None, description="What plain RL took to the target accuracy, to say what was saved."
    )
    keep: Literal["all", "chosen"] = Field(
        default="all",
        description="What stays of a finished cycle: all, or the model that was chosen without the checkpoints.",
    )
    state: Path = Field(default=Path(".relex"), description="Directory for everything relex keeps, made when missing.")

    @field_validator("command", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _words(cls, command: object) -> object:
        return shlex.split(command) if isinstance(command, str) else command

    @field_validator("method")
    @classmethod
    def _known(cls, spec: str) -> str:
        # torch comes with it, and takes seconds.
        from relex.predictors import parse_method

        try:
            return parse_method(spec).spec
        except RelexError as error:
            raise ValueError(str(error)) from error

    @property
    def home(self) -> Path:
        """Where the state of this re-grounding lies."""
        return self.state / self.training_run / "reground"

    def cycle_directory(self, number: int) -> Path:
        """Return where everything of one cycle lies."""
        return self.home / "cycles" / f"{number:04}"


def is_reground(path: Path) -> bool:
    """Whether a YAML describes a re-grounding, not a training run that is watched; one that cannot be read does not."""
    try:
        content = read_bounded_yaml(path)
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "real_steps" in content


def load_reground_settings(path: Path) -> RegroundSettings:
    """Read and check the YAML of a re-grounding; raises ConfigError with every wrong key in one line."""
    settings = read_config(path, RegroundSettings)
    words = " ".join((*settings.command, *TEMPLATES[settings.trainer]))
    missing = [f"{{{name}}}" for name in PLACEHOLDERS if name != "cycle" and f"{{{name}}}" not in words]
    if missing:
        raise ConfigError(
            f"config {path}: the command does not say {', '.join(missing)}, so the trainer would not know. Write them"
            " where its options take them, or name the trainer: trl or verl."
        )
    if settings.target_accuracy is None and settings.reference is not None:
        raise ConfigError(
            f"config {path}: reference says what plain RL took ({settings.reference.steps} steps) and target_accuracy"
            " is missing. Give the accuracy it took them to."
        )
    root = path.absolute().parent
    return settings.model_copy(
        update={
            "base": location(settings.base, root),
            "selection": benchmark_location(settings.selection, root),
            "directory": root / settings.directory,
            "state": root / settings.state,
        }
    )
