"""The script that makes the published models again, end to end against stand-ins of the same schema on a Hub."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save

import evaluation.answers.harness
from benchmarks import paper
from evaluation.benchmarks.data_directory import VARIABLE
from flows.demo.model import build_model, build_tokenizer
from tests.helpers.hub_server import Hub, files

STEPS = (25, 50, 75, 90, 100, 110)


def _data_set(split: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    held = io.BytesIO()
    datasets.Dataset.from_list(list(rows)).to_parquet(held)
    listed = f"configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: data/{split}-*"
    return {"README.md": f"---\n{listed}\n---\n".encode(), f"data/{split}-0.parquet": held.getvalue()}


def _push(hub: Hub, root: Path) -> None:
    """Let the Hub have the six data sets, two problems each, and the three runs with their bases, a branch a step."""
    for name, split, problem, answers in (
        ("TianHongZXY/AIME2025", "test", "problem", ("049", "7")),
        ("MathArena/aime_2026", "train", "problem", (277, 1)),
        ("MathArena/hmmt_feb_2025", "train", "problem", (r"\frac{1}{576}", "103")),
        ("TianHongZXY/amc23", "test", "question", (27.0, 3.0)),
        ("zwhe99/simplerl-OlympiadBench", "test", "question", (["2"], ["3"])),
    ):
        column = "final_answer" if "Olympiad" in name else "answer"
        rows = [{problem: f"Find {number}.", column: answer} for number, answer in enumerate(answers)]
        hub.make(f"datasets/{name}").commit(_data_set(split, rows))
    boxed = [{"problem": f"Compute {n}+0.", "solution": rf"$\boxed{{{n}}}$"} for n in range(2)]
    hub.make("datasets/TianHongZXY/MATH").commit(_data_set("test", boxed))
    tokenizer = build_tokenizer()
    for seed, run in enumerate(paper.RUNS):
        base = root / run.name
        build_model(tokenizer, seed=seed, width=32, layers=1).save_pretrained(base)
        tokenizer.save_pretrained(base)
        hub.make(run.base.removeprefix("hf://")).commit(files(base))
        trajectory = hub.make(run.run.removeprefix("hf://"))
        start = load_file(base / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        slope = {name: 1e-5 * torch.randn(value.shape, generator=generator) for name, value in start.items()}
        for step in STEPS:
            weights = {name: value + step * slope[name] for name, value in start.items()}
            config = {"config.json": (base / "config.json").read_bytes()}
            trajectory.commit({"model.safetensors": save(weights, {"format": "pt"}), **config}, branch=f"step_{step}")


def test_the_runs_are_those_that_the_documentation_names() -> None:
    text = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| RELEX-(\S+) \| `(\S+)` \| (\d+) \| (\d+) \| (\d+) \|", text)
    assert rows == [(run.name, run.run, *map(str, (run.window, run.label, run.target))) for run in paper.RUNS]


@pytest.mark.slow
def test_three_runs_are_predicted_scored_and_set_beside_the_published_figures_and_nothing_is_done_twice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    constants = huggingface_hub.constants
    template = re.sub(r"^https?://[^/]+", hub.url, constants.HUGGINGFACE_CO_URL_TEMPLATE)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "benchmarks"))
    monkeypatch.setattr(paper, "MEMORY", 64 << 20)
    _push(hub, tmp_path / "models")
    out = tmp_path / "out"
    paper.main(["--out", str(out), "--device", "cpu", "--disk", "1"])

    made = json.loads((out / "paper.json").read_text())["accuracy"]
    for run in paper.RUNS:
        assert list(made[run.name]) == [paper.BASE, paper.OBSERVED, paper.RELEX]
        assert all(list(scores) == [paper.MATH, *paper.OTHERS] for scores in made[run.name].values())
        told = json.loads((out / run.name / "relex" / f"step-{run.target}" / "relex.json").read_text())
        assert told["forecast"]["steps"] == [step for step in STEPS if step <= run.window]
        # The run is straight, and so is its prediction.
        held, end, base = (
            load_file(path / "model.safetensors")
            for path in (
                out / run.name / "hold" / f"step-{run.window}",
                out / run.name / "relex" / f"step-{run.target}",
                tmp_path / "models" / run.name,
            )
        )
        for name, value in base.items():
            expected = value + (held[name] - value) * run.target / run.window
            torch.testing.assert_close(end[name], expected, rtol=0, atol=1e-3)
    page = (out / "paper.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    for run in paper.RUNS:
        figures = run.figures[paper.RELEX]
        line = rf"\| RELEX @{run.label} \|( \d+\.\d ± \d+\.\d \|){{6}} \d+\.\d \| {figures.math} \| {figures.others} \|"
        assert re.search(line, page), page
    assert "| real run, step 500 |  |  |  |  |  |  |  | 71.5 | 28.4 |" in page

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(evaluation.answers.harness, "_run_workers", refuse)
    monkeypatch.setattr(paper, "extrapolate_run", refuse)
    monkeypatch.setattr(paper, "local_model", refuse)
    asked = len(hub.requests)
    paper.main(["--out", str(out), "--device", "cpu", "--disk", "1"])
    assert (out / "paper.md").read_text() == page
    assert len(hub.requests) == asked
