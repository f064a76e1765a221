"""A ladder that is killed is climbed on: each answer is paid once, and the decision is the same."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evaluation.benchmarks.benchmark import write_benchmark
from flows.settings import Settings, load_settings
from flows.state.decision import Decision
from tests.helpers import ROOT
from tests.helpers.larger_digit import larger, write_models
from tests.helpers.straight_run import make_old

HERE = Path(__file__).parent


def write_config(root: Path, state: str) -> Path:
    content = {
        "training_run": "larger",
        "checkpoints": "run",
        "base": "base",
        "window": 12,
        "targets": "auto",
        "total_steps": 20,
        "selection": "selection.yaml",
        "gate": "gate.yaml",
        "guards": {"guard.yaml": 40},
        "divergence": True,
        "registered_model": "larger",
        "state": state,
        "batch_size": 25,
        "memory": "64MiB",
    }
    path = root / f"{state}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(config: Path, last: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "dying_ladder.py"), str(config), str(last)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def journals(settings: Settings) -> dict[str, list[str]]:
    """Return the chunks of answers of every evaluation."""
    paths = settings.home.glob("evaluations/*/journal.jsonl")
    return {path.parent.name: [json.loads(line)["chunk"] for line in path.read_text().splitlines()] for path in paths}


@pytest.mark.slow
def test_killed_in_the_middle_of_the_ladder_it_goes_on_and_pays_for_no_answer_again(tmp_path: Path) -> None:
    write_models(tmp_path)
    (tmp_path / "run").mkdir()
    trainer = ROOT / "tests/flows/reground/weight_trainer.py"
    options = ["--teacher", "teacher", "--base", "base", "--out", "run", "--steps", "12", "--save-steps", "1"]
    subprocess.run([sys.executable, str(trainer), *options], cwd=tmp_path, check=True)
    for path in sorted((tmp_path / "run").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])):
        make_old(path)
    rows = larger()
    # Nobody is right on these: nothing is lost.
    asked_twice = [{"prompt": 2 * row["prompt"], "answer": "none"} for row in rows[:40]]
    write_benchmark(tmp_path, "guard", asked_twice, max_new_tokens=2)
    write_benchmark(tmp_path, "selection", rows[::2], max_new_tokens=2)
    write_benchmark(tmp_path, "gate", rows[1::2], max_new_tokens=2)

    killed, whole = (load_settings(write_config(tmp_path, state)) for state in ("killed", "whole"))
    died = run(tmp_path / "killed.yaml", 4)
    assert died.returncode == -signal.SIGKILL, died.stderr
    # The last observed checkpoint, a rung and half of the next: what lies beyond is not there yet.
    before = journals(killed)
    assert [len(chunks) for chunks in before.values()].count(2) >= 2
    resumed, uninterrupted = (run(tmp_path / f"{state}.yaml", 0) for state in ("killed", "whole"))
    assert resumed.returncode == uninterrupted.returncode == 0, resumed.stderr + uninterrupted.stderr
    after = journals(killed)
    assert all(after[name][: len(chunks)] == chunks for name, chunks in before.items())
    assert all(len(chunks) == len(set(chunks)) for chunks in after.values())
    assert after == journals(whole)
    ours, theirs = (Decision.from_json(json.loads(done.stdout)) for done in (resumed, uninterrupted))
    assert len(ours.ladder) >= 3
    assert ours.ladder == theirs.ladder
    assert ours.cost[0] == theirs.cost[0]
    assert ours.verdict == theirs.verdict
    assert ours.guards == theirs.guards
    assert ours.divergence == theirs.divergence
    assert ours.winner is None or (ours.divergence is not None and ours.divergence.observed > 0)
    if all(gate.passed for gate in ours.gates):
        assert [guard.benchmark for guard in ours.guards] == ["guard"]
