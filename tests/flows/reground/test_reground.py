"""Re-grounding with a real trainer of a fraction of a second: what it computes, judges, refuses and survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from deploy.local import daemon
from deploy.local.own_code import own_code
from evaluation.answers.fingerprint import fingerprint
from evaluation.benchmarks.benchmark import write_benchmark
from evaluation.errors import BackendError
from flows.errors import ConfigError, RegroundError, TrainerError
from flows.reground.cycle import Plan, Trained, jump, score
from flows.reground.loop import Regrounding, reground
from flows.reground.page import page
from flows.reground.settings import Reference, RegroundSettings, load_reground_settings
from flows.reground.trainer import TEMPLATES, fill, run_trainer
from flows.state.lock import held
from relex.errors import DuplicateError
from tests.helpers import ROOT
from tests.helpers.larger_digit import larger, write_models
from tests.helpers.straight_run import WriteCheckpoint

HERE = Path(__file__).parent

REAL, JUMP, TOTAL = 4, 8, 16
# The first cycle in the order of its events; after its last there is the second.
POINTS = (
    "start.json-1",
    "train",
    "trained.json-1",
    f"step-{REAL}-1",
    f"step-{REAL + JUMP}-1",
    "jumped.json-1",
    "score",
    "cycle.json-1",
    "reground.json-2",
    "trained.json-2",
)


def silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Scene:
    """A base, a teacher, a benchmark, and an uninterrupted run."""

    root: Path
    settings: RegroundSettings
    whole: Regrounding


def write_config(root: Path, name: str, *options: str, **changes: Any) -> Path:
    content = {
        "training_run": name,
        "base": "base",
        "command": [
            *(sys.executable, str(HERE / "weight_trainer.py"), "--teacher", "teacher", "--base", "{base}"),
            *("--out", "{out}", "--steps", "{steps}", "--seed", "{cycle}", *options),
        ],
        "real_steps": REAL,
        "jump_steps": JUMP,
        "method": "weight-extrapolation",
        "selection": "larger.yaml",
        "total_steps": TOTAL,
        "memory": "64MiB",
        "threads": 1,
        "batch_size": 100,
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("reground")
    write_models(root)
    write_benchmark(root, "larger", larger(), max_new_tokens=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        settings = load_reground_settings(write_config(root, "whole"))
        yield Scene(root, settings, reground(settings, tell=silent))


def begin(scene: Scene, name: str, *options: str, **changes: Any) -> RegroundSettings:
    """Configure another run in the same place that knows the answers of the uninterrupted one."""
    settings = load_reground_settings(write_config(scene.root, name, *options, **changes))
    shutil.copytree(scene.settings.home / "evaluations", settings.home / "evaluations")
    return settings


def numbers(result: Regrounding) -> list[tuple[object, ...]]:
    return [
        (each.number, each.start_step, each.real_steps, each.jumped_steps, each.accuracy, each.jumped_accuracy)
        for each in result.cycles
    ]


def weights(model: str) -> dict[str, bytes]:
    """Return every file of a model but the manifest, which names the directories it was made from."""
    return {path.name: path.read_bytes() for path in Path(model).iterdir() if path.name != "relex.json"}


def test_real_steps_and_jumps_alternate_and_every_step_is_accounted_for(scene: Scene) -> None:
    result = scene.whole
    first, second = result.cycles
    assert (first.start_step, first.real_steps, first.jumped_steps, first.end_step) == (0, REAL, JUMP, REAL + JUMP)
    # No room for a jump before the total: the last cycle has real steps only.
    assert (second.start_step, second.real_steps, second.jumped_steps, second.end_step) == (12, REAL, 0, TOTAL)
    assert second.base == first.model
    assert first.jumped_accuracy is not None
    assert result.start.accuracy < first.observed_accuracy < first.jumped_accuracy < second.accuracy
    assert (result.step, result.real_steps, result.accuracy) == (TOTAL, 2 * REAL, second.accuracy)
    assert result.ended == "step 16 is the total 16 or above"
    base, model = (load_file(Path(place) / "model.safetensors") for place in (first.base, first.model))
    last = load_file(scene.settings.cycle_directory(1) / f"run-1/checkpoint-{REAL}/model.safetensors")
    for name, start in base.items():
        # Norms are copied from the checkpoint, as this method has it.
        slope = 1 if "norm" in name else (REAL + JUMP) / REAL
        torch.testing.assert_close(model[name], start + slope * (last[name] - start), rtol=0, atol=1e-5)
    assert json.loads((scene.settings.home / "reground.json").read_text())["jumped_steps"] == JUMP
    assert f"| 1 | 0 | 4 | 8 | {first.observed_accuracy:.4f} | {first.jumped_accuracy:.4f} | yes |" in page(result)


@pytest.fixture(scope="module")
def killed(scene: Scene) -> Iterator[dict[str, RegroundSettings]]:
    """Kill a run of its own at every point."""
    runs = {}
    digest = f'"model_digest": "{fingerprint(Path(scene.whole.cycles[0].model)).digest}"'
    command = [sys.executable, str(HERE / "dying_reground.py")]
    for number, point in enumerate(POINTS):
        options = ("--hang-in", "0001/run-1") if point == "train" else ()
        runs[point] = begin(scene, f"killed-{number}", *options)
        command += [str(scene.root / f"killed-{number}.yaml"), point]
        if point == "score":
            shutil.rmtree(
                next(path.parent for path in runs[point].home.rglob("report.json") if digest in path.read_text())
            )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        assert done.stdout.splitlines() == [f"{point} -9" for point in POINTS], done.stderr
        yield runs
    finally:
        daemon.stop(runs["train"].home, ["cycle-1"])


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_same_call_ends_in_the_same_model(
    scene: Scene, killed: dict[str, RegroundSettings], point: str
) -> None:
    settings = killed[point]
    finished = {path: path.stat().st_mtime_ns for path in settings.home.rglob("*.json")}
    left = daemon.find(settings.home, "cycle-1")
    assert (left is not None and left.state == "running") == (point == "train")
    outcome = reground(settings, tell=silent)
    assert left is None or left.pid is None or not psutil.pid_exists(left.pid)
    assert numbers(outcome) == numbers(scene.whole)
    assert weights(outcome.model) == weights(scene.whole.model)
    # What was finished was not done again, and of a training cut short nothing is left, neither process nor directory.
    for name in ("trained.json", "jumped.json", "cycle.json"):
        for path in settings.home.rglob(name):
            assert path.stat().st_mtime_ns == finished.get(path, path.stat().st_mtime_ns)
    assert len(list(settings.home.glob("cycles/*/run-*"))) == 2


@pytest.mark.slow
def test_a_ladder_takes_the_best_jump_and_killed_while_it_climbs_it_pays_for_no_answer_again(scene: Scene) -> None:
    settings = begin(scene, "ladder", jump_steps="auto", method="secant", total_steps=12)
    command = [sys.executable, str(HERE / "dying_reground.py"), str(scene.root / "ladder.yaml"), "step-7-1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert died.stdout == "step-7-1 -9\n", died.stderr
    # Rungs 5 and 6 were written and scored in one pass, and 7 was about to be there.
    models = settings.cycle_directory(1) / "models/secant"
    assert sorted(path.name for path in models.glob("step-*")) == ["step-5", "step-6"]
    reports = {path: path.stat().st_mtime_ns for path in settings.home.rglob("report.json")}
    outcome = reground(settings, tell=silent)
    first = outcome.cycles[0]
    assert [rung.step for rung in first.ladder[:4]] == [5, 6, 7, 8]
    best = max(rung.accuracy for rung in first.ladder)
    assert first.jumped_accuracy == best
    assert first.start_step + first.real_steps + first.jumped_steps in {
        rung.step for rung in first.ladder if rung.accuracy == best
    }
    assert first.answers == 100 * len(first.ladder)
    assert all(path.stat().st_mtime_ns == written for path, written in reports.items())
    for journal in settings.home.glob("evaluations/*/journal.jsonl"):
        chunks = [json.loads(line)["chunk"] for line in journal.read_text().splitlines()]
        assert len(chunks) == len(set(chunks))
    # Of the rungs only the chosen one stays, and the page tells them all.
    assert [str(path) for path in models.glob("step-*")] == [first.model]
    assert f"Ladder of secant, {first.answers} answers, first 100 problems: 5: " in page(outcome)


@pytest.mark.slow
def test_a_jump_that_hurts_is_not_taken(scene: Scene) -> None:
    reached = scene.whole.cycles[0].observed_accuracy
    settings = begin(scene, "hurt", jump_steps=4000, total_steps=9000, target_accuracy=reached)
    outcome = reground(settings, tell=silent)
    (cycle,) = outcome.cycles
    assert cycle.jumped_accuracy is not None
    assert cycle.jumped_accuracy < cycle.observed_accuracy == outcome.accuracy
    assert (cycle.jumped_steps, outcome.step) == (0, REAL)
    assert "hurts: the next steps start from the checkpoint" in cycle.reason
    checkpoint = settings.cycle_directory(1) / f"run-1/checkpoint-{REAL}"
    assert weights(outcome.model)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert outcome.ended == f"accuracy {reached:.4f} on larger is the target {reached} or above"


def test_what_was_saved_is_told_when_the_reference_was_reached(scene: Scene) -> None:
    reference = Reference(steps=30, seconds=60.0)
    result = Regrounding(**{**vars(scene.whole), "reference": reference, "target_accuracy": scene.whole.accuracy})
    assert result.to_json()["saved_steps"] == 30 - 2 * REAL
    assert "Plain RL took 30 steps to it: 22 saved" in page(result)
    above = Regrounding(**{**vars(result), "target_accuracy": 1.0})
    assert "saved_steps" not in above.to_json()


@pytest.mark.slow
def test_only_the_chosen_models_of_finished_cycles_stay_when_asked(scene: Scene) -> None:
    settings = begin(scene, "frugal", keep="chosen")
    outcome = reground(settings, tell=silent)
    assert weights(outcome.model) == weights(scene.whole.model)
    kept = {str(path.parent) for path in settings.home.rglob("cycles/**/model.safetensors")}
    assert kept == {cycle.model for cycle in outcome.cycles}
    # And the next call finds all it needs.
    assert numbers(reground(settings, tell=silent)) == numbers(scene.whole)


def test_one_process_at_a_time(scene: Scene) -> None:
    with held(scene.settings.home / "lock", seconds=0.0) as mine:
        assert mine
        with pytest.raises(RegroundError, match="another process is at work"):
            reground(scene.settings, tell=silent)


def test_another_base_is_refused_in_one_line(scene: Scene) -> None:
    other = scene.settings.model_copy(update={"base": scene.whole.cycles[0].model})
    with pytest.raises(RegroundError, match=r"was begun with sha256 .* of its base, and base .* has") as caught:
        reground(other, tell=silent)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_trainer_that_stops_early_is_refused_and_trained_again_by_the_next_call(scene: Scene) -> None:
    settings = begin(scene, "early", "--stop-at", "5", real_steps=6)
    with pytest.raises(TrainerError, match=r"was told 6 steps and its last checkpoint in .* is of step 4"):
        reground(settings, tell=silent)
    mended = load_reground_settings(write_config(scene.root, "early"))
    assert numbers(reground(mended, tell=silent)) == numbers(scene.whole)
    assert mended.cycle_directory(1).joinpath("run-2").is_dir()


@pytest.mark.slow
def test_a_terminated_command_ends_its_trainer(scene: Scene) -> None:
    settings = begin(scene, "terminated", "--hang-in", "0001/run-1")
    argv = [sys.executable, "-m", "flows.cli", "reground", str(scene.root / "terminated.yaml")]
    with subprocess.Popen(argv, cwd=ROOT) as command:
        try:
            end = time.monotonic() + 400
            checkpoint = settings.cycle_directory(1) / "run-1/checkpoint-2/trainer_state.json"
            while not checkpoint.exists() and command.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            started = daemon.find(settings.home, "cycle-1")
            assert started is not None
            assert started.pid is not None
            command.send_signal(signal.SIGTERM)
            assert command.wait(240) == 130
            assert not psutil.pid_exists(started.pid)
        finally:
            command.kill()
            daemon.stop(settings.home, ["cycle-1"])


def test_without_a_prediction_the_cycle_goes_on_from_its_last_checkpoint(
    scene: Scene, tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    base, ten, _, forty = (write_checkpoint(step) for step in (0, 10, 20, 40))
    run = tmp_path / "run"
    shutil.copy(run / "checkpoint-10/model.safetensors", run / "checkpoint-20/model.safetensors")
    (run / "checkpoint-20/trainer_state.json").touch()
    settings = scene.settings.model_copy(update={"state": tmp_path, "total_steps": 100})
    plan, trained = Plan(1, str(base), 0), Trained(str(run), (10, 20, 40), (), 1.0)
    jumped = jump(settings, plan, trained, tell=silent)
    assert jumped.reason.startswith("Cannot predict: ")
    assert (jumped.jumped, jumped.steps) == ("", 0)
    last, model = (load_file(place / "model.safetensors") for place in (forty, Path(jumped.observed)))
    assert torch.equal(model["weight"], last["weight"])
    assert jump(settings, plan, trained, tell=silent) == jumped
    # A training that moves nothing at all is an error, not a cycle.
    for step in (20, 40):
        shutil.copy(ten / "model.safetensors", run / f"checkpoint-{step}/model.safetensors")
        (run / f"checkpoint-{step}/trainer_state.json").touch()
    with pytest.raises(DuplicateError):
        jump(settings, Plan(2, str(base), 0), trained, tell=silent)


VALUES = {"base": "/models/a", "out": "/state/run-1", "steps": "24", "cycle": "3"}


def test_trl_and_verl_are_told_where_to_start_how_far_and_where_to_write() -> None:
    assert fill(TEMPLATES["trl"], VALUES) == (
        *("--model_name_or_path", "/models/a", "--max_steps", "24", "--output_dir", "/state/run-1"),
    )
    assert fill(TEMPLATES["verl"], VALUES) == (
        "actor_rollout_ref.model.path=/models/a",
        "trainer.total_training_steps=24",
        "trainer.default_local_dir=/state/run-1",
        "trainer.resume_mode=disable",
    )
    # Other braces belong to the trainer.
    assert fill(["+a={x:1}", "seed-{cycle}{cycle}", "{{steps}}"], VALUES) == ("+a={x:1}", "seed-33", "{24}")


def test_a_cycle_is_scored_by_what_the_config_says_answers(scene: Scene) -> None:
    engine = scene.settings.model_copy(update={"backend": "vllm"})
    with pytest.raises(BackendError, match="backend is vllm and vLLM is not installed"):
        score(engine, Path(engine.base), what="score", tell=silent)


def test_a_failing_trainer_is_one_line_with_its_last_words_and_its_log(tmp_path: Path) -> None:
    argv = ["sh", "-c", "echo out of memory; echo; exit 3"]
    with pytest.raises(TrainerError, match=r"ended with status 3: out of memory \(all of it in .*cycle-1\.log\)") as it:
        run_trainer(tmp_path, "cycle-1", argv, directory=tmp_path, on_wait=lambda: None)
    assert "\n" not in str(it.value)
    with pytest.raises(TrainerError, match=r"ended with status 127: .*no-such-trainer"):
        run_trainer(tmp_path, "cycle-2", ["no-such-trainer"], directory=tmp_path, on_wait=lambda: None)


def test_what_a_trainer_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    argv = ["sh", "-c", "sleep 600 & echo $! > child; pwd > where"]
    assert run_trainer(tmp_path, "cycle-1", argv, directory=tmp_path, on_wait=lambda: None) < 60
    assert (tmp_path / "where").read_text().strip() == str(tmp_path)
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_a_trainer_has_its_own_directory_to_import_from_also_where_relex_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own_code({}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "flows.py").write_text("open('imported', 'w')")
    run_trainer(tmp_path, "one", [sys.executable, "-c", "import flows"], directory=tmp_path, on_wait=lambda: None)
    assert (tmp_path / "imported").exists()


def test_a_command_in_one_line_is_split_like_a_shell_does(tmp_path: Path) -> None:
    path = write_config(tmp_path, "line", command="python 'my train.py' --seed {cycle}", trainer="trl", base="s3://a/b")
    settings = load_reground_settings(path)
    assert settings.command == ("python", "my train.py", "--seed", "{cycle}")
    assert (settings.base, settings.directory, settings.selection) == (
        "s3://a/b",
        tmp_path,
        str(tmp_path / "larger.yaml"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"command": "train {base}"}, r"the command does not say \{out\}, \{steps\}"),
        ({"command": []}, r"command \(line \d+\): Tuple should have at least 1 item"),
        ({"method": "relx"}, "method 'relx' is not known"),
        ({"real_step": 3}, r"real_step \(line \d+\) is no key. Did you mean real_steps\?"),
        ({"trainer": "openrlhf"}, r"trainer \(line \d+\): Input should be 'own', 'trl' or 'verl'"),
        ({"reference": {"steps": 30}}, "target_accuracy is missing"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_reground_settings(write_config(tmp_path, "wrong", **changes))
    assert "\n" not in str(caught.value)


def test_every_field_is_documented() -> None:
    fields = (*RegroundSettings.model_fields.values(), *Reference.model_fields.values())
    assert all(field.description for field in fields)
