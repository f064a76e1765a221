import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.candidate import verify
from deploy.registry import models
from deploy.store import connect

DYING = Path(__file__).with_name("dying.py")


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


@pytest.mark.parametrize(("set_up", "stride"), [("before", 5), ("by the child", 31)])
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
    told = json.loads(ran.stdout)
    assert told["steps"] > 15
    for home in told["homes"]:
        _assert_one_of_everything(Path(home))


def test_processes_that_race_on_a_fresh_store_register_one_version(predicted: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from deploy.registry import register\n"
        "made = register(Path(sys.argv[1]), name='tiny', tracking_uri=sys.argv[2], metrics={'accuracy': 0.5})\n"
        "sys.stdout.write(f'{made.version} {made.created}')"
    )
    arguments = [sys.executable, "-c", program, str(predicted), f"sqlite:///{tmp_path}/mlflow.db"]
    racers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [racer.communicate()[0] for racer in racers]
    assert sorted(told) == ["1 False", "1 False", "1 True"]
    _assert_one_of_everything(tmp_path)
