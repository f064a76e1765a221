"""Commands on registered predictions: list them, make one the champion, serve it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.cli.options import HOME, MODEL, Home, Json, Registered, err, out, print_json, print_sentence
from flows.console import plain_table, print_line, print_warnings

if TYPE_CHECKING:
    from rich.table import Table

    from deploy.audit import Entry
    from flows.promote.promotion import Promotion
    from flows.promote.versions import ModelVersions

commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=MODEL)

# What happened last, newest below.
_ROWS = 12


@_command()
def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Name of the registered model (default: all).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of the weights (default: compare sizes).")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """List registered predictions: step, verdict, gate, champion, whether the weights are whole and where they lie.

    Example: relex models qwen
    """
    from deploy import registry
    from deploy.local import stack
    from flows.promote.versions import list_versions

    uri = stack.tracking_uri(home)
    listings = [
        list_versions(each, tracking_uri=uri, downloads=home / "models", contents="read" if verify else "sizes")
        for each in ([name] if name is not None else registry.names(tracking_uri=uri))
    ]
    if as_json:
        print_json([each.to_json() for each in listings])
        return
    if not listings:
        out.print("nothing is registered")
    if name is not None and (unknown := registry.unknown_name(name, tracking_uri=uri)):
        print_sentence(unknown)
        return
    for each in listings:
        show_models(out, each)


def show_models(console: Console, listed: "ModelVersions") -> None:
    """Print the registered predictions, newest first, and how the champion came to be it."""
    if not listed.versions:
        console.print(f"no prediction of {listed.name} is registered")
        return
    table = plain_table(
        "version", "step", "digest", "verdict", "promoted", "weights", title=listed.versions[0].row.name
    )
    for version in listed.versions:
        row = version.row
        table.add_row(
            f"v{row.version}",
            str(row.target_step),
            row.digest[:12],
            "overtaken" if version.overtaken else row.tags.get("verdict", ""),
            "" if version.promoted is None else f"{listed.name} v{version.promoted}{', champion' * row.champion}",
            version.state.split(":", maxsplit=1)[0],
        )
    console.print(table)
    for version in listed.versions:
        if version.overtaken:
            print_line(console, f"v{version.row.version} is overtaken: {version.overtaken}")
        if version.gate:
            print_line(console, f"gate of v{version.row.version}: {version.gate}")
        print_line(console, f"weights of v{version.row.version}: {version.row.weights}")
    print_warnings(console, [version.state for version in listed.versions if version.state.startswith("damaged")])
    if listed.trail:
        console.print(_trail(listed.trail))
    for line in listed.by_hand:
        print_line(console, line)


def _trail(entries: "Sequence[Entry]") -> "Table":
    trail = plain_table("#", "when", "who", "what", "verdict")
    for entry in entries[-_ROWS:]:
        when = datetime.fromtimestamp(entry.at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")
        before, after = ("—" if number is None else f"v{number}" for number in (entry.from_version, entry.to_version))
        what = f"{entry.action} {'' if entry.candidate is None else f'candidate v{entry.candidate} '}{before} → {after}"
        trail.add_row(str(entry.number), when, entry.by, what, entry.verdict)
    return trail


@_command()
def register(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A real checkpoint, RUN/checkpoint-N.")],
    config: Annotated[Path, typer.Option(help="The relex.yaml of its training run.")] = Path("relex.yaml"),
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Put a real checkpoint through the gate of predictions, and register it beside them.

    Example: relex register runs/qwen/checkpoint-130
    """
    from deploy.local import stack
    from flows.observed.register import register as put
    from flows.settings import load_settings

    settings = load_settings(config)
    with err.status("scoring"):
        done = put(settings, checkpoint, tracking_uri=stack.tracking_uri(home))
    if as_json:
        print_json(asdict(done))
        return
    name, version = settings.registered_model, done.registered.version
    for line in (done.sentence, *(each.sentence for each in done.gates), done.registered.url):
        if line:
            print_sentence(line)
    print_sentence(f"relex promote {name} {version} makes it the champion.")


@_command()
def promote(
    name: Registered,
    version: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", help="Version of NAME-candidates (default: the newest).")
    ] = None,
    *,
    approve: Annotated[
        bool, typer.Option("--approve", help="Ask in the Prefect UI, and promote when somebody there says so.")
    ] = False,
    insist: Annotated[
        str, typer.Option(metavar="REASON", help="Promote it whatever the gate says, for this reason.")
    ] = "",
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Make a registered prediction the champion, if its weights are whole and its stored gate results say so.

    Nothing is scored; every attempt is a run in MLflow. Damaged weights are refused whoever insists.
    Example: relex promote qwen 3
    """
    import psutil

    from deploy.local import stack
    from flows.promote.promotion import promote as move

    by = psutil.Process().username()
    if approve and insist:
        raise typer.BadParameter("--approve asks what the gate says; --insist goes without it")
    if approve:
        running = stack.running(home)
        os.environ.update(stack.environment(running))
        from flows.promote.ask import ask

        asked = ask(running, name, version, by=by)
        if as_json:
            print_json(asdict(asked))
        else:
            print_sentence(asked.sentence)
        return
    done = move(
        name, version, tracking_uri=stack.tracking_uri(home), by=by, downloads=home / "models", insist=insist.strip()
    )
    _show_promotion(done, as_json=as_json)


@_command()
def rollback(name: Registered, home: Home = HOME, as_json: Json = False) -> None:
    """Give the place of champion back to the one before, if its weights are whole.

    Example: relex rollback qwen
    """
    import psutil

    from deploy.local import stack
    from flows.promote.promotion import rollback as move

    by = psutil.Process().username()
    _show_promotion(
        move(name, tracking_uri=stack.tracking_uri(home), by=by, downloads=home / "models"), as_json=as_json
    )


@_command()
def export(
    name: Registered,
    place: Annotated[str, typer.Option("--out", help="New directory for the model and its card, or hf://ORG/NAME.")],
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Write the champion with a model card: base, method, window, numbers, how it was decided.

    Example: relex export qwen --out qwen-500
    To the Hub: relex export qwen --out hf://org/qwen-500
    """
    from deploy.local import stack
    from flows.promote.export import export as write

    card = write(name, place, tracking_uri=stack.tracking_uri(home), downloads=home / "models")
    if as_json:
        print_json({"out": place, "card": card})
    else:
        print_line(out, f"wrote {place}: {card}")


def _show_promotion(done: "Promotion", *, as_json: bool) -> None:
    if as_json:
        print_json(done.to_json())
        return
    for line in filter(None, (done.sentence, done.entry.url)):
        print_sentence(line)


@_command()
def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model, and of what is served.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="-- OPTION", help="Options for the engine.")] = None,
    *,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Command with {model}, {host}, {port} and {name} (default: vllm if installed, or transformers serve).",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; nobody is asked for a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Further name that clients call this server by; may be repeated.")
    ] = None,
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="How often to look whether the champion changed.")] = 10,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Serve the champion over HTTP, its files verified, and change to the next one without a failed request.

    In the foreground, until interrupted.
    Example: relex serve qwen -- --max-model-len 8192 --gpu-memory-utilization 0.45
    """
    from deploy.local import stack
    from deploy.serving.service import Notice, Service
    from deploy.serving.service import serve as run_service
    from flows.promote.promotion import settle

    def on_notice(notice: Notice) -> None:
        if as_json:
            typer.echo(json.dumps(asdict(notice)))
        else:
            print_sentence(notice.text)

    place = home.expanduser().resolve()
    service = Service(
        name,
        place,
        engine,
        tuple(options or ()),
        host=host,
        port=port,
        names=tuple(allow_host or ()),
        poll_seconds=poll_seconds,
    )

    def judge() -> list[Notice]:
        settled = settle(name, tracking_uri=stack.tracking_uri(place), downloads=place / "models")
        return [Notice("judged", int(each.entry.asked.rpartition("/")[2]), each.sentence) for each in settled]

    run_service(service, tracking_uri=lambda: stack.tracking_uri(place), on_notice=on_notice, settle=judge)
