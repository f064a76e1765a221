"""What a user says about one training run, in `relex.yaml`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from flows.config import GIVEN, Compute, Name, benchmark_location, location, read_config
from flows.errors import ConfigError
from relex.errors import RelexError
from relex.files.location import is_remote

_REMOTE_POLL_SECONDS = 30.0
# What validators are told where methods are not needed.
AS_WRITTEN = {"methods": "as written"}

Step = Annotated[int, Field(gt=0)]
# Of two branches a wrong value would be said twice.
_ONE = Discriminator(lambda value: "auto" if value == "auto" else GIVEN)
Auto = Annotated[Literal["auto"], Tag("auto")]
StepOrAuto = Annotated[Annotated[Step, Tag(GIVEN)] | Auto, _ONE]


def _listed(value: object) -> object:
    return [value] if isinstance(value, int | str) else value


_Steps = Annotated[list[Step], Field(min_length=1)]
Steps = Annotated[_Steps, BeforeValidator(_listed, json_schema_input_type=Step | _Steps)]
Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
StepsOrAuto = Annotated[Annotated[Steps, Tag(GIVEN)] | Auto, _ONE]
SpecsOrAuto = Annotated[Annotated[Texts, Field(min_length=1), Tag(GIVEN)] | Auto, _ONE]


class Settings(Compute):
    """One training run to watch. Relative paths are relative to the file; unknown keys are refused."""

    training_run: Name = Field(description="Name of the training run: lower-case letters, digits and dashes.")
    checkpoints: str = Field(description="Directory or URL the trainer writes its checkpoints to.")
    base: str = Field(description="Directory or URL of the model the training run started from.")
    window: StepOrAuto = Field(
        description="Training step up to which checkpoints are observed; auto: until the backtest has converged."
    )
    max_window: Step | None = Field(default=None, description="With window auto: decide at this step at the latest.")
    targets: StepsOrAuto = Field(
        description="Training steps to predict; auto: a ladder up to total_steps, climbed while scores last."
    )
    total_steps: Step | None = Field(
        default=None,
        description="Training steps the run is planned for: where a ladder of auto targets ends at the latest.",
    )
    methods: SpecsOrAuto = Field(
        default=["relex"],
        description="Methods, as NAME or NAME:parameter=value; auto: relex, secant and the one that the backtest"
        " trusts.",
    )
    attempts: int = Field(
        default=3,
        gt=0,
        description="With window auto: how many windows may go to the gate, which share most of its error equally.",
    )
    selection: str = Field(description="Benchmark that chooses among the candidates: a name or a YAML file.")
    gate: str = Field(description="Benchmark that decides on the chosen one: a name or a YAML file.")
    report: Texts = Field(default=[], description="Benchmarks that are scored for the reader and decide nothing.")
    margin: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="How much worse than the last observed checkpoint may pass, in accuracy; 0: must be better.",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="One-sided confidence of the gate.")
    guards: dict[str, Annotated[float, Field(gt=0.0, lt=100.0)]] = Field(
        default={},
        description="Benchmarks that a candidate must not lose on, each with the points it may lose, such as 2. Scored"
        " for the one that passed the gate; they share the error, and all must be shown to hold.",
    )
    divergence: bool = Field(
        default=False,
        description="Also say how far candidate and last observed checkpoint are from the base on the tokens of the"
        " gate's first 64 prompts, in nats: decides nothing, and needs room for two models at once in transformers.",
    )
    registered_model: Name = Field(description="Name in the MLflow registry; predictions go to NAME-candidates.")
    state: Path = Field(
        default=Path(".relex"), description="Directory for everything relex keeps about this run, made when missing."
    )
    output_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="Precision of predictions and of the last observed copy: bfloat16 loses deltas that float32 keeps;"
        " by default the base's.",
    )
    shard_size: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Size of a prediction's files at most, such as 2GiB; by default those of the base.",
    )
    task_runner: Literal["threads", "dask"] = Field(
        default="threads",
        description="Who writes predictions: the threads of one process, or Dask workers, a file each.",
    )
    dask_address: str | None = Field(
        default=None,
        pattern=r"^(tcp|tls|ucx)://.+",
        description="Scheduler of the Dask workers, such as tcp://host:8786; by default workers of this machine.",
    )
    cache: ByteSize = Field(
        default=ByteSize(8 << 30), description="Disk for what is read from a URL, until it has been read, such as 8GiB."
    )
    poll_seconds: float = Field(
        default=2.0, gt=0, description="How often the watcher looks at the directory; by default 30 s at a URL."
    )
    stop_command: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="Run once, when the training is no longer needed: a line for the shell, or words."
    )
    stop_file: Path | None = Field(
        default=None, description="Written once, when the training is no longer needed; see StopOnFile."
    )
    stop: Literal["approve", "at-once"] = Field(
        default="approve", description="Whether somebody is asked before the training is stopped."
    )
    stop_price: float = Field(
        default=2.0,
        ge=0.0,
        le=100.0,
        description="Points of accuracy that training on may still win where a stop is offered.",
    )
    score_every: Step | None = Field(
        default=None,
        description="Score observed checkpoints so many steps apart on the selection problems, as they appear; the best"
        " is one more that a prediction has to beat.",
    )
    ceiling: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Accuracy on the gate that no model exceeds, such as 0.95 where 5 % of"
        " the right answers are wrong.",
    )
    notify: Texts = Field(
        default=[],
        description="Whom to tell of decisions, failures, drift, an overtaken model and stops: a webhook that takes"
        " JSON, or any address of apprise.",
    )
    drift: Literal["weights", "accuracy", "off"] = Field(
        default="weights", description="What is compared when the run reaches a step that was predicted."
    )
    pin: Literal["none", "link", "copy"] = Field(
        default="none",
        description="Keep the window's checkpoints from a trainer that deletes them: by hard links, or by copies.",
    )

    @field_validator("methods")
    @classmethod
    def _known(cls, specs: list[str] | str, info: ValidationInfo) -> list[str] | str:
        if isinstance(specs, str) or info.context == AS_WRITTEN:
            return specs
        # torch comes with it, and takes seconds.
        from relex.predictors import parse_method

        try:
            return [parse_method(spec).spec for spec in specs]
        except RelexError as error:
            raise ValueError(str(error)) from error

    @field_validator("targets")
    @classmethod
    def _distinct(cls, targets: list[int] | str) -> list[int] | str:
        if isinstance(targets, str):
            return targets
        if len(set(targets)) != len(targets):
            raise ValueError(f"a target is named twice in {targets}")
        return sorted(targets)

    @property
    def end(self) -> int:
        """The training step after which nothing more is observed."""
        end = self.max_window if self.window == "auto" else self.window
        assert end is not None  # load_settings refuses window auto without it
        return end

    @property
    def home(self) -> Path:
        """Where this training run's state lies."""
        return self.state / self.training_run

    @property
    def pins(self) -> Path:
        """Where the checkpoints of the window are kept when they are pinned, as the trainer's own tree."""
        return self.home / "pins"

    @property
    def store(self) -> str:
        """Where the window is read from: the pins, or what the trainer writes to."""
        return self.checkpoints if self.pin == "none" else str(self.pins)


def load_settings(path: Path, *, look: bool = False) -> Settings:
    """Read and check `relex.yaml`; raises ConfigError with every wrong key in one line.

    Whoever only takes a `look` at a run has its methods as they are written: the watcher has checked them.
    """
    settings = read_config(path, Settings, context=AS_WRITTEN if look else None)
    _refuse_window(settings, path)
    if settings.selection == settings.gate:
        raise ConfigError(
            f"config {path}: selection and gate are both {settings.gate}. What chose a candidate cannot judge it: give"
            " them different problems."
        )
    for guard in settings.guards:
        if guard in (settings.selection, settings.gate):
            key = "gate" if guard == settings.gate else "selection"
            raise ConfigError(
                f"config {path}: {guard} is among guards and is {key} too. A guard is of problems that neither chose"
                " nor decided: take another benchmark, or leave it out."
            )
    if settings.pin != "none" and "://" in settings.checkpoints:
        raise ConfigError(
            f"config {path}: pin is {settings.pin} and checkpoints is {settings.checkpoints}, which is no directory of"
            " this machine. Leave pin out, and let the trainer keep the window's checkpoints."
        )
    _refuse_workers(settings, path)
    root = path.absolute().parent
    stores = {key: location(getattr(settings, key), root) for key in ("checkpoints", "base")}
    benchmarks = {key: benchmark_location(getattr(settings, key), root) for key in ("selection", "gate")}
    report = [benchmark_location(benchmark, root) for benchmark in settings.report]
    # A store on the network counts what it is asked.
    slow = any(map(is_remote, stores.values())) and "poll_seconds" not in settings.model_fields_set
    pace = {"poll_seconds": _REMOTE_POLL_SECONDS} if slow else {}
    guards = {benchmark_location(benchmark, root): margin for benchmark, margin in settings.guards.items()}
    places = stores | benchmarks | {"state": root / settings.state, "report": report, "guards": guards}
    if settings.stop_file is not None:
        places["stop_file"] = root / settings.stop_file
    return settings.model_copy(update=places | pace)


def _refuse_window(settings: Settings, path: Path) -> None:
    if settings.window == "auto" and settings.max_window is None:
        raise ConfigError(
            f"config {path}: window is auto and max_window is not given. Give the step to decide at when the backtest"
            " has not converged before, such as 20 % of the planned steps."
        )
    if settings.window != "auto" and settings.max_window is not None:
        raise ConfigError(
            f"config {path}: max_window is {settings.max_window} and window is {settings.window}. Leave max_window out,"
            " or set window: auto."
        )
    if settings.targets != "auto" and settings.targets[0] <= settings.end:
        name = "max_window" if settings.window == "auto" else "window"
        raise ConfigError(
            f"config {path}: target {settings.targets[0]} is not beyond the {name} {settings.end}. Give later ones."
        )
    if settings.total_steps is not None and settings.total_steps <= settings.end:
        raise ConfigError(
            f"config {path}: total_steps is {settings.total_steps} and step {settings.end} is still observed: nothing"
            " is left to predict. Decide earlier."
        )


def _refuse_workers(settings: Settings, path: Path) -> None:
    if settings.dask_address is not None and settings.task_runner != "dask":
        raise ConfigError(
            f"config {path}: dask_address is {settings.dask_address} and task_runner is {settings.task_runner}. Set"
            " task_runner: dask, or leave dask_address out."
        )
    if settings.task_runner == "dask" and find_spec("prefect_dask") is None:
        raise ConfigError(
            f"config {path}: task_runner is dask and prefect-dask is not installed. Run pip install 'relex-rlvr[dask]'."
        )
