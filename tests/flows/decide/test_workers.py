"""Who writes shards, and what is refused before a worker is asked; integration/stack/ has the workers."""

from pathlib import Path

import dask
import distributed  # noqa: F401  its settings are there before the first one is changed
import pytest
import yaml

from flows import settings as settings_module
from flows.decide.workers import spreading
from flows.errors import ConfigError, ShardError
from flows.settings import Settings, load_settings
from relex.output.shards import Shard

SHARD = Shard("model-00001-of-00002.safetensors", ("/nowhere/.step-1.partial",), "inputs", 1 << 20, 1)


def changed(config: Path, **changes: object) -> Settings:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))
    return load_settings(config)


def test_by_default_the_threads_of_one_process_write_files_cut_as_the_base_s_are(settings: Settings) -> None:
    assert spreading(settings) is None
    assert settings.shard_size is None


def test_a_size_is_read_as_people_write_it(config: Path) -> None:
    assert changed(config, shard_size="2GiB").shard_size == 2 << 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_runner": "ray"}, r"task_runner \(line \d+\): Input should be 'threads' or 'dask'"),
        ({"dask_address": "tcp://host:8786"}, "dask_address is tcp://host:8786 and task_runner is threads"),
        (
            {"task_runner": "dask", "dask_address": "host:8786"},
            r"dask_address \(line \d+\): String should match pattern",
        ),
        ({"shard_size": 0}, r"shard_size \(line \d+\): Input should be greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    config: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        changed(config, **changes)
    assert "\n" not in str(caught.value)


def test_workers_that_are_not_installed_are_asked_for_when_the_config_is_read(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not days later, when the window is full."""
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"prefect-dask is not installed. Run pip install 'relex-rlvr\[dask\]'"):
        changed(config, task_runner="dask")


def test_nobody_is_asked_for_what_is_written_already(config: Path) -> None:
    spread = spreading(changed(config, task_runner="dask", dask_address="tcp://127.0.0.1:9"))
    assert spread is not None
    spread([], None)


def test_a_scheduler_that_does_not_answer_is_named_in_one_line(config: Path) -> None:
    spread = spreading(changed(config, task_runner="dask", dask_address="tcp://127.0.0.1:9"))
    assert spread is not None
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),
        pytest.raises(ShardError, match=r"dask_address tcp://127.0.0.1:9 does not answer") as caught,
    ):
        spread([SHARD], None)
    assert "\n" not in str(caught.value)
