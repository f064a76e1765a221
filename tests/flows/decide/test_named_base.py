"""A decision on adapters of another base says so: its page has the warnings of what is predicted."""

from pathlib import Path

import yaml

from flows.decide.predict import predict
from flows.settings import load_settings
from flows.state.snapshot import look_at
from flows.state.windows import window_key
from tests.helpers import peft_files
from tests.helpers.straight_run import write_config


def test_a_prediction_of_adapters_of_another_base_warns(tmp_path: Path) -> None:
    run = peft_files.write_run(tmp_path, steps=(10, 25), targets=("q_proj",))
    for step in (10, 25):
        peft_files.settings(run.run / f"checkpoint-{step}", base_model_name_or_path="org/another")
    config = write_config(tmp_path)
    content = yaml.safe_load(config.read_text()) | {"window": 25, "targets": [100]}
    config.write_text(yaml.safe_dump(content))
    settings = load_settings(config)
    now = look_at(settings, settings.checkpoints)
    predicted = predict(settings, [10, 25], window_key(settings, now.base, list(now.newest)))
    (line,) = (warning for warning in predicted.warnings if "base_model_name_or_path" in warning)
    assert f"is an adapter of org/another (base_model_name_or_path), and the base given is {run.base}" in line
