"""What a command imports before it talks to a server: a second of it is a second of waiting, each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "scipy", "pandas", "transformers", "lm_eval", "datasets", "matplotlib", "prefect", "mlflow"}
# MLflow's client is how a server is talked to; what is loaded when it is asked for is all that was imported before it.
PROGRAM = """
import os, sys
def told():
    print(*sys.modules, flush=True)
    os._exit(0)
sys.addaudithook(lambda event, args: told() if event == "import" and args[0] == "mlflow" else None)
from flows.cli.main import main
try:
    main()
except SystemExit:
    pass
told()
"""


def modules(home: Path, *args: object) -> set[str]:
    """Return the modules that a command has imported before it asks for MLflow, or at its end."""
    command = [sys.executable, "-c", PROGRAM, *map(str, args)]
    shown = subprocess.run(
        command, env={**os.environ, "RELEX_HOME": str(home)}, capture_output=True, text=True, check=True, timeout=300
    )
    assert "Error" not in shown.stdout, shown.stdout
    return {*shown.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("command", ["status", "models", "promote", "rollback"])
def test_a_command_imports_nothing_heavy_before_it_talks_to_a_server(command: str, tmp_path: Path) -> None:
    named = [] if command == "status" else ["nobody"]
    imported = modules(tmp_path / "home", command, *named)
    assert "deploy.local.stack" in imported
    assert not imported & HEAVY


def test_the_record_of_a_run_with_methods_is_read_without_building_them(config: Path, tmp_path: Path) -> None:
    imported = modules(tmp_path / "home", "status", "--record", config)
    assert "flows.state.finished" in imported
    assert not imported & HEAVY


def test_what_is_told_of_a_watched_run_needs_nothing_heavy(config: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport flows.watch.runs\nfrom flows.settings import load_settings\n"
        f"print(load_settings(Path({str(config)!r}), look=True).methods)\nprint(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
    methods, imported = shown.splitlines()
    assert methods.startswith("['")
    assert not {*imported.split()} & HEAVY
