"""What `relex check` says of a relex.yaml and of what it names: one line each, and nothing where all is well."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from evaluation.benchmarks.benchmark import write_benchmark
from flows.check import Fault, check, clashes
from flows.settings import load_settings
from tests.helpers import cli
from tests.helpers.straight_run import WriteCheckpoint, make_old


@pytest.fixture
def whole(config: Path, write_checkpoint: WriteCheckpoint) -> Path:
    """A config whose base, checkpoints and benchmarks are there."""
    for step in (0, 10, 20, 30, 40):
        write_checkpoint(step)
    for split in ("selection", "gate"):
        write_benchmark(config.parent, split, [{"prompt": f"{split} =", "answer": "1"}], max_new_tokens=1)
    return config


def faults(config: Path, **changes: object) -> list[Fault]:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))
    return check(load_settings(config))


def nothing_there(root: Path) -> None:
    shutil.rmtree(root / "base")
    shutil.rmtree(root / "run")


def state_is_a_file(root: Path) -> None:
    (root / ".relex").write_text("")


def pruned(root: Path) -> None:
    for step in (10, 20):
        shutil.rmtree(root / "run" / f"checkpoint-{step}")
    (root / "run" / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"save_steps": 10}))


def all_pruned(root: Path) -> None:
    for step in (10, 20, 30, 40):
        (root / "run" / f"checkpoint-{step}").rename(root / "run" / f"checkpoint-{step + 100}")


def short_run(root: Path) -> None:
    (root / "run" / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"max_steps": 36}))


def another_base(root: Path) -> None:
    save_file({"weight": torch.zeros(3, 6)}, root / "base" / "model.safetensors")
    for step in (10, 20, 30, 40):
        make_old(root / "run" / f"checkpoint-{step}")


def same_problems(root: Path) -> None:
    for name in ("gate.yaml", "gate.jsonl"):
        (root / name).unlink()
    write_benchmark(root, "gate", [{"prompt": "selection =", "answer": "1"}], max_new_tokens=1)


@pytest.mark.parametrize(
    ("spoil", "kind", "lines"),
    [
        (nothing_there, "waiting", ["waiting for {root}/base: not there", "waiting for {root}/run: not there"]),
        (state_is_a_file, "refused", ["state {root}/.relex cannot be written (Not a directory). Give state: "]),
        (pruned, "warning", ["window 40: checkpoints are 10 steps apart, and the first that is there is of step 30"]),
        (all_pruned, "warning", ["window 40 needs two checkpoints, and of those up to step 40 none is there"]),
        (short_run, "warning", ["window 40 is beyond the run, which ends at step 36"]),
        (another_base, "waiting", ["step 10 is broken: {root}/run/checkpoint-10: weight has shape [8, 6], the base"]),
        (same_problems, "refused", ["1 of the 1 problems of gate gate are among the 1 of selection selection"]),
        (lambda root: (root / "gate.yaml").unlink(), "refused", ["gate: benchmark {root}/gate.yaml is no file"]),
    ],
)
def test_each_fault_is_one_line(whole: Path, spoil: Callable[[Path], None], kind: str, lines: list[str]) -> None:
    spoil(whole.parent)
    result = faults(whole)
    assert [fault.kind for fault in result] == [kind] * len(lines)
    for fault, line in zip(result, lines, strict=True):
        assert fault.text.startswith(line.format(root=whole.parent)), fault.text
        assert "\n" not in fault.text


def test_where_all_is_well_nothing_is_said(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(whole) == []
    assert cli.relex(capsys, "check", whole) == (0, f"{whole}: nothing is wrong\n", "")


def test_a_config_with_faults_is_exit_status_1_and_a_line_for_each(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(whole.parent / "base")
    status, out, err = cli.relex(capsys, "check", whole)
    assert (status, out, err) == (1, f"{whole}: waiting for {whole.parent / 'base'}: not there\n", "")
    whole.write_text(whole.read_text() + "windw: 3\ndevise: cpu\n")
    status, out, err = cli.relex(capsys, "check", whole)
    assert (status, err) == (1, "")
    first, second = out.splitlines()
    assert first == f"{whole}: windw (line 11) is no key. Did you mean window?"
    assert second == f"{whole}: devise (line 12) is no key. Did you mean device?"


def test_a_disk_without_room_is_waited_for_and_not_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = Fault("waiting", f"waiting for room in {whole.parent / '.relex'}: No space left on device")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert check(load_settings(whole)) == [told]
    # Nor is anything begun that has no room either, and would be refused for that.
    assert list((whole.parent / ".relex" / "tiny").iterdir()) == []
    monkeypatch.setattr(Path, "mkdir", full)
    assert check(load_settings(whole))[0] == told


def test_too_little_room_for_what_a_decision_writes_is_told_in_bytes(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two targets and the last observed checkpoint, and four pinned ones: of 8 x 6 numbers of 4 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2000, 656, 1343))
    assert faults(whole) == []
    (fault,) = faults(whole, pin="copy")
    assert "has room for 1343 bytes, and 3 models that a decision writes and 4 checkpoints of the window" in fault.text
    assert "of 192 bytes take 1344. Make room" in fault.text


def test_a_decided_window_may_be_pruned(whole: Path) -> None:
    settings = load_settings(whole)
    pruned(whole.parent)
    decision = settings.home / "windows" / "abc" / "decision.json"
    decision.parent.mkdir(parents=True)
    content = {"training_run": "tiny", "key": "abc", "window": 40, "steps": [10, 20, 30, 40]}
    decision.write_text(json.dumps(content | {"verdict": "keep training", "reason": ""}))
    assert check(settings) == []


def test_two_configs_that_share_checkpoints_or_a_registered_model_are_named(whole: Path) -> None:
    content = yaml.safe_load(whole.read_text())
    (whole.parent / "link").symlink_to("run")
    others = []
    for name, changes in {
        "b": {"checkpoints": "link", "registered_model": "other"},
        "c": {"checkpoints": "another"},
    }.items():
        others.append(whole.with_name(f"{name}.yaml"))
        others[-1].write_text(yaml.safe_dump(content | {"training_run": name} | changes))
    lines = clashes({path: load_settings(path) for path in (whole, *others)})
    assert lines == [
        f"{whole} and {others[0]} both read the checkpoints of {whole.parent / 'run'}. Is that meant?",
        f"{whole} and {others[1]} both register as tiny. Is that meant?",
    ]


def test_up_refuses_a_state_that_cannot_be_written_before_it_starts_anything(
    whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state_is_a_file(whole.parent)
    status, out, err = cli.relex(capsys, "up", whole, "--home", tmp_path / "home")
    assert (status, out) == (1, "")
    assert f"state {whole.parent / '.relex'} cannot be written (Not a directory)" in err
    assert not (tmp_path / "home").exists()
