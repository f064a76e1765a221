"""Commands that run the pipeline: the stack, its watchers, what they are about to do, and the demo of it all."""

import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from flows.cli.options import DECISION, HOME, RUN, Config, Home, Json, err, out, print_json, print_sentence
from flows.console import Bars, JsonLines, plain_table, print_line, print_warnings
from flows.errors import ConfigError

if TYPE_CHECKING:
    from deploy.local.stack import Daemon

commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=RUN)


@_command()
def demo(
    directory: Annotated[Path, typer.Option("--out", help="Where the demo lives.")] = Path("relex-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the demo's training run.")] = 0,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Run the whole thing on a real, tiny RLVR run: train, watch, predict, score, decide, register.

    Example: relex demo
    """
    from deploy.local import stack
    from flows.demo.run import run_demo, show

    known = stack.has_access(home)
    done = run_demo(directory, seed=seed, home=home, err=err)
    if as_json:
        print_json(asdict(done))
    else:
        show(out, done)
        _show_entry(home, known=known)


@_command()
def up(
    config: Annotated[
        list[Path] | None, typer.Argument(metavar="[CONFIG]...", help="Training runs to watch, or to re-ground.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Start the local stack: Prefect and MLflow servers, the promoter, for each CONFIG its watcher or re-grounding.

    What runs is left alone, what died is started again. The first time, a password is made for both servers and shown.
    It ends when every watcher has looked once: a training that starts then loses no step.
    Example: relex up relex.yaml
    """
    from deploy.local import stack
    from flows.check import clashes
    from flows.cli.configs import check_config
    from flows.processes import revive_watchers, spawn_promoter, spawn_watcher
    from flows.reground.settings import is_reground, load_reground_settings
    from flows.settings import load_settings
    from flows.watch.runs import wait_for_looks, watched_settings

    configs: dict[str, Path] = {}
    for path in config or []:
        settings = load_reground_settings(path) if is_reground(path) else load_settings(path)
        if (other := configs.get(settings.training_run, path)) != path:
            raise ConfigError(
                f"{other} and {path} both describe training run {settings.training_run}. Give one of them another name."
            )
        configs[settings.training_run] = path
    warnings = []
    with err.status("checking"):
        for path in configs.values():
            faults = check_config(path)
            if refused := [fault.text for fault in faults if fault.kind == "refused"]:
                raise ConfigError(f"config {path}: {' '.join(refused)}", refused)
            # What is waited for is said by the watcher.
            warnings += [fault.text for fault in faults if fault.kind == "warning"]
    given = {path.absolute(): load_settings(path) for path in configs.values() if not is_reground(path)}
    print_warnings(err, [*warnings, *clashes(watched_settings(stack.status(home)) | given)])
    known = stack.has_access(home)
    with err.status("starting the servers"):
        started = stack.up(home)
        watchers = [spawn_watcher(started, name, path) for name, path in configs.items()]
        watchers += revive_watchers(started)
        spawn_promoter(started)
    with err.status("looking for the first time"):
        wait_for_looks(started.home, watchers)
    _show_stack(home, as_json=as_json)
    if not as_json:
        _show_entry(home, known=known)


def _show_entry(home: Path, *, known: bool) -> None:
    """Say who is let in; right after the password was made, the addresses with it."""
    from deploy.local import stack

    for line in (stack.how_to_enter(home) if known else stack.how_to_enter_first(home)).splitlines():
        print_sentence(line)


@_command()
def down(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only the watcher of this training run (default: all).")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Stop the local stack, watchers first; the next `relex up` brings them back. With NAME, stop one run's watcher.

    Example: relex down
    """
    from deploy.local import stack
    from flows.processes import stop_watcher

    with err.status("stopping"):
        services = stack.down(home) if name is None else [stop_watcher(home.expanduser().resolve(), name)]
    if as_json:
        print_json([asdict(service) for service in services])
    else:
        show_services(out, services)


@_command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A training run: its newest decision in full, and its log.")
    ] = None,
    home: Home = HOME,
    record: Annotated[
        Path | None,
        typer.Option(help="Show the finished runs of this relex.yaml's state directory, and what they speak for."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is running and where, and of each training run its step, what it waits for and its last verdict.

    Example: relex status
    One training run: relex status qwen-math
    """
    from deploy.local import stack

    if record is not None:
        _show_record(record, as_json=as_json)
        return
    if name is not None:
        _show_run(home, name, as_json=as_json)
        return
    _show_stack(home, as_json=as_json)
    if not as_json and stack.has_access(home):
        print_sentence(stack.how_to_enter(home))


def _show_run(home: Path, name: str, *, as_json: bool) -> None:
    from flows.watch.runs import tell

    account = tell(home.expanduser().resolve(), name)
    if as_json:
        decision = None if account.decision is None else account.decision.to_json()
        print_json({"run": asdict(account.run), "decision": decision, "page": account.page, "log": account.log})
        return
    print_sentence(account.run.text)
    if account.page is None:
        print_sentence(f"nothing is decided yet; relex check {account.run.config} says what is in the way")
    else:
        for line in account.page.read_text(encoding="utf-8").splitlines():
            print_sentence(line)
        print_sentence(f"page: {account.page}")
    print_sentence(f"log: {account.log}")


def _show_record(config: Path, *, as_json: bool) -> None:
    from flows.settings import load_settings
    from flows.state.finished import RISK, read_finished, vote
    from flows.stop.outlook import EVIDENCE

    settings = load_settings(config, look=True)
    runs = read_finished(settings.state)
    votes = {rule: vote(runs, rule, price=settings.stop_price) for rule in EVIDENCE}
    if as_json:
        looks = [[asdict(look) | {"cost": look.cost} for look in looks] for looks in runs]
        print_json({"runs": looks, "votes": votes, "stop_price": settings.stop_price, "risk": RISK})
        return
    rows = [
        (
            look.training_run,
            str(look.window),
            str(look.end),
            f"{look.winner:.4f}",
            f"{look.real:.4f}",
            f"{look.cost:+.1f}",
            *(f"{look.rules[rule]:.1f}" if rule in look.rules else "" for rule in EVIDENCE),
        )
        for looks in runs
        for look in looks
    ]
    if rows:
        out.print(plain_table("run", "window", "end", "winner", "real", "cost", *EVIDENCE, rows=rows))
    needed = math.ceil(1 / RISK - 1)
    out.print(
        f"{len(runs)} finished runs. From {needed} on a rule may speak for a stop, where at most {100 * RISK:g} % of"
        f" stops are to cost more than {settings.stop_price:g} points: "
        + (
            "; ".join(f"{rule} up to {most:.1f} points" for rule, most in votes.items() if most is not None)
            or "none does"
        )
        + ".",
        soft_wrap=True,
        highlight=False,
    )


def _show_stack(home: Path, *, as_json: bool) -> None:
    from deploy.local import stack
    from flows.watch.runs import run_of

    services = stack.status(home)
    runs = {service.name: run for service in services if (run := run_of(service)) is not None}
    if as_json:
        watched = {name: {"run": asdict(run)} for name, run in runs.items()}
        print_json([asdict(service) | watched.get(service.name, {}) for service in services])
        return
    show_services(out, services)
    for run in runs.values():
        for line in filter(None, (run.text, run.decided)):
            print_sentence(line)


def show_services(console: Console, services: Sequence["Daemon"]) -> None:
    """Print the processes of the local stack."""
    if not services:
        console.print("nothing is running")
        return
    table = plain_table("service", "state", "pid", "address")
    for service in services:
        table.add_row(service.name, service.state, str(service.pid or ""), service.url or "")
    console.print(table)
    print_line(console, f"logs: {services[0].log.parent}")


@_command()
def watch(
    config: Config,
    home: Home = HOME,
    seconds: Annotated[float, typer.Option(help="Stop after this long (default: when interrupted).")] = float("inf"),
    as_json: Json = False,
) -> None:
    """Watch one training run in the foreground and announce what is due to the running stack.

    Example: relex watch relex.yaml
    """
    from deploy.local import stack
    from flows.settings import load_settings

    settings = load_settings(config)
    os.environ.update(stack.environment(stack.running(home)))
    from flows.watch.watcher import watch_store

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if as_json:
        watch_store(settings, seconds=seconds, on_look=JsonLines())
        return
    with err.status("looking") as status:
        watch_store(settings, seconds=seconds, on_look=lambda _, text: status.update(Text(text)))


@_command(rich_help_panel=DECISION)
def stop(
    config: Config,
    *,
    confirm: Annotated[bool, typer.Option("--confirm", help="Do it; without this it is only shown.")] = False,
    beyond_price: Annotated[
        bool, typer.Option("--beyond-price", help="Also where training on may win more than stop_price.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Although it was done before, or may have been: see what is shown.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show whether the training can be stopped, how, and how many steps that saves; with --confirm, stop it, once.

    Example: relex stop relex.yaml --confirm
    """
    import psutil

    from deploy.local import stack
    from flows.settings import load_settings
    from flows.stop import status
    from flows.stop.execute import log_stop

    if (beyond_price or again) and not confirm:
        raise typer.BadParameter("--beyond-price and --again go with --confirm")
    settings = load_settings(config)
    standing = status.look(config, settings)
    if confirm:
        done = status.confirm(
            settings,
            standing,
            by=psutil.Process().username(),
            beyond_price="allow" if beyond_price else "refuse",
            again="allow" if again else "refuse",
        )
        log_stop(settings, done, tracking_uri=stack.tracking_uri(home))
        standing = status.look(config, settings)
    if as_json:
        print_json(standing.to_json())
    else:
        print_sentence(standing.sentence)


@_command(rich_help_panel=DECISION)
def drift(config: Config, as_json: Json = False) -> None:
    """Show what was predicted next to what the run has reached since; what is missing is compared now, without servers.

    Example: relex drift relex.yaml
    """
    from flows.drift.measure import catch_up
    from flows.drift.page import observed, overtaken, show, to_json
    from flows.observed.score import catch_up as score
    from flows.settings import load_settings
    from relex.files.block_cache import BlockCache

    settings = load_settings(config)
    with Bars(err) as bars, BlockCache(settings.home, size=int(settings.cache)) as blocks:
        rows, waiting = catch_up(settings, blocks=blocks, tell=bars)
        scored = score(settings, blocks=blocks, tell=bars)
    if as_json:
        print_json(to_json(settings.training_run, rows, waiting) | {"observed": [asdict(row) for row in scored]})
        return
    for line in overtaken(scored):
        print_sentence(line)
    show(out, rows, waiting)
    for line in observed(settings, scored):
        print_sentence(line)


@_command()
def reground(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML of a re-grounding.")],
    on_stack: Annotated[
        bool, typer.Option("--stack", help="Show it on the pages of the running stack, as a flow run of this process.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Alternate real steps, by your own trainer, with jumps; each is judged, and the next steps start from the better.

    Killed at any moment, the same command goes on where it was.
    Example: relex reground reground.yaml
    """
    import signal

    from flows.reground.loop import reground as run_cycles
    from flows.reground.page import show
    from flows.reground.settings import load_reground_settings

    # Asked to end, it ends its trainer first, as when interrupted at the terminal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = load_reground_settings(config)
    if on_stack:
        from deploy.local import stack

        os.environ.update(stack.environment(stack.running(home)))
        from flows.reground.flow import reground as run_flow

        run_flow(str(config), stack.tracking_uri(home))
    with Bars(err) as bars:
        cycles = run_cycles(settings, tell=bars)
    if as_json:
        print_json(cycles.to_json())
    else:
        show(out, cycles)
