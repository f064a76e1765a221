"""What a candidate was judged by: its scores and those of what it was compared with, problem by problem, in one file.

The file is registered beside the weights, so that a promotion judges again, against whoever is champion then, without
scoring anything.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from evaluation.verdict.looks import Look
from evaluation.verdict.report import Report
from flows.errors import PromotionError
from flows.settings import Settings
from flows.state.decision import Model
from flows.state.records import write_json

FORMAT = 1


@dataclass(frozen=True)
class Scored:
    """One model's report on the gate benchmark; `model.digest` is the registry's, empty for what is not registered."""

    model: Model
    report: Report


@dataclass(frozen=True)
class GateResults:
    """Scores that were compared, and on which terms.

    `comparisons` windows or candidates share the error 1 - confidence; a `look` has its own (see
    evaluation.verdict.looks). `margin` is for the last observed checkpoint; a
    champion has to be beaten.
    """

    candidate: Scored
    references: tuple[Scored, ...]
    margin: float
    confidence: float
    # Gate results of earlier versions hold it as looks.
    comparisons: Annotated[int, Field(validation_alias=AliasChoices("comparisons", "looks"))]
    look: Look | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, text: str) -> "GateResults":
        """Read back what `write_gate_results` wrote; PromotionError where the text is anything else."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise PromotionError(
                    f"gate results have format {content['format']}, this relex reads {FORMAT}. Decide again."
                )
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PromotionError(
                f"registered gate results cannot be read ({where}: {first['msg']}). Decide again."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise PromotionError(f"registered gate results cannot be read ({error!r}). Decide again.") from error


def gate_results_path(settings: Settings, candidate: Model) -> Path:
    """Return where the gate of a training run leaves what it compared."""
    return settings.home / "gates" / f"{candidate.digest}.json"


def write_gate_results(
    path: Path,
    candidate: tuple[Model, Report],
    references: Sequence[tuple[Model, Report]],
    *,
    margin: float,
    confidence: float,
    comparisons: int = 1,
    look: Look | None = None,
) -> Path:
    """Write what the gate compared to `path`, for `deploy.registry.register(gate_reports=[path])`; returns the path."""
    results = GateResults(
        Scored(*candidate),
        tuple(Scored(*reference) for reference in references),
        margin,
        confidence,
        comparisons,
        look,
    )
    write_json(path, results.to_json())
    return path
