from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.config import Compute
from flows.errors import ConfigError
from flows.reground.settings import load_reground_settings
from flows.settings import Settings, load_settings


def test_relative_paths_are_relative_to_the_file(config: Path, tmp_path: Path) -> None:
    settings = load_settings(config)
    assert settings.checkpoints == str(tmp_path / "run")
    assert settings.selection == str(tmp_path / "selection.yaml")
    assert settings.home == tmp_path / ".relex" / "tiny"
    assert settings.targets == [100, 200]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windw": 3}, r"windw \(line 11\) is no key\. Did you mean window\?$"),
        ({"colour": 3}, r"colour \(line 3\) is no key\. The keys are "),
        ({"window": 0}, r"window \(line 10\): Input should be greater than 0 \(given 0\)\.$"),
        ({"targets": [100, "x"]}, r"targets\.1 \(line 8\): Input should be a valid integer"),
        ({"gate": {"file": "gate.yaml"}}, r"gate \(line 3\): Input should be a valid string \(given {'file': "),
        ({"training_run": None}, r"training_run \(line 9\): Input should be a valid string"),
        ({"targets": [30]}, "target 30 is not beyond the window 40"),
        ({"gate": "selection.yaml"}, "selection and gate are both selection.yaml"),
        ({"guards": {"gate.yaml": 2}}, "gate.yaml is among guards and is gate too"),
        ({"guards": {"more.yaml": 0}}, r"guards\.more\.yaml \(line 5\): Input should be greater than 0"),
        ({"targets": [100, 100]}, "a target is named twice"),
        ({"methods": ["relx"]}, "method 'relx' is not known; known are relex"),
        ({"training_run": "Tiny Run"}, r"training_run \(line 9\): String should match pattern"),
        ({"backend": "tgi"}, "backend is tgi and must be one of hf, vllm"),
        ({"backend": "vllm:seed=1"}, "backend vllm has no parameter seed: it has tensor_parallel_size"),
        ({"memory": "lots"}, r"memory \(line 4\): could not parse value and unit"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(config: Path, change: dict[str, object], message: str) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(config)
    assert "\n" not in str(caught.value)
    assert str(config) in str(caught.value)


def test_a_guard_is_a_benchmark_with_its_margin(config: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text()) | {"guards": {"more.yaml": 2, "math": 0.5}}
    config.write_text(yaml.safe_dump(content))
    assert load_settings(config).guards == {str(tmp_path / "more.yaml"): 2.0, "math": 0.5}


def test_a_key_that_is_missing_is_named_with_its_meaning_and_nothing_else(config: Path) -> None:
    content = yaml.safe_load(config.read_text())
    del content["base"]
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    meaning = "Directory or URL of the model the training run started from"
    assert str(caught.value) == f"config {config}: base is missing: {meaning}."


def test_one_value_is_a_list_of_one(config: Path) -> None:
    one = {"targets": 200, "methods": "secant", "report": "more.yaml"}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | one))
    settings = load_settings(config)
    assert (settings.targets, settings.methods) == ([200], ["secant"])
    assert settings.report == [str(config.parent / "more.yaml")]


def test_as_many_problems_at_once_as_suit_the_backend_unless_it_is_said(config: Path) -> None:
    content = yaml.safe_load(config.read_text())
    content.pop("batch_size", None)
    for change, size in (({}, 64), ({"backend": "vllm:max_model_len=8"}, 1024), ({"batch_size": 7}, 7)):
        config.write_text(yaml.safe_dump(content | change))
        assert load_settings(config).batch_size == size


def _reground_config(path: Path, changes: dict[str, object]) -> Path:
    content = {
        "training_run": "tiny",
        "base": "base",
        "command": "train {base} {out} {steps}",
        "real_steps": 10,
        "jump_steps": 40,
        "selection": "selection.yaml",
        "total_steps": 100,
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backend": "vllm:max_model_len=8", "device": "cuda:0,cuda:1", "evaluations": 2, "dtype": "bfloat16"},
        {"memory": "1GiB", "threads": 1, "batch_size": 7},
        {"backend": "tgi"},
        {"backend": "vllm:seed=1"},
        {"evaluations": 0},
    ],
)
def test_what_computes_is_said_in_the_same_words_in_both_configs(
    config: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))
    reground = _reground_config(tmp_path / "reground.yaml", changes)

    def outcome(load: Callable[[Path], Compute], path: Path) -> object:
        try:
            settings = load(path)
        except ConfigError as error:
            return str(error).partition(". The keys are ")[0].replace(str(path), "")
        return {name: getattr(settings, name) for name in Compute.model_fields}

    assert outcome(load_reground_settings, reground) == outcome(load_settings, config)


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_settings(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_settings(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list"):
        load_settings(broken)


def test_every_field_is_documented() -> None:
    assert all(field.description for field in Settings.model_fields.values())
