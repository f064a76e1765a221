"""make setup: which torch it takes, and what it says before gigabytes are downloaded."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

PINNED = re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
# Writes what it is asked for; refuses what stands in the file `refused`, knows what stands in the file `installed`.
PIP = """#!/bin/sh
echo "$*" >> asked
[ "$1" = freeze ] && cat installed && exit
for word in "$@"; do grep -qxF -- "$word" refused && exit 1; done
exit 0
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose environment has a pip that installs nothing."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, text in (("pip", PIP), ("python", "#!/bin/sh\n")):
        (tmp_path / ".venv/bin" / name).write_text(text)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    for name in ("installed", "refused"):
        (tmp_path / name).touch()
    return tmp_path


def setup(clone: Path, gpu: str = "") -> tuple[str, list[str]]:
    """Return what make said and what it asked pip for, without options."""
    made = subprocess.run(["make", "setup", f"GPU={gpu}"], cwd=clone, check=True, capture_output=True, text=True)
    asked = [line for line in (clone / "asked").read_text().splitlines() if line != "freeze"]
    return made.stdout, [line.split()[-1] for line in asked]


def test_without_a_gpu_it_is_the_build_for_the_cpu(clone: Path) -> None:
    said, asked = setup(clone)
    assert asked == [f"{PINNED}+cpu", "relex", ".[all,dev]"]
    assert "gigabytes" not in said


def test_what_the_own_index_does_not_have_is_asked_of_torchs(clone: Path) -> None:
    pip = clone / ".venv/bin/pip"
    pip.write_text(PIP.replace("for word", f'[ "$*" = "install --quiet {PINNED}+cpu" ] && exit 1\nfor word'))
    said, asked = setup(clone)
    assert asked[:2] == [f"{PINNED}+cpu"] * 2
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in (clone / "asked").read_text()
    assert "gigabytes" not in said


def test_where_there_is_none_it_says_what_it_downloads_before_it_does(clone: Path) -> None:
    (clone / "refused").write_text(f"{PINNED}+cpu\n")
    said, asked = setup(clone)
    assert f"make setup: no GPU, and no CPU build of {PINNED} for this Python" in said
    assert "downloading the build for GPUs, gigabytes" in said
    assert asked[2] == PINNED
    # Not --quiet: pip names each file and its size.
    assert f"\ninstall {PINNED}\n" in (clone / "asked").read_text()


def test_with_a_gpu_or_with_one_that_is_there_nothing_else_is_looked_for(clone: Path) -> None:
    assert setup(clone, gpu="/dev/nvidiactl")[1][0] == PINNED
    for name in ("asked", ".venv/.installed"):
        (clone / name).unlink()
    (clone / "installed").write_text(f"{PINNED}\n")
    assert setup(clone)[1][0] == PINNED
