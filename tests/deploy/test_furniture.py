"""Without a container engine: what the files of deploy/ say is compared with what is there, command by command."""

import configparser
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import mlflow.cli
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker
from prefect.cli._app import _app as cyclopts_app
from prefect.settings import Settings as PrefectSettings
from prefect.utilities.importtools import import_object
from prefect.utilities.templating import apply_values

from deploy.local.own_code import own_code
from flows.deployments import deployments
from flows.settings import load_settings
from tests.helpers import ROOT

COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PREFECT = ROOT / "deploy" / "prefect.yaml"


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def ours(compose: Any) -> dict[str, list[str]]:
    """Return the command of every service that runs our image, as words."""
    commands = {}
    for name, service in compose["services"].items():
        if service["image"] == "relex":
            command = service["command"]
            commands[name] = shlex.split(command) if isinstance(command, str) else command
    return commands


def parse(words: list[str]) -> None:
    """Parse a command by the program's own parser, without running it; a wrong word raises or exits."""
    program, *arguments = words
    if program == "prefect":
        cyclopts_app.parse_args(arguments, exit_on_error=False, print_error=False)
    elif program == "mlflow":
        command = mlflow.cli.cli.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
    else:
        assert program == "dask"
        module: Any = {"scheduler": dask_scheduler, "worker": dask_worker}[arguments[0]]
        module.main.make_context(arguments[0], list(arguments[1:]))


def test_every_command_of_the_services_is_one_that_its_program_takes(compose: Any) -> None:
    commands = ours(compose)
    assert {words[0] for words in commands.values()} == {"prefect", "mlflow", "dask"}
    for words in commands.values():
        parse(words)
    assert {name for name in compose["services"] if name not in commands} == {"postgres"}


@pytest.mark.parametrize("name", ["prefect", "mlflow", "dask", "writer", "deploy"])
def test_an_option_that_does_not_exist_would_be_noticed(compose: Any, name: str) -> None:
    with pytest.raises((Exception, SystemExit), match=r"(?i)no such option|unknown option"):
        parse([*ours(compose)[name], "--no-such-option"])


def test_nothing_listens_beyond_this_machine_and_no_secret_is_in_a_command_or_in_the_files(compose: Any) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not [words for words in ours(compose).values() if "${" in " ".join(words)]
    # Not one has a default: without it nothing starts.
    head = COMPOSE.read_text().partition("name: relex")[0]
    variables = set(re.findall(r"\$\{([^}]+)\}", COMPOSE.read_text()))
    assert {name.removesuffix(":?") for name in variables} == {"RELEX_USER", "RELEX_PASSWORD", "RELEX_SECRET",
        "RELEX_DATA", "POSTGRES_PASSWORD"}  # fmt: skip
    for variable in variables:
        assert variable.endswith(":?")
        assert variable.removesuffix(":?") in head


def test_what_services_refer_to_is_there(compose: Any) -> None:
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert {config["source"] for config in service.get("configs", [])} <= set(compose["configs"])
        named = {volume.split(":")[0] for volume in service.get("volumes", []) if not volume.startswith("${")}
        assert named <= set(compose["volumes"])
        if "build" in service:
            assert (COMPOSE.parent / service["build"]["context"]).resolve() == ROOT
            assert ROOT / service["build"]["dockerfile"] == DOCKERFILE
    waited_for = {name for service in services.values() for name in service.get("depends_on", {})}
    assert all("healthcheck" in services[name] for name in waited_for)


def test_every_variable_of_the_servers_is_one_that_they_read(compose: Any) -> None:
    known = {str(name).lower() for name in _aliases(PrefectSettings)}
    for service in compose["services"].values():
        for name in service.get("environment", {}):
            if name.startswith("PREFECT_"):
                assert name.lower() in known, name


def _aliases(model: Any) -> set[str]:
    names = set()
    prefix = model.model_config.get("env_prefix", "")
    for name, field in model.model_fields.items():
        names.add(prefix + name)
        names |= {str(alias) for alias in getattr(field.validation_alias, "choices", []) if isinstance(alias, str)}
        if hasattr(field.annotation, "model_fields"):
            names |= _aliases(field.annotation)
    return names


def test_the_users_of_mlflow_are_kept_on_its_volume(compose: Any) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(compose["configs"]["mlflow.ini"]["content"])
    volumes = [volume.split(":")[1] for volume in compose["services"]["mlflow"]["volumes"]]
    database = parser["mlflow"]["database_uri"].removeprefix("sqlite:///")
    assert str(Path(database).parent) in volumes


def test_the_image_gets_every_package_and_extra_that_there_is_and_the_pinned_torch_first() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", "")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = {word for kind, rest in lines if kind == "COPY" for word in rest.split()[:-1]}
    assert all((ROOT / word).exists() for word in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == copied
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    first, second, *_ = [rest for kind, rest in lines if kind == "RUN"]
    assert first == """pip install "$(grep '^torch==' constraints.txt)\""""
    assert len(re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1
    extras = re.search(r"\.\[([a-z0-9,]+)\]", second)
    assert extras is not None
    assert set(extras[1].split(",")) <= project["project"]["optional-dependencies"].keys()
    assert {"all", "postgres"} <= set(extras[1].split(","))


def test_the_deployments_are_those_that_relex_up_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "relex.yaml"
    content = {"training_run": "tiny", "checkpoints": "run", "base": "base", "window": 40, "targets": [100]}
    content |= {"selection": "selection.yaml", "gate": "gate.yaml", "registered_model": "tiny"}
    config.write_text(yaml.safe_dump(content))
    variables = {"RELEX_TRAINING_RUN": load_settings(config).training_run, "RELEX_CONFIG": str(config)}
    for name, value in (variables | {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}).items():
        monkeypatch.setenv(name, value)
    written: Any = apply_values(
        yaml.safe_load(PREFECT.read_text())["deployments"], dict(os.environ), remove_notset=False
    )
    served: list[Any] = list(deployments(config, tracking_uri="http://mlflow:5000"))
    assert len(written) == len(served)
    for ours, theirs in zip(written, served, strict=True):
        flow = import_object(ours["entrypoint"])
        assert (flow.name, ours["name"]) == (theirs.flow_name, theirs.name)
        assert ours["parameters"] == theirs.parameters
        intervals = [entry.schedule.interval.total_seconds() for entry in theirs.schedules or []]
        assert [entry["interval"] for entry in ours.get("schedules", [])] == intervals
        assert len(ours.get("triggers", [])) == len(theirs.triggers)
        for one, other in zip(ours.get("triggers", []), theirs.triggers, strict=True):
            assert one["name"] == other.name
            assert one["expect"] == sorted(other.expect)
            assert one["match"] == other.match.root
            assert (one["threshold"], one["parameters"]) == (other.threshold, other.parameters)
        assert ours["work_pool"]["job_variables"] == {"env": own_code({})}
    pools = {ours["work_pool"]["name"] for ours in written}
    started = [words[words.index("--pool") + 1] for words in shlex_of(COMPOSE) if "--pool" in words]
    assert sorted(started) == sorted(pools)


def shlex_of(path: Path) -> list[list[str]]:
    return list(ours(yaml.safe_load(path.read_text())).values())
