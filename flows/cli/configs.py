"""Commands on a relex.yaml: write one from what a run says of itself, and check one."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import RUN, Config, Json, Run, err, print_json, print_sentence
from flows.errors import ConfigError

if TYPE_CHECKING:
    from flows.check import Fault

commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=RUN)


@_command()
def init(
    run: Run,
    *,
    base: Annotated[
        str | None, typer.Option(help="Directory or URL of the model the run started from (default: as its files say).")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="Benchmark that chooses (default: one that is found here or was fetched).")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="Benchmark that decides (default: another that is found here or was fetched).")
    ] = None,
    config: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")] = Path("relex.yaml"),
    as_json: Json = False,
) -> None:
    """Write a relex.yaml from what the files of a training run say, and check it.

    Example: relex init runs/qwen
    """
    from flows.draft import draft

    text = draft(run, config, base=base, selection=selection, gate=gate)
    config.parent.mkdir(parents=True, exist_ok=True)
    with config.open("x", encoding="utf-8") as file:
        file.write(text)
    with err.status("checking"):
        faults = check_config(config)
    if as_json:
        print_json({"config": str(config), "faults": [asdict(fault) for fault in faults]})
        return
    print_sentence(f"wrote {config}")
    for fault in faults:
        print_sentence(f"{config}: {fault.text}")


@_command()
def check(
    config: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="A relex.yaml, or a reground.yaml.")],
    as_json: Json = False,
) -> None:
    """Check a relex.yaml and all that it names, one line for each fault; exit status 1 if there is one.

    What `relex up` does not start with is among them, what is not there yet, and what would spoil a decision.
    Example: relex check relex.yaml
    """
    faults_by_config = {}
    with err.status("checking"):
        for path in config:
            faults_by_config[path] = _faults(path)
    if as_json:
        print_json({str(path): [asdict(fault) for fault in faults] for path, faults in faults_by_config.items()})
    else:
        for path, faults in faults_by_config.items():
            for fault in faults:
                print_sentence(f"{path}: {fault.text}")
            if not faults:
                print_sentence(f"{path}: nothing is wrong")
    if any(faults_by_config.values()):
        raise typer.Exit(1)


@_command()
def clean(
    config: Config,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only shown.")] = False,
    as_json: Json = False,
) -> None:
    """Show what of a run's state may go, and how much: losing candidates, old evaluations; with --yes, remove it.

    What is registered stays, and so does what drift compares the winner by.
    Example: relex clean relex.yaml
    """
    from pydantic import ByteSize

    from flows.clean import clutter, remove
    from flows.settings import load_settings

    settings = load_settings(config)
    leftovers = remove(settings) if yes else clutter(settings)
    if as_json:
        print_json({"removed": yes, "clutter": [asdict(each) for each in leftovers]})
        return
    for each in leftovers:
        print_sentence(f"{ByteSize(each.size).human_readable():>8}  {each.what}: {each.directory}")
    size = ByteSize(sum(each.size for each in leftovers)).human_readable()
    if not leftovers:
        print_sentence("nothing of it may go")
    else:
        print_sentence(f"removed {size}" if yes else f"{size} may go: relex clean {config} --yes removes it")


def check_config(path: Path) -> "list[Fault]":
    """Return what is wrong with what a config of either kind names; raises ConfigError for the config itself."""
    from evaluation.benchmarks.benchmark import resolve_benchmark
    from evaluation.errors import EvaluationError
    from flows.check import Fault
    from flows.check import check as check_settings
    from flows.reground.settings import is_reground, load_reground_settings
    from flows.settings import load_settings

    if not is_reground(path):
        return check_settings(load_settings(path))
    try:
        resolve_benchmark(load_reground_settings(path).selection)
    except EvaluationError as error:
        return [Fault("refused", f"selection: {error}")]
    return []


def _faults(path: Path) -> "list[Fault]":
    from flows.check import Fault

    try:
        return check_config(path)
    except ConfigError as error:
        # Which file it is stands before every line.
        return [Fault("refused", fault.removeprefix(f"config {path}: ")) for fault in error.faults]
