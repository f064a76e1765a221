"""relex compare and relex analyze on a real tiny model: what they print is what the models do."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from evaluation.answers.fingerprint import fingerprint
from evaluation.benchmarks.benchmark import write_benchmark
from evaluation.verdict.report import Report
from flows.cli.gates import refuse_gates
from flows.errors import ConfigError
from flows.study.compare import difference
from tests.evaluation.conftest import write_model
from tests.helpers import cli
from tests.helpers.straight_run import make_old

WINDOW = (10, 25)
LATER = 100
PROBLEMS = [{"prompt": f"{number}+{number}=", "answer": str(2 * number)} for number in range(30)]


class Refused(Exception):
    """Exit status and what stood on stderr."""


def relex(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line in this process and return its stdout; a refusal is raised."""
    status, out, error = cli.relex(capsys, *arguments)
    if status:
        raise Refused(error)
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights move along a line, with some noise of its own at every step."""
    root = tmp_path_factory.mktemp("store")
    base = write_model(root / "base", seed=0)
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    slope = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    for step in (*WINDOW, LATER):
        path = root / "run" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        moved = {
            name: tensor + 2e-3 * (step * slope[name] + torch.randn(tensor.shape, generator=generator))
            for name, tensor in weights.items()
        }
        save_file(moved, path / "model.safetensors")
        path.joinpath("config.json").write_bytes((base / "config.json").read_bytes())
        path.joinpath("trainer_state.json").write_text("{}")
        make_old(path)
    write_benchmark(root, "sums", PROBLEMS, max_new_tokens=3)
    return root


def comparing(store: Path, *more: object) -> list[object]:
    arguments = ["compare", store / "run", "--base", store / "base", "--benchmark", store / "sums.yaml"]
    return [*arguments, "--cache", store / "cache", "--out", store / "out", "--window", WINDOW[-1], *more]


@pytest.fixture
def everything(store: Path) -> list[object]:
    """Every kind of row, each once."""
    return comparing(store, "--target-step", LATER, "--method", "relex", "--logits", "--reconstruct")


def rows(result: dict[str, Any]) -> list[tuple[str, int]]:
    return [(row["name"], row["step"]) for row in result["rows"]]


@pytest.mark.slow
def test_methods_stand_next_to_what_the_run_really_reached(
    store: Path, everything: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = json.loads(relex(capsys, *everything, "--json"))
    assert rows(printed) == [
        ("base", 0),
        ("last observed", 25),
        ("reconstruct rank 1", 25),
        ("fit-reconstruct rank 1", 25),
        ("real run", 100),
        ("relex", 100),
        ("logits-extrapolation", 100),
    ]
    by_name = {row["name"]: row for row in printed["rows"]}
    assert by_name["logits-extrapolation"]["model"].endswith("at alpha 4.0")
    real = load_file(store / "run" / f"checkpoint-{LATER}" / "model.safetensors")
    origin = load_file(store / "base" / "model.safetensors")
    copied = load_file(Path(by_name["real run"]["model"]) / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in real.items())
    made = load_file(Path(by_name["relex"]["model"]) / "model.safetensors")
    missed = sum(float((made[name] - tensor).double().square().sum()) for name, tensor in real.items())
    moved = sum(float((tensor - origin[name]).double().square().sum()) for name, tensor in real.items())
    near = by_name["relex"]["distance"]
    assert near["error"] == pytest.approx((missed / moved) ** 0.5, rel=1e-4)
    assert 0.5 < near["skill"] < 1
    assert by_name["relex"]["fit_seconds"] > 0
    assert printed["write_seconds"] > 0
    kept = list(map(Report.read, (store / "cache" / "evaluations").glob("sums-*/report.json")))
    by_digest = {report.model_digest: report for report in kept}
    # Equal models are scored once.
    reports = {report.model: report for report in kept} | {
        row["model"]: by_digest[fingerprint(Path(row["model"])).digest]
        for row in printed["rows"]
        if Path(row["model"]).is_dir()
    }
    reference = reports[by_name["last observed"]["model"]]
    for row in printed["rows"]:
        (score,) = row["accuracies"]
        assert score["accuracy"] == reports[row["model"]].accuracy
        if row["name"] == "last observed":
            assert score["difference"] is None
        else:
            expected = difference(reports[row["model"]], reference)
            assert (score["difference"], score["low"], score["high"]) == expected
            assert score["low"] <= score["difference"] <= score["high"]

    before = {path: path.stat().st_mtime_ns for path in (store / "out" / "models").rglob("*.safetensors")}
    table = relex(capsys, *everything)
    assert "logits-extrapolation" in table
    assert "4 models were there" not in table
    assert "3 models were there" in table
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads((store / "out" / "compare.json").read_text())
    assert again["write_seconds"] is None
    assert [row["accuracies"] for row in again["rows"]] == [row["accuracies"] for row in printed["rows"]]
    page = (store / "out" / "compare.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(printed["rows"])
    assert {line.replace("\\|", "").count("|") for line in lines} == {1 + 10}
    assert matplotlib.image.imread(store / "out" / "compare.png").std() > 0.05


def report(scores: list[float], model: str) -> Report:
    pairs = tuple((str(number), score) for number, score in enumerate(scores))
    return Report(model, model, "b", "d", "exact_match", pairs, {}, {}, 0.0)


@pytest.mark.parametrize("changed", [0, 3, 60])
def test_the_interval_holds_the_difference_and_is_as_wide_on_either_side_of_the_models(changed: int) -> None:
    reference = [float(number % 2) for number in range(200)]
    candidate = [1.0 if number < changed else score for number, score in enumerate(reference)]
    middle, low, high = difference(report(candidate, "c"), report(reference, "r"))
    assert low < middle < high
    back = difference(report(reference, "r"), report(candidate, "c"))
    assert back == pytest.approx((-middle, -high, -low), abs=1e-9)


def test_compare_refuses_in_one_line(store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for more, message in (
        (["--target-step", 20], "target step 20 is not beyond the window, which ends at step 25"),
        (["--target-step", LATER, "--method", "magic"], "method 'magic' is not known"),
        (["--target-step", LATER, "--benchmark", tmp_path / "none.yaml"], "none.yaml is no file, not shipped"),
    ):
        with pytest.raises(Refused, match=message) as caught:
            relex(capsys, *comparing(store, "--out", tmp_path / "out", *more))
        assert str(caught.value).count("\n") == 1
        assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize("where", [".", "run", "elsewhere"])
def test_compare_refuses_the_gate_that_a_config_of_the_run_names(
    store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    place = {".": store, "run": store / "run", "elsewhere": tmp_path / "elsewhere"}[where]
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = {"training_run": "sums", "checkpoints": str(store / "run"), "selection": "math_select"}
    config = place / "relex.yaml"
    config.write_text(json.dumps(content | {"gate": str(store / "sums.yaml")}))
    (place / "broken.yaml").write_text("{")
    command = comparing(store, "--out", tmp_path / "out", "--target-step", LATER)
    with pytest.raises(Refused, match=rf"sums\.yaml is the gate of training run sums in {config}: methods") as caught:
        relex(capsys, *command)
    assert "its selection benchmark, math_select" in str(caught.value)
    assert str(caught.value).count("\n") == 1
    config.write_text(json.dumps(content | {"gate": str(store / "sums.yaml"), "checkpoints": "another-run"}))
    refuse_gates(str(store / "run"), [str(store / "sums.yaml")])
    config.write_text(json.dumps(content | {"gate": "math_gate"}))
    refuse_gates(str(store / "run"), [str(store / "sums.yaml")])
    with pytest.raises(ConfigError, match="math_gate@chat is the gate"):
        refuse_gates(str(store / "run"), ["math_gate@chat"])
    config.unlink()
    (place / "broken.yaml").unlink()


def slow_logprobs(model: Path, prompt: str, response: str) -> list[float]:
    """Ask for one token after the other."""
    network, tokenizer = Qwen2ForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    collected = []
    for token in tokenizer(response, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            collected.append(float(network(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[token]))
        tokens.append(token)
    return collected


def test_analyze_writes_numbers_and_figures_and_scores_fixed_responses(
    store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    responses = tmp_path / "responses.jsonl"
    texts = [("1+1=", "2"), ("12+30=", "42=4")]
    responses.write_text("".join(json.dumps({"prompt": a, "response": b}) + "\n" for a, b in texts))
    arguments = ["analyze", store / "run", "--base", store / "base", "--cache", store / "cache"]
    printed = json.loads(relex(capsys, *arguments, "--out", tmp_path / "out", "--responses", responses, "--json"))
    assert printed == json.loads((tmp_path / "out" / "analysis.json").read_text())
    cells = {(cell["layer"], cell["module"]) for cell in printed["analysis"]["cells"]}
    assert {(0, "mlp.up_proj"), (1, "mlp.up_proj"), (None, "embed_tokens")} <= cells
    assert printed["analysis"]["steps"] == [*WINDOW, LATER]
    expected = []
    steps = np.array([*WINDOW, LATER], dtype=float)
    series = []
    for step in (*WINDOW, LATER):
        model = tmp_path / f"model-{step}"
        model.mkdir()
        for file in (store / "base").iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        weights = store / "run" / f"checkpoint-{step}" / "model.safetensors"
        (model / weights.name).write_bytes(weights.read_bytes())
        series.append([value for text in texts for value in slow_logprobs(model, *text)])
    for column in np.array(series).T:
        expected.append(np.corrcoef(steps, column)[0, 1] ** 2)
    assert printed["tokens"]["drawn"] == len(expected) == 5
    assert printed["tokens"]["quartiles"] == pytest.approx(np.quantile(expected, (0.25, 0.5, 0.75)).tolist(), abs=1e-3)
    for name in printed["figures"]:
        assert matplotlib.image.imread(tmp_path / "out" / name).std() > 0.05
        assert f"({name})" in (tmp_path / "out" / "analysis.md").read_text()
    assert "median" in relex(capsys, *arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: write at least one line"),
        ('{"prompt": "1+1=", "response": "2"}\n{"prompt": "1+1="}\n', "line 2 is no object with the texts"),
        ('{"prompt": "1+1=", "response": 2}\n', "line 1 is no object with the texts"),
        ('{"prompt": "%s", "response": "2"}\n' % ("1" * 64), "response 1 has 66 tokens .* the model holds 64"),
    ],
)
def test_responses_that_cannot_be_scored_are_refused_in_one_line(
    store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    responses = tmp_path / "responses.jsonl"
    responses.write_text(content)
    arguments = ["analyze", store / "run", "--base", store / "base", "--cache", tmp_path / "cache"]
    with pytest.raises(Refused, match=message) as caught:
        relex(capsys, *arguments, "--out", tmp_path / "out", "--responses", responses)
    assert str(caught.value).count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").glob("checkpoint-*"))


@pytest.mark.parametrize("command", ["compare", "analyze"])
def test_the_commands_have_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert f"Example: relex {command}" in " ".join(relex(capsys, command, "--help").split())
