"""A run of a tiny model that answers, a decision on its first two checkpoints, and a real later one in the store."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from evaluation.benchmarks.benchmark import write_benchmark
from flows.settings import Settings, load_settings
from flows.state.decision import Decision, Model, Score
from flows.state.records import write_json
from flows.state.windows import decision_path, window_directory
from relex.extrapolation import Request, extrapolate
from relex.predictors import parse_method
from relex.trajectory import open_run
from tests.evaluation.conftest import write_model
from tests.helpers.straight_run import make_old

KEY = "0123456789abcdef"


def write_decided(root: Path, **changes: object) -> Settings:
    """Write the run, its relex.yaml with `changes`, and its decision, and return the settings."""
    base = write_model(root / "base", seed=0)
    origin = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    slope = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in origin.items()}
    for step in (10, 25, 100):
        path = root / "run" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        save_file(
            {name: tensor + 2e-3 * step * slope[name] for name, tensor in origin.items()}, path / "model.safetensors"
        )
        path.joinpath("trainer_state.json").write_text("{}")
        make_old(path)
    for name, first in {"selection": 0, "gate": 100, "report": 200}.items():
        rows = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(first, first + 12)]
        write_benchmark(root, name, rows, max_new_tokens=3)
    content = {"training_run": "tiny", "checkpoints": "run", "base": "base", "window": 25, "targets": [100, 101]}
    content |= {"selection": "selection.yaml", "gate": "gate.yaml", "report": ["report.yaml"]}
    content |= {"registered_model": "tiny"}
    (root / "relex.yaml").write_text(yaml.safe_dump(content | changes))
    settings = load_settings(root / "relex.yaml")
    models = window_directory(settings, KEY) / "models"
    wanted = {"hold": 25, "relex": 100, "expo": 100}
    requests = [Request(parse_method(name), step, models / name) for name, step in wanted.items()]
    extrapolate(
        open_run(settings.checkpoints, settings.base, window=25),
        requests,
        grams=settings.home / "grams",
        memory=64 << 20,
        threads=1,
    )
    scores = [
        Score(
            Model("candidate" if name != "hold" else "observed", step, str(models / name), name), "selection", 0, 0, 12
        )
        for name, step in wanted.items()
    ]
    decision = Decision("tiny", KEY, 25, (10, 25), "registered", "because", selection=tuple(scores))
    decision = replace(decision, winner=scores[1].model, report=(replace(scores[1], benchmark="report"),))
    write_json(decision_path(settings, KEY), decision.to_json())
    return settings
