import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.candidate import verify
from deploy.registry import models
from deploy.tracking import connect

DYING = Path(__file__).with_name("dying_register.py")


def _assert_one_of_everything(home: Path) -> None:
    tracking_uri = f"sqlite:///{home}/mlflow.db"
    (row,) = models("tiny", tracking_uri=tracking_uri)
    assert (row.version, row.metrics) == (1, {"accuracy": 0.5})
    assert verify(Path(row.weights)).digest == row.digest

    client = connect(tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (logged,) = client.search_logged_models([experiment.experiment_id])
    assert logged.status == "READY"
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "tiny-candidates", "version": 1}]
    assert [(metric.key, metric.value) for metric in logged.metrics or []] == [("accuracy", 0.5)]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [path.name for path in home.rglob("*.partial")] == []
    assert len(list((home / "artifacts/tiny/models").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("set_up", "stride"), [("before", 7), ("by the child", 40)])
def test_a_registration_killed_at_any_step_is_completed_by_the_next_one(
    predicted: Path, template: Path, tmp_path: Path, set_up: str, stride: int
) -> None:
    start = str(template) if set_up == "before" else "-"
    ran = subprocess.run(
        [sys.executable, str(DYING), str(predicted), start, str(tmp_path), str(stride)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["steps"] > 15
    for home in report["homes"]:
        _assert_one_of_everything(Path(home))


@pytest.mark.slow
def test_processes_that_race_on_a_fresh_store_register_one_version(
    predicted: Path, template: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from deploy.registry import register\n"
        "def go(home):\n"
        "    uri = f'sqlite:///{home}/mlflow.db'\n"
        "    return register(Path(sys.argv[1]), name='tiny', tracking_uri=uri, metrics={'accuracy': 0.5})\n"
        "go(sys.argv[3])  # what is imported late would spread the racers out\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
        "made = go(sys.argv[2]); sys.stdout.write(f'{made.version} {made.created}')"
    )
    home = tmp_path / "shared"
    warm = [tmp_path / f"warm-{number}" for number in range(3)]
    for path in warm:
        path.mkdir()
        shutil.copy(template, path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(predicted), str(home), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in warm
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.communicate()[0] for racer in racers]
    assert sorted(answers) == ["1 False", "1 False", "1 True"]
    _assert_one_of_everything(home)
