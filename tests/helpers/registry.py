"""Candidates of a few bytes, registered with gate results whose numbers are made up, in an MLflow store."""

import json
from collections.abc import Sequence
from pathlib import Path

from deploy import champions, registry
from evaluation.verdict.report import Report
from flows.decide.gate_results import write_gate_results
from flows.promote.promotion import Promotion, promote, rollback, settle
from flows.state.decision import Model
from tests.helpers.predictions import write_prediction

# On 40 problems, so many right answers: the later are better than the earlier, beyond doubt.
OBSERVED, GOOD, BETTER, BEST = 8, 16, 24, 32
PROBLEMS = 40


def report(solved: int, *, digest: str = "one", batch_size: int = 64) -> Report:
    return Report(
        model="model",
        model_digest="0",
        benchmark="digits-gate",
        benchmark_digest=digest,
        metric="exact_match",
        scores=tuple((f"problem {number}", float(number < solved)) for number in range(PROBLEMS)),
        rates={},
        settings={"batch_size": batch_size},
        seconds=1.0,
    )


class Registry:
    """One store, and predictions registered in it with their gate results."""

    def __init__(self, home: Path, uri: str) -> None:
        self.home, self.uri = home, uri

    def add(
        self,
        number: int,
        solved: int,
        *,
        name: str = "tiny",
        against: Sequence[tuple[int, int]] = (),
        digest: str = "one",
        batch_size: int = 64,
    ) -> registry.Registered:
        """Register prediction `number`; `against` are champions it was judged against: their numbers and scores."""
        path = self.home / f"prediction-{number}"
        if not path.exists():
            write_prediction(path, number=number)
        told = report(solved, digest=digest, batch_size=batch_size)
        references = [(Model("observed", 48, "seen"), report(OBSERVED, digest=digest, batch_size=batch_size))]
        for other, score in against:
            model = Model("champion", 240, "there", digest=self.digest(other))
            references.append((model, report(score, digest=digest, batch_size=batch_size)))
        results = write_gate_results(
            self.home / f"gate-{number}-{digest}-{batch_size}.json",
            (Model("candidate", 240, str(path), "relex", self.digest(number)), told),
            references,
            margin=0.0,
            confidence=0.95,
        )
        return registry.register(path, name=name, tracking_uri=self.uri, gate_reports=[results])

    def digest(self, number: int) -> str:
        content = json.loads((self.home / f"prediction-{number}" / "relex.json").read_text())
        return str(content["digest"])

    def promote(
        self, version: int | None = None, *, name: str = "tiny", by: str = "ada", insist: str = ""
    ) -> Promotion:
        return promote(name, version, tracking_uri=self.uri, by=by, downloads=self.home / "models", insist=insist)

    def settle(self, name: str = "tiny") -> list[Promotion]:
        return settle(name, tracking_uri=self.uri, downloads=self.home / "models")

    def rollback(self, name: str = "tiny") -> Promotion:
        return rollback(name, tracking_uri=self.uri, by="ada", downloads=self.home / "models")

    def champion(self, name: str = "tiny") -> int | None:
        current = registry.champion(name, tracking_uri=self.uri)
        return None if current is None else current.version

    def trail(self) -> list[tuple[str, int | None, int | None]]:
        return [
            (entry.verdict, entry.from_version, entry.to_version)
            for entry in champions.history("tiny", tracking_uri=self.uri)
        ]
