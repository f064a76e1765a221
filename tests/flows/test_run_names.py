"""What lists in the Prefect UI call the runs, and what the tasks write to their logs."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.verdict.report import Report
from flows import run_names
from flows.decide import flow, stages
from flows.progress import log_result
from flows.state.decision import Model
from relex.backtest.convergence import Proposal


@pytest.mark.parametrize(
    ("content", "expected"),
    [("training_run: qwen-math\n", "qwen-math"), ("- a list\n", "settings"), ("{", "settings"), (None, "settings")],
)
def test_a_flow_run_is_named_after_its_training_run_or_else_its_file(
    content: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "settings.yaml"
    if content is not None:
        config.write_text(content)
    monkeypatch.setattr(
        run_names, "flow_run", SimpleNamespace(parameters={"config": str(config), "steps": [8, 48], "key": "0123"})
    )
    assert (
        run_names.flow_run_name(lambda run, given: f"decide {run} at step {max(given['steps'])}")()
        == f"decide {expected} at step 48"
    )


def test_two_rungs_of_one_model_and_two_scores_of_one_rung_have_names_of_their_own(tmp_path: Path) -> None:
    def name(step: int, limit: int | None) -> str:
        model = Model("candidate", step, "directory", "relex")
        benchmarks = [str(tmp_path / "rev-select.yaml"), "gsm8k"]
        return flow.name_of_score({"model": model, "benchmarks": benchmarks, "limit": limit})

    assert name(200, None) == "score relex @ 200 on rev-select and gsm8k"
    assert name(200, 100) == "score relex @ 200 on rev-select and gsm8k, first 100"
    assert len({name(200, None), name(200, 100), name(280, None)}) == 3
    proposals = [Proposal("relex", 200, None), Proposal("secant", 200, None)]
    assert flow.name_of_writing({"proposals": proposals}) == "write relex @ 200, secant @ 200"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((1.0,) * 155 + (0.0,) * 245, "155/400 = 0.388, 7 s"), ((0.5, 0.25, 0.0, 0.0), "0.75/4 = 0.188, 7 s")],
)
def test_the_log_of_a_task_says_what_was_scored(
    scores: tuple[float, ...],
    expected: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = tuple((str(number), value) for number, value in enumerate(scores))
    report = Report("m", "d", "rev-select", "d", "exact_match", listed, {}, {}, 7.2)
    monkeypatch.setattr(stages, "reports", lambda *_, **__: [report])
    monkeypatch.setattr(stages, "ProgressArtifact", lambda *_: None)
    settings: Any = SimpleNamespace(training_run="rev")
    with caplog.at_level(logging.INFO):
        stages.score_model(settings, Model("candidate", 200, "directory", "relex"), ["rev-select"], None)
    assert f"score relex @ 200 on rev-select: {expected}" in caplog.messages


def test_outside_a_run_a_line_goes_to_the_log_of_the_process(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_result("champion: none")
    assert ("flows.progress", logging.INFO, "champion: none") in caplog.record_tuples
